"""Activations and their derivatives on fp32 or fp64 tiles; all of them are 0 at 0."""

import triton
import triton.language as tl

from ._tl import exp

# F.leaky_relu's default.
LEAKY_SLOPE = tl.constexpr(0.01)
SQRT_1_2 = tl.constexpr(0.5**0.5)
SQRT_2_PI = tl.constexpr((2 / 3.141592653589793) ** 0.5)
SQRT_1_2PI = tl.constexpr((0.5 / 3.141592653589793) ** 0.5)


@triton.jit
def _tanh(u):
    """(1 - e) / (1 + e) with e = exp(-2|u|), and near 0, where that cancels, its series."""
    near: tl.constexpr = 0.01 if u.dtype == tl.float64 else 0.25
    e = exp(-2 * tl.abs(u))
    far = (1 - e) / (1 + e)
    square = u * u
    series = u * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
    return tl.where(tl.abs(u) < near, series, tl.where(u < 0, -far, far))


@triton.jit
def _tanh_slope(u):
    """1 - tanh² = 4e / (1 + e)², where the difference would cancel."""
    e = exp(-2 * tl.abs(u))
    return 4 * e / ((1 + e) * (1 + e))


@triton.jit
def _sigmoid(u):
    return 1 / (1 + exp(-u))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """act(z)."""
    if ACTIVATION == "relu":
        z = tl.where(z < 0, 0.0, z)
    elif ACTIVATION == "gelu":
        z = 0.5 * z * (1 + tl.erf(z * SQRT_1_2))
    elif ACTIVATION == "gelu_new":
        z = 0.5 * z * (1 + _tanh((z + 0.044715 * z * z * z) * SQRT_2_PI))
    elif ACTIVATION == "silu":
        z = z * _sigmoid(z)
    elif ACTIVATION == "tanh":
        z = _tanh(z)
    elif ACTIVATION == "leaky_relu":
        z = tl.where(z > 0, z, z * LEAKY_SLOPE)
    else:
        tl.static_assert(ACTIVATION == "identity")
    return z


@triton.jit
def activation_grad(z, ACTIVATION: tl.constexpr):
    """act'(z), as torch has it where it jumps."""
    if ACTIVATION == "relu":
        slope = tl.where(z > 0, 1.0, 0.0).to(z.dtype)
    elif ACTIVATION == "gelu":
        slope = 0.5 * (1 + tl.erf(z * SQRT_1_2)) + z * SQRT_1_2PI * exp(-0.5 * z * z)
    elif ACTIVATION == "gelu_new":
        u = (z + 0.044715 * z * z * z) * SQRT_2_PI
        slope = 0.5 * (1 + _tanh(u)) + 0.5 * z * _tanh_slope(u) * SQRT_2_PI * (1 + 3 * 0.044715 * z * z)
    elif ACTIVATION == "silu":
        s = _sigmoid(z)
        slope = s * (1 + z * (1 - s))
    elif ACTIVATION == "tanh":
        slope = _tanh_slope(z)
    elif ACTIVATION == "leaky_relu":
        one = tl.full(z.shape, 1.0, z.dtype)
        slope = tl.where(z > 0, one, one * LEAKY_SLOPE)
    else:
        tl.static_assert(ACTIVATION == "identity")
        slope = tl.full(z.shape, 1.0, z.dtype)
    return slope
