"""torch.compile over the transforms of torch.func: what they give uncompiled."""

import functools

import pytest
import torch
from torch.func import grad, hessian, jvp, vmap

import peft_fast
from peft_fast.ops import bottleneck_adapter, lora_linear, prefix_attention

SEED = torch.tensor([3])


def _made(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


WEIGHT, LORA_B, UP_WEIGHT, PREFIX_VALUE = (
    _made(5, 6, seed=1),
    _made(5, 2, seed=2),
    _made(6, 2, seed=1),
    _made(2, 3, 6, seed=1),
)


def lora(lora_a, x):
    return lora_linear(x, WEIGHT, lora_a, LORA_B, dropout_p=0.3, seed=SEED)


def adapter(down_weight, x):
    return bottleneck_adapter(x, down_weight, UP_WEIGHT, activation="gelu", dropout_p=0.3, seed=SEED)


def prefix(prefix_key, x):
    key = x[:, None].expand(2, 2, 4, 6)
    prefix_key = prefix_key[:, None].expand(2, 3, 6)
    return prefix_attention(key, key, key, prefix_key, PREFIX_VALUE, dropout_p=0.3, seed=SEED)


TRANSFORMS = {
    "grad": lambda loss, a, x: grad(loss, argnums=(0, 1))(a, x),
    "jvp": lambda loss, a, x: jvp(lambda a: loss(a, x), (a,), (torch.ones_like(a),)),
    "hessian": lambda loss, a, x: hessian(loss)(a, x),
    "gradients of each sample": lambda loss, a, x: vmap(grad(loss), (None, 0))(a, torch.stack([x, 2 * x])),
}


# torch's own decompositions for jvp are TorchScript.
@pytest.mark.filterwarnings("ignore:.torch.jit.script:DeprecationWarning")
@pytest.mark.parametrize("transform", TRANSFORMS)
@pytest.mark.parametrize("op", [lora, adapter, prefix], ids=lambda op: op.__name__)
@pytest.mark.parametrize("backend", ["eager", "triton"])
def test_compiled_as_uncompiled(backend, op, transform):
    torch._dynamo.reset()

    def loss(a, x):
        return op(a, x).sin().sum()

    a, x = _made(2, 6, seed=4), _made(2, 4, 6, seed=5)
    call = functools.partial(TRANSFORMS[transform], loss)
    with peft_fast.backend(backend):
        expected = call(a, x)
        compiled = torch.compile(call, backend="aot_eager", fullgraph=True)(a, x)
    torch.testing.assert_close(compiled, expected)
    assert any(bool(part.abs().sum()) for part in torch.utils._pytree.tree_leaves(expected))
