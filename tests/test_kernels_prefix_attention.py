"""The Triton prefix attention against the float64 reference, in the interpreter where there is no GPU."""

import pytest
import torch
from torch import Tensor

pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget

from peft_fast import reference
from peft_fast.kernels import _launch, partial_sums, prefix_attention
from peft_fast.kernels._launch import Tile, recording
from peft_fast.kernels.prefix_attention import attention_bwd, attention_dropout_mask, attention_fwd
from prefix_cases import DTYPES, SEED, arguments, assert_matches, make_case, run, seed_and_threshold


# Each pair of types once plainly and once with everything that changes numbers. Two sequences, two key heads of two
# queries' heads each, so that no index can stand for another; rows and keys of more than one tile, with tails.
@pytest.mark.parametrize("gate", [False, True], ids=["joint", "gate"])
@pytest.mark.parametrize("dtypes", DTYPES)
def test_results(dtypes, gate, device):
    assert_matches(make_case(2, 4, 2, 50, 70, 5, 16, dtypes=dtypes, gate=gate, p=0.1, causal=True, device=device))


# Every length of prefix, sequence, head and group that the op is specified for, each at least once, longer queries than
# keys and shorter; in the types in which padding of a tile with anything but zero shows most.
@pytest.mark.parametrize(
    ("Z", "H", "H_KV", "S", "T", "P", "DH", "options"),
    [
        (1, 1, 1, 1, 1, 1, 16, {}),
        (3, 8, 1, 1, 130, 16, 64, {"causal": True}),
        (2, 8, 2, 7, 64, 100, 40, {}),
        (1, 4, 1, 64, 7, 5, 128, {"causal": True, "p": 0.1}),
        (1, 2, 2, 130, 130, 16, 80, {"causal": True}),
        (1, 2, 1, 130, 64, 100, 16, {"p": 0.5}),
        (1, 3, 1, 30, 64, 1, 256, {}),
        (1, 2, 1, 64, 1, 5, 3, {}),
    ],
    ids=lambda value: "-".join(map(str, value)) or "plain" if isinstance(value, dict) else str(value),
)
def test_shapes(Z, H, H_KV, S, T, P, DH, options, device):
    assert_matches(make_case(Z, H, H_KV, S, T, P, DH, dtypes="bf16-fp32", device=device, **options))


# Who sees whom: each mask alone and beside causal and window, rows that see nothing at all, queries before all keys.
# fp64 beside fp32 with a gate, where what few keys get must not be a small difference of large numbers; 16 bits, whose
# logits are powers of 2.
@pytest.mark.parametrize(
    ("dtypes", "gate"),
    [("fp32", False), ("fp32", True), ("fp64", True), ("fp16", True), ("bf16", True)],
    ids=["joint", "gate", "gate-fp64", "gate-fp16", "gate-bf16"],
)
@pytest.mark.parametrize(
    ("mask", "S", "T", "options"),
    [
        ("keys", 70, 70, {}),
        ("bool", 20, 70, {"causal": True}),
        ("-inf", 70, 70, {"causal": True, "window": 9}),
        ("bias", 70, 20, {"causal": True}),
        (None, 70, 130, {"window": 40}),
        (None, 130, 70, {"causal": True, "window": 2}),
        (None, 8, 8, {"causal": True, "window": 2**40}),
        # The last query of the first tile, 31 here, sees the first key of the second one alone.
        (None, 40, 73, {"causal": True}),
    ],
    ids=lambda value: "-".join(map(str, value)) or "alone" if isinstance(value, dict) else str(value),
)
def test_masks(mask, S, T, options, dtypes, gate, device):
    assert_matches(make_case(2, 2, 1, S, T, 5, 16, dtypes=dtypes, mask=mask, gate=gate, device=device, **options))


# finfo.min is no -inf: an own softmax of nothing else is uniform. Of nothing but -2000 it is what it were without, and
# fp32 and fp64 tell it from a uniform one.
@pytest.mark.parametrize(
    ("mask", "dtypes", "gate"),
    [
        ("min", "fp32", False),
        ("min", "fp16", False),
        ("min", "bf16", False),
        ("min", "fp32", True),
        ("min", "bf16", True),
        ("-2000", "fp32", True),
        ("-2000", "fp64", True),
        ("-2000", "fp16", True),
    ],
    ids=str,
)
def test_far_negative_additive_masks(mask, dtypes, gate, device):
    assert_matches(make_case(2, 2, 1, 20, 70, 5, 16, dtypes=dtypes, mask=mask, gate=gate, device=device))


# Masks come in any float type, in any layout that broadcasts, or for some of the dimensions alone.
@pytest.mark.parametrize(
    "layout",
    [
        lambda mask: mask.float(),
        lambda mask: mask.expand(-1, 4, -1, -1),
        lambda mask: mask.transpose(2, 3).contiguous().transpose(2, 3),
        lambda mask: mask[:1],
        lambda mask: mask[0, 0],
        lambda mask: mask[..., :1],
    ],
    ids=["fp32", "expanded", "transposed", "one-sequence", "two-dimensions", "one-column"],
)
def test_mask_layouts(layout, device):
    case = make_case(2, 4, 2, 20, 70, 5, 16, dtypes="bf16", mask="min", device=device)
    case.attn_mask = layout(case.attn_mask + torch.randn_like(case.attn_mask))
    assert_matches(case)


# A cap so large that it is none: logits must not be rounded to a fraction of it.
def test_large_softcap(device):
    assert_matches(make_case(2, 2, 1, 20, 70, 5, 16, dtypes="bf16", softcap=1e6, device=device))


# The cap in its linear and in its flat part, beside masks, which come after it, and with a scale of the caller's.
@pytest.mark.parametrize("softcap", [0.5, 20.0])
@pytest.mark.parametrize(
    ("dtypes", "gate"), [("fp32", True), ("fp32", False), ("bf16", False), ("fp16", False)], ids=str
)
def test_softcap_and_scale(softcap, dtypes, gate, device):
    assert_matches(
        make_case(
            2, 2, 1, 20, 70, 5, 16, dtypes=dtypes, gate=gate, softcap=softcap, scale=0.4, mask="bias", device=device
        )
    )


@pytest.mark.parametrize("gate", [False, True], ids=["joint", "gate"])
@pytest.mark.parametrize(("Z", "S", "T"), [(2, 20, 0), (2, 0, 20), (0, 20, 20), (2, 0, 0)])
def test_empty(Z, S, T, gate, device):
    assert_matches(make_case(Z, 4, 2, S, T, 5, 16, gate=gate, p=0.1, causal=True, mask="bool", device=device))


def strided(tensor: Tensor) -> Tensor:
    """Every other element, along each dimension, of a larger tensor."""
    larger = torch.full([2 * size for size in tensor.shape], float("nan"), dtype=tensor.dtype, device=tensor.device)
    every_other = larger[(slice(None, None, 2),) * tensor.dim()]
    return every_other.copy_(tensor)


# What autograd and models hand over: y.sum() (expanded), dense (Z, H, S, DH) memory, parts of one projection's output,
# one key head for all.
@pytest.mark.parametrize(
    ("name", "layout"),
    [
        ("dy", lambda dy: dy[:1, :1, :1, :1].expand_as(dy)),
        ("dy", lambda dy: dy[:, :, :1].expand_as(dy)),
        ("dy", torch.Tensor.contiguous),
        ("query", torch.Tensor.contiguous),
        ("query", lambda query: torch.cat([query, query], 3)[..., :16]),
        ("key", strided),
        ("value", lambda value: value[:1].expand_as(value)),
        ("prefix_key", lambda prefix: prefix.mT.contiguous().mT),
        ("prefix_value", strided),
        ("gate", strided),
    ],
    ids=["dy-value", "dy-row", "dy-dense", "dense", "slice", "key", "value", "prefix-key-T", "prefix-value", "gate"],
)
def test_layouts(name, layout, device):
    case = make_case(2, 4, 2, 20, 30, 5, 16, dtypes="bf16", gate=True, p=0.1, device=device)
    setattr(case.inputs, name, layout(getattr(case.inputs, name)))
    assert_matches(case)


def test_results_are_fresh_memory_as_projections_take_it(device):
    case = make_case(2, 4, 2, 20, 30, 5, 16, gate=True, device=device)
    results = run(case)
    for name in ("y", "query", "key", "value"):
        assert results[name].transpose(1, 2).is_contiguous(), name
    assert results["lse"].shape == (3, 2, 4, 20)
    storages = {tensor.untyped_storage().data_ptr() for tensor in results.values()}
    assert len(storages) == len(results)


def test_lse(device):
    """Natural logarithms: of both segments together; with a gate of the own keys, in two parts, and of the prefix."""
    case = make_case(2, 4, 2, 20, 30, 5, 16, dtypes="fp64", causal=True, device=device)
    x = case.inputs.to(torch.float64)
    key = torch.cat([x.prefix_key.expand(2, -1, -1, -1), x.key], 2).repeat_interleave(2, 1)
    logits = x.query @ key.mT * case.options["scale"]
    hidden = torch.arange(20, device=device)[:, None] + 10 < torch.arange(30, device=device)
    logits[..., 5:] = logits[..., 5:].masked_fill(hidden, -torch.inf)
    torch.testing.assert_close(attention_fwd(*arguments(case), **case.options)[1][0], logits.logsumexp(-1))
    case.inputs.gate = torch.ones(4, dtype=torch.float64, device=device)
    top, log_total, prefix = attention_fwd(*arguments(case), **case.options)[1]
    torch.testing.assert_close(top, logits[..., 5:].amax(-1))
    torch.testing.assert_close(top + log_total, logits[..., 5:].logsumexp(-1))
    torch.testing.assert_close(prefix, logits[..., :5].logsumexp(-1))


# Each gradient alone and without each: the bits do not depend on what else is asked for.
@pytest.mark.parametrize("gate", [False, True], ids=["joint", "gate"])
def test_needs(gate, device):
    case = make_case(1, 2, 1, 20, 20, 5, 16, dtypes="bf16-fp32", gate=gate, p=0.1, device=device)
    everything = run(case)
    for name in case.needs:
        for needs in ({name}, case.needs - {name}):
            for key, value in run(case, needs).items():
                assert torch.equal(value, everything[key]), (needs, key)
    assert set(run(case, set())) == {"y", "lse"}


def kernels_launched(*needs: str, gate: bool = False) -> list[str]:
    """The names of the kernels in backward, where the prefix's gradients come in parts and the own keys' do not."""
    case = make_case(2, 8, 4, 128, 128, 16, 64, dtypes="bf16", gate=gate)
    with recording(GPUTarget("cuda", 90, 32)) as launches:
        run(case, set(needs))
    names = [launch.kernel.__name__ for launch in launches]
    assert names[0] == "attention_fwd_kernel"
    return [name.removeprefix("attention_").removesuffix("_kernel") for name in names[1:]]


def test_no_work_for_what_is_not_needed():
    rows, keys, total = "dq", "dkv", "_sum_partials"
    assert kernels_launched() == []
    assert kernels_launched("query") == kernels_launched("gate", gate=True) == [rows]
    assert kernels_launched("value") == [keys]
    assert kernels_launched("key") == [rows, keys]
    assert kernels_launched("prefix_value") == [keys, total]
    assert kernels_launched("prefix_key", "prefix_value") == [rows, keys, total]
    everything = ("query", "key", "value", "prefix_key", "prefix_value")
    assert (
        kernels_launched(*everything) == kernels_launched(*everything, "gate", gate=True) == [rows, keys, keys, total]
    )


# The prefix's gradients are sums over the batch: of as many parts as there are blocks of rows here.
@pytest.mark.parametrize("gate", [False, True], ids=["joint", "gate"])
def test_bits_repeat(gate, device):
    case = make_case(2, 4, 2, 50, 20, 5, 16, dtypes="bf16-fp32", gate=gate, p=0.1, causal=True, device=device)
    first, second = run(case), run(case)
    assert all(torch.equal(first[name], second[name]) for name in first)


# Parts of several steps: of the prefix across sequences, as large batches have; of the own keys where few programs
# have many queries, some of whose parts see nothing of a block of keys.
@pytest.mark.parametrize(
    ("Z", "H", "H_KV", "S", "T", "options"),
    [
        (5, 2, 1, 40, 20, {"dtypes": "fp32"}),
        (2, 4, 1, 70, 150, {"dtypes": "bf16", "causal": True, "mask": "bias"}),
        (2, 2, 1, 90, 70, {"dtypes": "fp32", "causal": True, "window": 40}),
        (1, 3, 1, 90, 130, {"dtypes": "fp16-fp32", "causal": True, "gate": True}),
    ],
    ids=["prefix", "causal", "window", "gate"],
)
def test_parts_of_the_rows(Z, H, H_KV, S, T, options, device, monkeypatch):
    chunks = prefix_attention.chunks
    parts = {}

    def of_rows(length, block, programs):
        if block == prefix_attention._LEAST_KEYS:
            return 1, length
        found = chunks(length, 3 if block == 1 else block, 1)
        parts[block] = found[0]
        return found

    monkeypatch.setattr(_launch, "_plans", {})
    monkeypatch.setattr(prefix_attention, "_LEAST_STEPS", 2)
    monkeypatch.setattr(prefix_attention, "chunks", of_rows)
    monkeypatch.setattr(prefix_attention, "_tile", lambda *_: Tile(32, 64, 0, 0, 4, 1))
    assert_matches(make_case(Z, H, H_KV, S, T, 5, 16, p=0.1, device=device, **options))
    assert parts[1] > 1
    assert parts[2] > 1 or S == 40


# A mask for each key alone says something of the rows behind the last one too: their weights must be nothing, not
# infinite.
@pytest.mark.parametrize(("dtypes", "bias"), [("fp32", 100.0), ("bf16", 100.0), ("fp16", 12.0)])
def test_large_positive_masks(dtypes, bias, device):
    case = make_case(2, 2, 2, 20, 20, 5, 16, dtypes=dtypes, mask="keys", device=device)
    case.attn_mask = torch.where(case.attn_mask, bias, 0.0).to(case.inputs.query.dtype)
    of_keys = run(case)
    case.attn_mask = case.attn_mask.expand(-1, -1, 20, -1).contiguous()
    of_rows = run(case)
    for name, found in of_keys.items():
        assert found.isfinite().all(), name
        assert torch.equal(found, of_rows[name]), name
    if dtypes == "fp16":  # more takes digits of lse that the budget knows nothing of
        assert_matches(case)


@pytest.fixture
def parts(monkeypatch):
    """The numbers of parts that calls split the own keys into, of at least one block of keys each."""
    made = []

    def plan(*layout):
        found = fwd_plan(*layout)
        made.append(found[1])
        return found

    fwd_plan = prefix_attention._fwd_plan
    monkeypatch.setattr(_launch, "_plans", {})
    monkeypatch.setattr(prefix_attention, "_LEAST_KEYS", 128)
    monkeypatch.setattr(prefix_attention, "_fwd_plan", plan)
    return made


# One query behind a cache, alone and of many heads; parts of which a row sees nothing, by a window, by padding, by a
# causal mask; dropout, whose mask must not know of parts.
@pytest.mark.parametrize(
    ("Z", "H", "H_KV", "S", "T", "P", "DH", "options"),
    [
        (1, 1, 1, 1, 600, 5, 64, {"causal": True, "dtypes": "bf16"}),
        (2, 8, 2, 1, 390, 16, 40, {"mask": "keys", "dtypes": "fp16-fp32"}),
        (1, 4, 2, 40, 300, 5, 16, {"causal": True, "window": 200, "mask": "bool", "p": 0.1}),
        (1, 4, 1, 2, 900, 5, 16, {"causal": True, "window": 200}),
        (1, 2, 1, 150, 140, 70, 16, {"causal": True, "softcap": 4.0, "mask": "-inf"}),
        (1, 2, 2, 3, 300, 5, 3, {"mask": "min", "dtypes": "fp64"}),
        (1, 1, 1, 1, 4300, 5, 16, {"causal": True, "dtypes": "bf16"}),
    ],
    ids=["decoding", "padding", "window", "short-window", "causal", "fp64", "many"],
)
def test_parts_of_the_keys(Z, H, H_KV, S, T, P, DH, options, parts, device):
    assert_matches(make_case(Z, H, H_KV, S, T, P, DH, device=device, **options))
    # With a window, of what it lets through: no part beyond it.
    seen = min(T, options.get("window", T) + S + 128)
    assert set(parts) <= {-(-T // 128), -(-seen // 128)}
    assert max(parts) * 128 < seen + 128


@pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning")  # numpy's, in the interpreter
def test_a_row_that_is_no_number_keeps_to_itself_in_parts(parts, device):
    case = make_case(1, 2, 1, 8, 300, 5, 16, device=device)
    clean = run(case, {"query"})
    case.inputs.query[0, 1, 3] = torch.nan
    spoiled = run(case, {"query"})
    assert parts == [3, 3]
    for name, found in spoiled.items():
        rows, expected = (x.reshape(16, -1) for x in (found, clean[name]))  # (H, S) of one sequence
        if name == "lse":  # a device's maximum, unlike the interpreter's, leaves out what is no number
            assert not rows[11].isfinite().any()
        else:
            assert rows[11].isnan().all(), name
        others = torch.arange(16, device=device) != 11
        assert torch.equal(rows[others], expected[others]), name


def test_calls_of_many_programs_or_with_a_gate_are_not_split(parts, device, monkeypatch):
    monkeypatch.setattr(partial_sums, "_PROGRAMS", 8)
    run(make_case(3, 2, 2, 1, 300, 5, 16, device=device), {"query"})
    run(make_case(1, 2, 1, 1, 300, 5, 16, device=device, gate=True), {"query"})
    assert parts == [1, 1]


# The mask depends on the element alone, so that any tiles see the same one.
def test_other_tiles(device, monkeypatch):
    case = make_case(2, 4, 2, 50, 70, 40, 16, dtypes="fp32", p=0.3, causal=True, window=50, device=device)
    monkeypatch.setattr(_launch, "_plans", {})
    monkeypatch.setattr(prefix_attention, "_tile", lambda *_: Tile(32, 32, 0, 0, 4, 1))
    assert_matches(case)


def test_dropout_mask(device):
    """Its rate in every head, query and column of both segments, and no two segments or heads alike."""
    seed, p = torch.tensor([SEED], device=device), reference.drop_threshold(0.3) / 2**16
    keep = attention_dropout_mask(seed, (2, 4, 64, 64, 128), reference.drop_threshold(0.3))
    assert keep.shape == (2, 4, 64, 192)
    for dim in range(4):
        dropped = (~keep).double().movedim(dim, 0).flatten(1)
        limit = 6 * (p * (1 - p) / dropped.shape[1]) ** 0.5
        assert ((dropped.mean(1) - p).abs() < limit).all(), dim
    rows = keep.flatten(0, 2)
    blocks = torch.cat([rows[:, :64], rows[:, 64:128], rows[:, 128:]]).unflatten(0, (3 * 8, 64))
    for index, block in enumerate(blocks):
        assert all((block != other).double().mean() > 0.3 for other in blocks[index + 1 :])
    part = attention_dropout_mask(seed, (1, 4, 64, 5, 70), reference.drop_threshold(0.3))
    assert torch.equal(part, torch.cat([keep[:1, ..., :5], keep[:1, ..., 64:134]], -1))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, call, options, query, key, value, prefix_key, prefix_value, gate=None):
        inputs = (query, key, value, prefix_key, prefix_value, call[0], gate, *call[1:])
        ctx.saved = (*inputs, *attention_fwd(*inputs, **options))
        ctx.options = options
        return ctx.saved[-2].clone()

    @staticmethod
    def backward(ctx, dy):
        names = ["query", "key", "value", "prefix_key", "prefix_value", "gate"][: 5 if ctx.saved[6] is None else 6]
        grads = attention_bwd(dy, *ctx.saved, needs=set(names), **ctx.options)
        return None, None, *map(grads.get, names)


# As small as tells every index apart: gradcheck runs the kernels twice for every input element.
@pytest.mark.parametrize("gate", [False, True], ids=["joint", "gate"])
def test_gradcheck(gate, device):
    case = make_case(1, 2, 1, 2, 2, 2, 2, dtypes="fp64", gate=gate, p=0.2, softcap=2.0, causal=True, device=device)
    leaves = [leaf.requires_grad_() for leaf in case.inputs.leaves().values()]
    seed, threshold = seed_and_threshold(case)
    call = (None, threshold, seed)
    apply = lambda *leaves: _Attention.apply(call, case.options, *leaves)  # noqa: E731
    assert torch.autograd.gradcheck(apply, leaves, fast_mode=False)


@pytest.mark.parametrize(("T", "wide"), [(2**20, False), (2**20 + 1, True)])
def test_launches_use_64_bit_offsets(T, wide):
    """By the elements of one sequence, for the number of the sequence always has 64 bits."""
    case = make_case(1, 16, 16, 1, 1, 16, 128, dtypes="bf16")
    for name, tensor in case.inputs.leaves().items():
        setattr(case.inputs, name, torch.empty(tensor.shape, dtype=tensor.dtype, device="meta"))
    case.inputs.dy = case.inputs.query
    case.inputs.key, case.inputs.value = (
        torch.empty(32, T, 16, 128, dtype=torch.bfloat16, device="meta").transpose(1, 2) for _ in range(2)
    )
    case.inputs.query = torch.empty(32, 16, 1, 128, dtype=torch.bfloat16, device="meta")
    case.inputs.dy = case.inputs.query
    with recording(GPUTarget("cuda", 90, 32)) as launches:
        run(case)
    wides = [launch.constexprs["WIDE"] for launch in launches if "attention" in launch.kernel.fn.__name__]
    assert wides == [wide] * 4


def test_64_bit_offsets_give_the_same_bits(device, monkeypatch):
    case = make_case(2, 4, 2, 20, 30, 5, 16, dtypes="bf16", mask="bool", gate=True, p=0.1, device=device)
    narrow = run(case)
    monkeypatch.setattr(_launch, "_plans", {})
    monkeypatch.setattr(prefix_attention, "needs_int64", lambda *tensors: True)
    wide = run(case)
    assert all(torch.equal(narrow[name], wide[name]) for name in narrow)


def test_lengths_without_a_mask_share_their_kernels():
    def constexprs(T):
        query, key = (torch.empty(2, heads, T, 64, dtype=torch.bfloat16, device="meta") for heads in (4, 2))
        prefix = torch.empty(2, 16, 64, dtype=torch.bfloat16, device="meta")
        options = {"is_causal": True, "sliding_window": None, "softcap": None, "scale": 0.125}
        with recording(GPUTarget("cuda", 90, 32)) as launches:
            inputs = (query, key, key, prefix, prefix, None, None, 0, None)
            y, lse = attention_fwd(*inputs, **options)
            attention_bwd(
                query, *inputs, y, lse, needs={"query", "key", "value", "prefix_key", "prefix_value"}, **options
            )
        return [(launch.kernel, launch.constexprs) for launch in launches]

    assert constexprs(1100) == constexprs(1101) == constexprs(1104)
