"""Attention dropout of the base model: on the CPU, patched attention modules draw their masks from a seed."""

import copy
import math
import pickle
import warnings
from contextlib import nullcontext

import families
import pytest
import torch
import torch.nn.functional as F
from peft import LoraConfig, get_peft_model
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers import AttentionInterface, BertForSequenceClassification
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import peft_fast
from models import fill_lora_b, loss_and_gradients
from peft_fast import PrefixConfig, eager, patch_attention, reference, support
from peft_fast.methods.prefix_interface import dispatches
from peft_fast.ops.attention_dropout import apply_attention_dropout
from peft_fast.patch import Dropout
from peft_fast.testing import assert_within_budget, saved_bytes

P = 0.25
THRESHOLD = reference.drop_threshold(P)


@pytest.fixture(autouse=True)
def _as_on_a_cpu_where_it_gains(monkeypatch):
    monkeypatch.setattr(support, "draws_one_by_one", lambda: True)
    monkeypatch.setattr(support, "MIN_CPU_MODULE_ELEMENTS", 1)


def inputs(Z=2, H=3, S=20, T=28, DH=16, dtype=torch.float32):
    """Query, key and value as projections split into heads, an additive mask, and dy."""
    draw = torch.Generator().manual_seed(0)
    query, key, value, dy = (
        torch.randn(Z, length, H, DH, generator=draw, dtype=torch.float64).to(dtype).transpose(1, 2)
        for length in (S, T, T, S)
    )
    hidden = torch.rand(Z, 1, S, T, generator=draw) < 0.3
    hidden[..., 0] = False
    return query, key, value, torch.zeros(hidden.shape, dtype=dtype).masked_fill(hidden, -torch.inf), dy


def usual(query, key, value, bias, mask):
    p = torch.softmax(query @ key.mT / query.shape[-1] ** 0.5 + (0 if bias is None else bias), -1)
    return (p * mask * reference.keep_scale(THRESHOLD)) @ value


def values_and_gradients(attention, query, key, value, dy):
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    y = attention(*leaves)
    return [y.detach(), *torch.autograd.grad(y, leaves, dy)]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("shape", [{}, {"S": 1}, {"Z": 12, "H": 12, "S": 70, "T": 70}], ids=["", "one", "blocks"])
def test_values_and_gradients(shape, masked, dtype):
    query, key, value, bias, dy = inputs(**shape, dtype=dtype)
    bias, seed = bias if masked else None, torch.tensor([3])
    Z, H, S, DH = query.shape
    mask = eager.dropout_mask(seed, (Z * H * S, key.shape[2]), THRESHOLD).view(Z, H, S, -1)
    actual = values_and_gradients(
        lambda *qkv: apply_attention_dropout(*qkv, bias, DH**-0.5, THRESHOLD, seed), query, key, value, dy
    )
    expected = values_and_gradients(lambda *qkv: usual(*qkv, bias, mask), query, key, value, dy)
    wide = None if bias is None else bias.double()
    truth = values_and_gradients(
        lambda *qkv: usual(*qkv, wide, mask), *(tensor.double() for tensor in (query, key, value, dy))
    )
    for name, *tensors in zip(("y", "dq", "dk", "dv"), actual, truth, expected, strict=True):
        assert_within_budget(*tensors, length=max(S, key.shape[2], DH), name=name)
    assert abs((~mask).double().mean() - P) < 5 * (P * (1 - P) / mask.numel()) ** 0.5


def test_backward_inside_autocast():
    # On its own dtype's terms, as torch's attention, whose backward does not ask autocast.
    query, key, value, bias, dy = inputs()
    results = []
    for inside in (False, True):
        leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
        y = apply_attention_dropout(*leaves, bias, 0.25, THRESHOLD, torch.tensor([3]))
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            results.append(torch.autograd.grad(y, leaves, dy))
    assert all(torch.equal(*pair) for pair in zip(*results, strict=True))


def test_backward_under_vmap():
    query, key, value, bias, dy = inputs()
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    y = apply_attention_dropout(*leaves, bias, 0.25, THRESHOLD, torch.tensor([3]))
    batched = torch.vmap(lambda dy: torch.autograd.grad(y, leaves, dy, retain_graph=True))(torch.stack([dy, 2 * dy]))
    for both, one in zip(batched, torch.autograd.grad(y, leaves, dy), strict=True):
        assert torch.allclose(both, torch.stack([one, 2 * one]), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("needed", ["query", "key", "value"])
def test_only_the_gradients_that_are_needed(needed):
    query, key, value, bias, dy = inputs()
    tensors = {"query": query, "key": key, "value": value}
    alone = {name: tensor.detach().requires_grad_(name == needed) for name, tensor in tensors.items()}
    together = {name: tensor.detach().requires_grad_() for name, tensor in tensors.items()}
    for leaves in (alone, together):
        apply_attention_dropout(*leaves.values(), bias, 0.25, THRESHOLD, torch.tensor([3])).backward(dy)
    assert torch.equal(alone[needed].grad, together[needed].grad)
    assert all(leaf.grad is None for name, leaf in alone.items() if name != needed)


def test_first_second_and_batched_gradients():
    query, key, value, bias, _ = inputs(Z=1, H=2, S=3, T=4, DH=2, dtype=torch.float64)
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]

    def attention(*qkv):
        return apply_attention_dropout(*qkv, bias, 0.5, THRESHOLD, torch.tensor([7]))

    assert torch.autograd.gradcheck(attention, leaves, check_batched_grad=True)
    assert torch.autograd.gradgradcheck(attention, leaves)
    # An input that is a function of another must not run on through its history.
    query, *others = leaves
    assert torch.autograd.gradgradcheck(
        lambda query: attention(query, query.sum(2, keepdim=True) * others[0], others[1]), query
    )


def test_keeps_one_matrix_of_probabilities():
    query, key, value, bias, _ = inputs()
    leaves = [tensor.detach().requires_grad_() for tensor in (query, key, value)]
    kept = saved_bytes(lambda: apply_attention_dropout(*leaves, bias, 0.25, THRESHOLD), [*leaves, bias])
    assert kept == 4 * query.shape[:3].numel() * key.shape[2] + 8


def classifier(family="bert", attention_dropout=0.1):
    """A LoRA model of a family in training whose attention drops."""
    base = families.build(family)
    for module in base.modules():
        if dispatches(module):
            module.config.attention_dropout = attention_dropout
            for name in dir(module):
                if "dropout" in name and isinstance(value := getattr(module, name), float):
                    setattr(module, name, attention_dropout)
                elif "dropout" in name and isinstance(value, torch.nn.Dropout):
                    value.p = attention_dropout
    config = LoraConfig(r=4, target_modules="all-linear", fan_in_fan_out=family == "gpt2")
    return fill_lora_b(get_peft_model(base, config)).train()


def attention_modules(model):
    return [module for module in model.modules() if dispatches(module)]


@pytest.fixture
def calls(monkeypatch):
    """The queries' shapes of the calls that run here."""
    shapes = []

    def apply(query, *args):
        shapes.append(tuple(query.shape))
        return apply_attention_dropout(query, *args)

    monkeypatch.setattr(patch_attention, "apply_attention_dropout", apply)
    return shapes


@pytest.fixture
def nothing_dropped(monkeypatch):
    monkeypatch.setattr(F, "dropout", lambda input, *args, **kwargs: input)
    monkeypatch.setattr(support, "fusable_dropout", lambda *args: 0)
    monkeypatch.setattr(
        eager.attention_dropout,
        "dropped_blocks",
        lambda seed, shape, threshold: [
            (slice(None), eager.dropout_numpy.Dropped(torch.ones(math.prod(shape), dtype=torch.int8)))
        ],
    )
    monkeypatch.setattr(eager.attention_dropout, "keep_scale", lambda threshold: 1.0)


@pytest.mark.parametrize(
    ("family", "expected"),
    [
        ("bert", 2),
        ("roberta", 2),
        ("distilbert", 2),
        ("electra", 2),
        ("albert", 2),
        ("modernbert", 2),
        ("vit", 2),
        ("gpt2", 2),
        ("opt", 2),
        ("bart", 6),
        ("llama", 0),  # grouped heads
        ("t5", 0),  # a position bias
    ],
)
def test_every_family_computes_as_before(family, expected, calls, nothing_dropped):
    stock = classifier(family).double()
    patched = copy.deepcopy(stock)
    peft_fast.patch(patched)
    inputs = families.batch(family)
    inputs = {name: value.double() if value.is_floating_point() else value for name, value in inputs.items()}
    actual = loss_and_gradients(patched, inputs)
    assert len(calls) == expected
    if expected:
        for name, truth in loss_and_gradients(stock.eval(), inputs).items():
            assert_within_budget(actual[name], truth, truth, length=128, name=name)


def patched_model(**kwargs):
    model = classifier(**kwargs)
    peft_fast.patch(model)
    return model


def test_patch_and_its_undo():
    model = classifier()
    before = copy.deepcopy(vars(model.config))
    report = peft_fast.patch(model)
    modules = attention_modules(model)
    assert len(modules) == 2
    assert all(map(patch_attention.is_used, modules))
    assert vars(model.config) == before
    assert report.dropouts == sum(isinstance(module, Dropout) for module in model.modules())
    assert str(peft_fast.patch(model)) == str(report)  # once is enough
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert str(peft_fast.report(other)) == str(report)
    peft_fast.unpatch(model)
    assert not any("peft_fast" in name for module in modules for name in vars(module))


def test_verify_leaves_the_marks():
    model = patched_model()
    model.base_model.model.set_attn_implementation("eager")
    peft_fast.verify(model, families.batch("bert"), steps=1)
    assert all(map(patch_attention.is_swapped, attention_modules(model)))


@pytest.fixture
def own_attention(monkeypatch):
    """A user's attention function under transformers' name."""

    def attention(*args, **kwargs):
        seen.append(args)
        return sdpa_attention_forward(*args, **kwargs)

    seen = []
    monkeypatch.setitem(AttentionInterface._global_mapping, "sdpa", attention)
    return seen


def test_a_users_function_keeps_its_say(own_attention, calls):
    model = patched_model()
    assert not any(map(patch_attention.is_swapped, attention_modules(model)))
    model(**families.batch("bert"))
    assert len(own_attention) == 2
    assert not calls


def test_a_users_function_registered_later_takes_over(request, calls):
    model = patched_model()
    seen = request.getfixturevalue("own_attention")
    model(**families.batch("bert"))
    assert len(seen) == 2
    assert not calls
    assert not any(map(patch_attention.is_used, attention_modules(model)))


def test_modules_of_other_kinds_are_passed_by():
    class Attention(torch.nn.Module):
        def forward(self, x):
            return ALL_ATTENTION_FUNCTIONS and x

    model = classifier()
    model.other = Attention()  # without a config
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model.scripted = torch.jit.script(torch.nn.Linear(2, 2))
    peft_fast.patch(model)
    peft_fast.unpatch(model)


def test_attention_whose_dropout_is_a_number_counts():
    model = classifier("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert peft_fast.patch(model).dropouts == 0  # GPT-2's is a module, and takes p from it
    bart = classifier("bart")
    assert peft_fast.patch(bart).dropouts == len(attention_modules(bart)) == 6


def test_other_models_stay_stock(calls):
    base = families.build("bert")
    other = BertForSequenceClassification(base.config).train()
    model = get_peft_model(base, LoraConfig(r=4, target_modules="all-linear"))
    peft_fast.patch(model)
    other(**families.batch("bert")).loss.backward()
    assert not calls
    model.train()(**families.batch("bert")).loss.backward()
    assert len(calls) == 2


def test_another_implementation_chosen_later_is_taken(calls):
    model = patched_model()
    for implementation, fast in ("eager", 0), ("sdpa", 2):
        model.base_model.model.set_attn_implementation(implementation)
        model(**families.batch("bert"))
        assert len(calls) == fast
        assert sum(map(patch_attention.is_used, attention_modules(model))) == fast


def test_a_model_patched_in_another_process_is_taken_again(calls):
    model = patched_model()
    AttentionInterface.register("sdpa", sdpa_attention_forward)  # as it is there
    model(**families.batch("bert"))
    assert not calls
    peft_fast.patch(model)
    model(**families.batch("bert"))
    assert calls


def test_models_without_attention_dropout_are_left_alone():
    model = classifier(attention_dropout=0.0)
    model.config.attention_probs_dropout_prob = 0.0
    peft_fast.patch(model)
    assert not any(map(patch_attention.is_swapped, attention_modules(model)))


def test_prefixes_keep_their_own_function(calls):
    model = get_peft_model(families.build("bert"), PrefixConfig(num_virtual_tokens=3, task_type="SEQ_CLS"))
    peft_fast.patch(model)
    model.train()(**families.batch("bert"))
    assert not calls
    with model.disable_adapter():
        model(**families.batch("bert"))
    assert len(calls) == 2


def test_attention_weights_that_are_not_asked_for(calls):
    # As Whisper and others pass it on.
    query, key, value, _, _ = inputs(S=6, T=6)
    module = attention_modules(patched_model())[0]
    AttentionInterface()["sdpa"](module, query, key, value, None, dropout=0.1, output_attentions=False)
    assert len(calls) == 1


def _causal(tensors):
    """Fewer queries than keys, and no mask."""
    return [tensors[0][:, :, :4], *tensors[1:3], None]


@pytest.mark.parametrize(
    "change",
    [
        lambda tensors, kwargs: tensors.__setitem__(3, torch.zeros(2, 1, 6, 6)),  # an additive mask may need a gradient
        lambda tensors, kwargs: tensors.__setitem__(3, torch.ones(6, 6, dtype=torch.bool)),
        lambda tensors, kwargs: tensors.__setitem__(slice(1, 3), [tensor[:, :1] for tensor in tensors[1:3]]),
        lambda tensors, kwargs: tensors.__setitem__(slice(0, 3), [tensor.bfloat16() for tensor in tensors[:3]]),
        lambda tensors, kwargs: tensors[3][1, :, 2:4].fill_(False),
        lambda tensors, kwargs: kwargs.update(dropout=0.0),
        lambda tensors, kwargs: kwargs.update(position_bias=torch.zeros(1, 3, 6, 6)),
        lambda tensors, kwargs: kwargs.update(is_causal=True) or tensors.__setitem__(slice(0, 4), _causal(tensors)),
    ],
    ids=[
        "float mask",
        "flat mask",
        "one head of keys",
        "bfloat16",
        "sees nothing",
        "no dropout",
        "position bias",
        "causal",
    ],
)
def test_other_calls_are_stocks(change, calls):
    query, key, value, _, _ = inputs(S=6, T=6)
    tensors, kwargs = [query, key, value, torch.ones(2, 1, 6, 6, dtype=torch.bool)], {"dropout": 0.1}
    change(tensors, kwargs)
    module = attention_modules(patched_model())[0]
    results = []
    for attention in (AttentionInterface()["sdpa"], sdpa_attention_forward):
        torch.manual_seed(1)
        results.append(attention(module, *tensors, scaling=0.25, **kwargs)[0])
    assert torch.equal(*results)
    assert not calls


@pytest.mark.parametrize("watched", ["nothing", "forward", "backward"])
@pytest.mark.parametrize("use_reentrant", [True, False], ids=["reentrant", "non-reentrant"])
def test_checkpointing_draws_the_same_mask(use_reentrant, watched, calls):
    module = attention_modules(patched_model())[0]
    query, key, value, _, _ = inputs(S=64, T=64)
    value = value.detach().requires_grad_()
    mask = torch.ones(2, 1, 64, 64, dtype=torch.bool)
    attention = AttentionInterface()["sdpa"]
    with FlopCounterMode(display=False) if watched == "forward" else nullcontext():
        y = checkpoint(
            lambda v: attention(module, query, key, v, mask, 0.5)[0] * 1.0, value, use_reentrant=use_reentrant
        )
    with FlopCounterMode(display=False) if watched == "backward" else nullcontext():
        y.backward(y.detach())
    assert len(calls) == 2
    # Σ y² = <v, dv> for what is linear in v.
    assert (value * value.grad).sum().item() == pytest.approx(y.square().sum().item(), rel=1e-4)


def test_calls_that_are_watched_or_transformed(calls):
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.fx.experimental.proxy_tensor import make_fx

    module = attention_modules(patched_model())[0]
    query, key, value, _, _ = inputs()
    mask = torch.ones(2, 1, 20, 28, dtype=torch.bool)

    def attention(query, key, value):
        return AttentionInterface()["sdpa"](module, query, key, value, mask, dropout=0.1)[0]

    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        assert attention(*map(mode.from_tensor, (query, key, value))).shape == (2, 20, 3, 16)
    make_fx(attention)(query, key, value)
    torch.func.grad(lambda q: attention(q, key, value).sum())(query)
    assert not calls
    with FlopCounterMode(display=False):
        attention(query, key, value)
    assert len(calls) == 1
