"""Device helpers that every kernel shares.

Two of them differ between a compiled kernel and Triton's interpreter, which multiplies bf16 operands as raw bits
and truncates fp32 to bf16: `dot` and `cast` then do in fp32 what the hardware does, so that the interpreter
is a faithful test of bf16 too.
"""

import triton
import triton.language as tl

INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)

# Philox4x32 passes BigCrush from 7 rounds on (Salmon et al. 2011, table 2); 10 would only cost more.
PHILOX_ROUNDS = tl.constexpr(7)

LN2 = tl.constexpr(0.6931471805599453)
LOG2E = tl.constexpr(1.4426950408889634)
LOG2E_REST = tl.constexpr(1.925963033500e-8)  # what fp32 lacks of it


@triton.jit
def swizzle(pid, rows, cols, GROUP: tl.constexpr):
    """The (row, column) of program `pid` in a grid of rows×cols tiles, GROUP rows at a time so that L2 holds both
    operands' tiles."""
    return tl.swizzle2d(pid // cols, pid % cols, rows, cols, GROUP)


@triton.constexpr_function
def _is_one(stride):
    return isinstance(stride, int) and stride == 1


@triton.jit
def offsets(index, stride, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """index · stride; `tile_ptrs` says what UNIT is."""
    if WIDE:
        index = index.to(tl.int64)
    steps = index * stride
    if UNIT > 1 and not _is_one(stride):
        steps = tl.multiple_of(steps, UNIT)
    return steps


@triton.jit
def tile_ptrs(ptr, rows, cols, stride_row, stride_col, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """Pointers to the elements (rows, cols) of a matrix.

    UNIT divides each stride that is not the literal 1. Triton itself only tells strides that are multiples of 16
    from all others; with the hint a row length of 8·odd gets 16-byte loads too.
    """
    return ptr + (offsets(rows, stride_row, UNIT, WIDE)[:, None] + offsets(cols, stride_col, UNIT, WIDE)[None, :])


@triton.jit
def load_tile(ptr, rows, cols, num_rows, num_cols, stride_row, stride_col, UNIT: tl.constexpr, WIDE: tl.constexpr):
    """The elements (rows, cols) of a matrix, zero outside of num_rows×num_cols."""
    mask = (rows < num_rows)[:, None] & (cols < num_cols)[None, :]
    return tl.load(tile_ptrs(ptr, rows, cols, stride_row, stride_col, UNIT, WIDE), mask=mask, other=0.0)


@triton.jit
def load_stats(ptr, rows, num_rows):
    """Two numbers of each row, from (2, num_rows); zero outside."""
    mask = rows < num_rows
    return tl.load(ptr + rows, mask=mask, other=0.0), tl.load(ptr + num_rows + rows, mask=mask, other=0.0)


@triton.constexpr_function
def accumulator(dtype):
    """The type in which products of `dtype` are summed."""
    return tl.float64 if dtype == tl.float64 else tl.float32


@triton.jit
def cast(x, dtype: tl.constexpr):
    """`x` in another type, rounded to nearest even."""
    if INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
        x = tl.where(x == x, bits.to(tl.float32, bitcast=True), x)
    return x.to(dtype)


@triton.jit
def _dot(a, b, acc, PRECISION: tl.constexpr):
    if INTERPRETED and a.dtype == tl.bfloat16:
        a = a.to(tl.float32)
        b = b.to(tl.float32)
    return tl.dot(a, b, acc, input_precision=PRECISION, out_dtype=acc.dtype)


@triton.jit
def normalized(x):
    """(x / 2^e, 2^e) with 2^e <= max|x| < 2^(e+1) over what is finite, at most e = 126, for fp32 x; exact.

    fp16 overflows at 65520 and thins out below 2^-14: a normalized tile has its full precision. Above 2^126 the inverse
    would be no normal number. What is not finite stays so, and leaves the rest of the tile as it is.
    """
    size = tl.abs(x)
    largest = tl.max(tl.where(size < float("inf"), size, 0.0))
    exponent = tl.minimum(largest.to(tl.uint32, bitcast=True) & 0x7F800000, 0x7E800000)
    inverse = 0x7F000000 - exponent
    return x * inverse.to(tl.float32, bitcast=True), exponent.to(tl.float32, bitcast=True)


@triton.jit
def _terms(x):
    """fp32 x as the sum of three bf16 tiles."""
    hi = cast(x, tl.bfloat16)
    x -= hi.to(tl.float32)
    mid = cast(x, tl.bfloat16)
    return hi, mid, cast(x - mid.to(tl.float32), tl.bfloat16)


@triton.jit
def dot(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b, with `acc` in fp32 (fp64 for fp64 operands).

    A 16-bit `a` stays as it is against a fp32 `b`, which is split into three 16-bit terms: a b = a hi + a mid + a lo to
    fp32's accuracy, on 16-bit tensor cores. In fp16 the residuals would underflow, so they are held 2^11 and 2^22
    times too large, which is exact.

    What is to have fp32's accuracy is summed apart and added to `acc` once: a single chain of K sums would round as
    often as it is long, and tensor cores truncate. Beside a constant zero Triton would make one chain of it again.
    """
    zero = tl.where(acc == acc, 0.0, acc)
    if a.dtype != b.dtype:
        if a.dtype == tl.bfloat16:
            hi, mid, lo = _terms(b)
            acc += _dot(a, hi, _dot(a, mid, _dot(a, lo, zero, PRECISION), PRECISION), PRECISION)
        else:
            b, scale = normalized(b)
            hi = b.to(tl.float16)
            b = (b - hi.to(tl.float32)) * 2048.0
            mid = b.to(tl.float16)
            lo = ((b - mid.to(tl.float32)) * 2048.0).to(tl.float16)
            residual = _dot(a, mid, zero, PRECISION) + _dot(a, lo, zero, PRECISION) * (1 / 2048)
            acc += (_dot(a, hi, zero, PRECISION) + residual * (1 / 2048)) * scale
    elif a.dtype == tl.float32:
        acc += _dot(a, b, zero, PRECISION)
    else:
        acc = _dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def dot_split(a, b, acc, PRECISION: tl.constexpr):
    """acc + a b to fp32's accuracy for a fp32 `b`, on 16-bit tensor cores whether `a` has 16 bits or is fp32 too.

    Two fp32 operands are both split into three bf16 terms, which reach as far as fp32 does; the products of terms
    that lie below 2^-24 of the whole are left out.
    """
    if a.dtype == tl.float32:
        a_hi, a_mid, a_lo = _terms(a)
        b_hi, b_mid, b_lo = _terms(b)
        part = _dot(a_lo, b_hi, tl.zeros_like(acc), PRECISION)
        part = _dot(a_hi, b_lo, _dot(a_mid, b_mid, part, PRECISION), PRECISION)
        acc += _dot(a_hi, b_hi, _dot(a_hi, b_mid, _dot(a_mid, b_hi, part, PRECISION), PRECISION), PRECISION)
    else:
        acc = dot(a, b, acc, PRECISION)
    return acc


@triton.jit
def dot_rounded(a, b, acc, DTYPE: tl.constexpr, PRECISION: tl.constexpr):
    """acc + a b with both operands rounded to DTYPE: to its precision, whatever their range."""
    if tl.float16 == DTYPE and a.dtype == tl.float32:
        a, scale = normalized(a)
        acc += dot_rounded(a.to(tl.float16), b, tl.zeros_like(acc), DTYPE, PRECISION) * scale
    elif tl.float16 == DTYPE and b.dtype == tl.float32:
        b, scale = normalized(b)
        acc += _dot(a, b.to(tl.float16), tl.zeros_like(acc), PRECISION) * scale
    else:
        acc = dot(cast(a, DTYPE), cast(b, DTYPE), acc, PRECISION)
    return acc


@triton.jit
def exp(x):
    """e^x, in fp32 as exact as torch's: tl.exp rounds x · log2(e) before it takes the power of 2."""
    if x.dtype != tl.float32 or INTERPRETED:
        power = tl.exp(x)
    else:
        exponent = x * LOG2E
        rest = tl.fma(x, tl.full(x.shape, LOG2E, tl.float32), -exponent) + x * LOG2E_REST
        power = tl.exp2(exponent)
        power = tl.where(tl.abs(exponent) < 128, power + power * (rest * LN2), power)  # elsewhere 0 or not finite
    return power


@triton.jit
def keep_rows(seed_ptr, threshold, rows, col, ROWS: tl.constexpr, COLS: tl.constexpr, STREAM: tl.constexpr):
    """The dropout mask of ROWS×COLS elements, `rows` of a matrix from `col` on, True where one is kept.

    32 divides col and COLS. Element (row, col) owns a 16-bit word that depends on the seed, its own position and
    STREAM alone, not on the tile, and is kept if word >= threshold. One Philox call gives the words of eight columns:
    call 4b + t of a row has columns 32b + 8j + 2t + e, half e of its word j, for j < 4 and e < 2. Those are the columns
    that one thread holds in a tensor-core accumulator, so a mask on an accumulator needs no exchange between threads.
    """
    calls = col // 8 + tl.arange(0, COLS // 8)[None, :]
    w0, w1, w2, w3 = tl.philox(tl.load(seed_ptr), calls, rows[:, None], STREAM, 0, PHILOX_ROUNDS)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    words = words.reshape(ROWS, COLS // 32, 4, 2, 2).permute(0, 1, 4, 3, 2)  # row, b, j // 2, j % 2, t
    words = words.reshape(ROWS, COLS // 2)
    # Shifted to the top of the word, both halves compare without being extracted.
    cutoff = threshold.to(tl.uint32) << 16
    return tl.join((words << 16) >= cutoff, words >= cutoff).reshape(ROWS, COLS)


@triton.jit
def keep_mask(seed_ptr, threshold, row, col, ROWS: tl.constexpr, COLS: tl.constexpr):
    """`keep_rows` of the ROWS×COLS tile at (row, col)."""
    return keep_rows(seed_ptr, threshold, row + tl.arange(0, ROWS), col, ROWS, COLS, 0)


@triton.jit
def keep_scale(threshold, DTYPE: tl.constexpr):
    """1 / (1 - p) for p = threshold / 2^16."""
    return tl.full((), 65536, DTYPE) / (65536 - threshold).to(DTYPE)
