"""The masks of the eager backend: every rate, and the same mask wherever it is made again."""

import pytest
import torch

from peft_fast import eager, reference
from peft_fast.eager import dropout

P = 0.1
THRESHOLD = reference.drop_threshold(P)


def dropped(seed: int, M: int, K: int) -> torch.Tensor:
    return (~eager.dropout_mask(torch.tensor([seed]), (M, K), THRESHOLD)).double()


def assert_rate(rates: torch.Tensor, n: int) -> None:
    """Each rate over n elements lies within 5 standard deviations of p."""
    assert (rates - P).abs().max() < 5 * (P * (1 - P) / n) ** 0.5


def test_rate_per_column_modulo_four():
    # Four 16-bit words share one 64-bit draw: a bit that is never set shows in one column of four.
    mask = dropped(3, 4096, 256)
    assert_rate(mask.view(4096, 64, 4).mean(dim=(0, 1)), 4096 * 64)


def test_rate_per_row_and_column():
    mask = dropped(4, 2048, 2048)
    assert_rate(mask.mean(0), 2048)
    assert_rate(mask.mean(1), 2048)


def test_neighbours_are_independent():
    mask = dropped(5, 2048, 512) - P
    n = mask.numel()
    for shifted in (mask.roll(1, 0), mask.roll(1, 1), mask.roll(4, 1)):
        assert (mask * shifted).mean().abs() < 5 * P * (1 - P) / n**0.5


@pytest.mark.parametrize("other", [1, 2, 2**32, 2**62], ids=["next", "two-on", "high-word", "high-bit"])
def test_seeds_give_independent_masks(other):
    first, second = dropped(7, 1024, 256) - P, dropped(7 + other, 1024, 256) - P
    assert (first * second).mean().abs() < 5 * P * (1 - P) / first.numel() ** 0.5


@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 7), (1000, 384), (5, 300_000)], ids=str)
def test_blocks_are_the_mask(shape):
    # (1000, 384) spans two blocks and (5, 300000) one block for every four rows.
    seed = torch.tensor([11])
    blocks = [keep.clone() for _, keep in dropout.keep_blocks(seed, shape, THRESHOLD, torch.float32)]
    assert torch.equal(torch.cat(blocks).bool(), eager.dropout_mask(seed, shape, THRESHOLD))


def test_block_height_does_not_change_the_mask(monkeypatch):
    seed = torch.tensor([12])
    mask = eager.dropout_mask(seed, (100, 30), THRESHOLD)
    monkeypatch.setattr(dropout, "BLOCK_ELEMENTS", 300)
    blocks = [keep.clone() for _, keep in dropout.keep_blocks(seed, (100, 30), THRESHOLD, torch.float64)]
    assert len(blocks) > 5
    assert torch.equal(torch.cat(blocks).bool(), mask)


def test_extreme_thresholds():
    seed = torch.tensor([13])
    assert eager.dropout_mask(seed, (64, 64), 0).all()
    assert eager.dropout_mask(seed, (64, 64), 65535).double().mean() < 0.01


def test_seeds_come_from_torchs_generator():
    torch.manual_seed(1)
    first = [eager.draw_seed(torch.device("cpu")).item() for _ in range(2)]
    torch.manual_seed(1)
    assert [eager.draw_seed(torch.device("cpu")).item() for _ in range(2)] == first
    assert first[0] != first[1]
