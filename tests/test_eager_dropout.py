"""The masks of the eager backend, drawn in both ways: every rate, and the same mask wherever it is made again."""

import pytest
import torch

from peft_fast import eager, reference
from peft_fast.eager import dropout, dropout_native, dropout_numpy

# One rate of each kind that numpy has: points alone, and bytes with points for the rest.
RATES = pytest.mark.parametrize("p", [0.03, 0.3])


@pytest.fixture(params=["native", "numpy"], autouse=True)
def _drawn_by(request, monkeypatch):
    if request.param == "numpy":
        monkeypatch.setattr(dropout_native, "library", lambda: None)
    else:
        assert dropout_native.library() is not None, "these tests need a C compiler"


def dropped(p: float, seed: int, M: int, K: int) -> torch.Tensor:
    return (~eager.dropout_mask(torch.tensor([seed]), (M, K), reference.drop_threshold(p))).double()


def assert_rate(rates: torch.Tensor, p: float, n: int) -> None:
    """Each rate over n elements lies within 5 standard deviations of p."""
    assert (rates - p).abs().max() < 5 * (p * (1 - p) / n) ** 0.5


@pytest.mark.parametrize("p", [2**-16, 0.01, 0.1, 0.125, 0.3, 0.5, 0.9], ids=str)
def test_rate(p):
    for M, K in (4096, 1024), (999, 1001):
        assert_rate(dropped(p, 2, M, K).mean(), p, M * K)


@RATES
def test_rate_per_column_modulo_eight(p):
    # Eight bytes share one 64-bit draw: a bit that is never set shows in one column of eight.
    assert_rate(dropped(p, 3, 4096, 256).view(4096, 32, 8).mean(dim=(0, 1)), p, 4096 * 32)


@RATES
def test_rate_along_a_block(p):
    # Short pieces for where a word cannot reach, long ones for a slow drift; n is no power of two.
    n, masks = 3 * 2**16 + 20_000, 200
    rates = torch.stack([dropped(p, seed, 1, n)[0] for seed in range(masks)]).mean(0)
    for length in (2**8, 2**12, 2**16):
        *pieces, rest = [piece.mean() for piece in rates.split(length)]
        assert_rate(torch.stack(pieces), p, masks * length)
        assert_rate(rest, p, masks * (n % length))


def test_points_of_a_long_row_come_in_pieces(monkeypatch):
    monkeypatch.setattr(dropout_numpy, "POINTS_PIECE", 1000)
    mask = dropped(0.03, 5, 400, 10_500)
    assert_rate(mask.mean(0).unflatten(0, (21, 500)).mean(1), 0.03, 400 * 500)


@RATES
def test_rate_per_row_and_column(p):
    mask = dropped(p, 4, 2048, 2048)
    assert_rate(mask.mean(0), p, 2048)
    assert_rate(mask.mean(1), p, 2048)


@RATES
def test_the_number_dropped_varies_as_that_of_independent_elements(p):
    # Of points without their Poisson count, or of bytes alone, the variance would be another.
    n, masks = 4096, 1000
    counts = torch.tensor([dropped(p, seed, 1, n).sum() for seed in range(masks)])
    assert abs(counts.var() / (n * p * (1 - p)) - 1) < 5 * (2 / masks) ** 0.5


@RATES
def test_neighbours_are_independent(p):
    mask = dropped(p, 5, 2048, 512) - p
    n = mask.numel()
    for shifted in (mask.roll(1, 0), mask.roll(1, 1), mask.roll(8, 1)):
        assert (mask * shifted).mean().abs() < 5 * p * (1 - p) / n**0.5


@RATES
@pytest.mark.parametrize("other", [1, 2, 2**32, 2**62], ids=["next", "two-on", "high-word", "high-bit"])
def test_seeds_give_independent_masks(p, other):
    first, second = dropped(p, 7, 1024, 256) - p, dropped(p, 7 + other, 1024, 256) - p
    assert (first * second).mean().abs() < 5 * p * (1 - p) / first.numel() ** 0.5


@RATES
@pytest.mark.parametrize("shape", [(0, 8), (1, 1), (3, 7), (3000, 384), (3, 1_200_000)], ids=str)
def test_blocks_are_the_mask(p, shape):
    # (3000, 384) spans two blocks, and each row of (3, 1200000) is one.
    seed, threshold = torch.tensor([11]), reference.drop_threshold(p)
    mask = eager.dropout_mask(seed, shape, threshold)
    x = torch.randn(shape[::-1]).t()
    new, in_place = [], x.clone(memory_format=torch.contiguous_format)
    for rows, block in dropout.dropped_blocks(seed, shape, threshold):
        new.append(block.masked(x[rows]))
        block.mask_(in_place[rows])
    assert torch.equal(torch.cat(new), x * mask)
    assert torch.equal(in_place, x * mask)


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
