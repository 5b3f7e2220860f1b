"""The masks of the eager backend: every rate, and the same mask wherever it is made again."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from peft_fast import eager, reference
from peft_fast.eager import dropout

# One rate of each kind: points alone, and bytes with points for the rest.
RATES = pytest.mark.parametrize("p", [0.03, 0.3])


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
    monkeypatch.setattr(dropout, "POINTS_PIECE", 1000)
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


def pieces(seed, shapes, threshold):
    return list(dropout.dropped_pieces(torch.tensor([seed]), shapes, threshold))


@RATES
def test_masks_that_take_turns_in_one_memory(p):
    shapes = [(30, 40), (20, 70), (30, 40)]
    threshold = reference.drop_threshold(p)
    held = pieces(1, shapes, threshold)
    alone = [piece.masked(torch.ones(shape)).clone() for piece, shape in zip(held, shapes, strict=True)]
    for order in ((0, 1, 2), (2, 0, 1), (1, 1, 0)):
        for i in order:
            for dtype in (torch.float32, torch.bfloat16, torch.float32):
                x = torch.ones(shapes[i], dtype=dtype)
                assert torch.equal(held[i].masked(x).float(), alone[i])
                held[i].mask_(x)
                assert torch.equal(x.float(), alone[i])
    assert not torch.equal(alone[0], alone[2])


def test_a_mask_is_not_what_masked_gives():
    piece, other = pieces(1, [(64, 64), (64, 64)], reference.drop_threshold(0.3))
    x = torch.ones(64, 64)
    first = piece.masked(x)
    before = first.clone()
    other.mask_(x)
    assert torch.equal(first, before)


def test_threads_have_memory_of_their_own():
    shape, threshold = (256, 256), reference.drop_threshold(0.3)

    def work(seed):
        (piece,) = pieces(seed, [shape], threshold)
        first = piece.masked(torch.ones(shape))
        return all(torch.equal(piece.masked(torch.ones(shape)), first) for _ in range(50))

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(work, range(64)))


def test_memory_made_in_inference_mode_serves_everywhere(monkeypatch):
    monkeypatch.setattr(dropout, "_thread", dropout._Thread())
    (piece,) = pieces(1, [(8, 8)], reference.drop_threshold(0.3))
    with torch.inference_mode():
        first = piece.masked(torch.ones(8, 8)).clone()
    (again,) = pieces(1, [(8, 8)], reference.drop_threshold(0.3))
    assert torch.equal(again.masked(torch.ones(8, 8)), first)


def test_a_large_mask_is_not_kept(monkeypatch):
    monkeypatch.setattr(dropout, "_thread", dropout._Thread())
    monkeypatch.setattr(dropout, "BLOCK_ELEMENTS", 64)
    monkeypatch.setattr(dropout, "MOST_KEPT_ELEMENTS", 128)
    small, large = pieces(1, [(10, 10), (20, 20)], reference.drop_threshold(0.3))
    large.masked(torch.ones(20, 20))
    assert not dropout._thread.memory
    small.masked(torch.ones(10, 10))
    assert dropout._thread.memory[torch.float32].numel() == 100
