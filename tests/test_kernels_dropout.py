"""The Triton dropout mask: its definition, its statistics, its independence of shapes and seeds."""

import itertools

import pytest
import torch

pytest.importorskip("triton")

from peft_fast.kernels.dropout import dropout_mask
from peft_fast.reference import drop_threshold

SHAPE = (256, 512)


def mask_of(seed: int, threshold: int, device: str, shape: tuple[int, ...] = SHAPE) -> torch.Tensor:
    return dropout_mask(torch.tensor([seed], device=device), shape, threshold)


def assert_rate(dropped: torch.Tensor, p: float, name: str) -> None:
    """Within six standard deviations of p, for each entry of the rates over the last dimension."""
    rates = dropped.double().mean(-1)
    limit = 6 * (p * (1 - p) / dropped.shape[-1]) ** 0.5
    worst = (rates - p).abs().max().item()
    assert worst <= limit, f"{name}: rate off by {worst:.4f}, more than {limit:.4f}"


def philox(counter: list[int], seed: int, rounds: int) -> list[int]:
    """Philox4x32 (Salmon et al. 2011) in plain Python."""
    low = 2**32 - 1
    key = [seed & low, seed >> 32 & low]
    for _ in range(rounds):
        products = 0xD2511F53 * counter[0], 0xCD9E8D57 * counter[2]
        counter = [
            products[1] >> 32 ^ counter[1] ^ key[0],
            products[1] & low,
            products[0] >> 32 ^ counter[3] ^ key[1],
            products[0] & low,
        ]
        key = [(key[0] + 0x9E3779B9) & low, (key[1] + 0xBB67AE85) & low]
    return counter


# A seed with each half of its 64 bits in use, and a negative one, as torch's generator may draw.
@pytest.mark.parametrize("seed", [0x123456789ABCDEF, -3])
def test_words_are_those_documented(seed, device):
    threshold = 20000
    mask = mask_of(seed, threshold, device, (3, 96))
    for row in range(3):
        for col in range(96):
            b, j, t, e = col // 32, col % 32 // 8, col % 8 // 2, col % 2
            word = philox([4 * b + t, row, 0, 0], seed, 7)[j] >> 16 * e & 0xFFFF
            assert mask[row, col].item() == (word >= threshold), (row, col)


# Small, even, large: a biased lane shows at each.
@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
def test_rate(p, device):
    threshold = drop_threshold(p)
    dropped = ~mask_of(7, threshold, device)
    p = threshold / 2**16
    assert_rate(dropped.reshape(1, -1), p, "all")
    assert_rate(dropped, p, "row")
    assert_rate(dropped.T, p, "column")
    for lanes in (2, 8, 32):
        by_lane = dropped.reshape(SHAPE[0], -1, lanes).permute(2, 0, 1).reshape(lanes, -1)
        assert_rate(by_lane, p, f"column modulo {lanes}")


def test_the_threshold_counts_words(device):
    """The same words at every threshold: a higher one drops a superset; 65535 keeps about one element in 2^16."""
    masks = [mask_of(7, threshold, device) for threshold in (1, 3000, 3001, 40000, 65535)]
    for lower, higher in itertools.pairwise(masks):
        assert (lower | ~higher).all()
    assert (~masks[0]).sum() <= 20
    assert masks[-1].sum() <= 20


# Neighbours, and seeds that differ in the upper half alone.
@pytest.mark.parametrize("other", [8, 7 + 2**32, 7 - 2**63])
def test_seeds_are_independent(other, device):
    first, second = (mask_of(seed, 2**15, device) for seed in (7, other))
    assert_rate((first != second).reshape(1, -1), 0.5, "disagreement")


# Distances between elements of one Philox call, of neighbouring calls, of neighbouring rows.
@pytest.mark.parametrize(("rows", "cols"), [(0, 1), (0, 2), (0, 8), (0, 16), (0, 32), (1, 0), (1, 1), (64, 0)])
def test_elements_are_independent(rows, cols, device):
    mask = mask_of(7, 2**15, device)
    disagree = mask[rows:, cols:] != mask[: SHAPE[0] - rows, : SHAPE[1] - cols]
    assert_rate(disagree.reshape(1, -1), 0.5, "disagreement")


# One tile, several with a tail, odd, more than two dimensions, empty.
@pytest.mark.parametrize("shape", [(1, 1), (17, 33), (100, 130), (2, 5, 7, 33), (0, 8), (8, 0)])
def test_mask_depends_on_position_alone(shape, device):
    whole = mask_of(7, 2**15, device)
    part = mask_of(7, 2**15, device, shape)
    assert part.shape == shape
    rows = part.reshape(-1, shape[-1]) if part.numel() else part
    assert torch.equal(rows, whole[: rows.shape[0], : rows.shape[1]])
