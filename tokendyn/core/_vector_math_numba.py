"""exp, softplus and the logistic function for Numba kernels, in a form that LLVM turns into SIMD code.

libm's exp is one call a number. These are straight lines of arithmetic, in float32 or float64 as their argument is,
so that a loop over a tile of channels becomes vector instructions. They are right at 0, at infinities and NaN; results
below the smallest normal number are 0 (subnormal numbers would slow the SIMD units down a hundredfold).

Numba's on-disk cache watches the file of a kernel, not the files it calls: after editing this one, delete the
``*.nbi`` and ``*.nbc`` files in ``__pycache__`` beside it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic, overload


def exp(x: Any) -> Any:
    """``e^x``, within 2 units in the last place."""
    raise NotImplementedError("for Numba kernels only")


def softplus(x: Any) -> Any:
    """``ln(1 + e^x)``, within 4 units in the last place, also where it is tiny."""
    raise NotImplementedError("for Numba kernels only")


def sigmoid(x: Any) -> Any:
    """``1 / (1 + e^-x)``, within 4 units in the last place."""
    raise NotImplementedError("for Numba kernels only")


@intrinsic
def _times_power_of_two(typingctx: Any, y: Any, magic: Any) -> Any:
    """``y · 2^n`` for the integer n in the low bits of ``magic``: added to the exponent bits of y."""
    integer = ir.IntType(y.bitwidth)
    mantissa = ir.Constant(integer, np.finfo(str(y)).nmant)

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:
        bits, n = (builder.bitcast(value, integer) for value in args)
        scaled = builder.add(bits, builder.shl(n, mantissa))
        return builder.bitcast(scaled, context.get_value_type(y))

    return y(y, magic), codegen


def _horner(coefficients: tuple[Any, ...]) -> Any:
    """``x -> c_0 + c_1 x + c_2 x² + …``; LLVM unrolls the loop over constants."""
    degree = len(coefficients) - 1

    @njit(fastmath={"contract"})
    def polynomial(x: Any) -> Any:
        value = coefficients[degree]
        for i in range(degree - 1, -1, -1):
            value = coefficients[i] + x * value
        return value

    return polynomial


def _make(dtype: Any, ln2: tuple[float, float], q: tuple[float, ...], g: tuple[float, ...]) -> tuple[Callable, ...]:
    """exp, softplus and the logistic function in one dtype.

    ``x = n ln 2 + r`` with |r| ≤ ln(2)/2, ln 2 in two parts so that n ln 2 is subtracted without rounding;
    adding 1.5 · 2^mantissa rounds to an integer and leaves n in the low bits. ``e^r = 1 + r + r² q(r)``.

    ``ln(1 + e) = 2 atanh(s)`` with ``s = e / (2 + e) ≤ 1/3``, and ``atanh(s) = s + s³ g(s²)``.
    """
    limits = np.finfo(dtype)
    zero, one, two, infinity = dtype(0), dtype(1), dtype(2), dtype(np.inf)
    magic, log2_e, ln2_high, ln2_low = map(dtype, (1.5 * 2.0**limits.nmant, np.log2(np.e), *ln2))
    lowest, highest = (dtype(np.log(np.float64(bound))) for bound in (limits.smallest_normal, limits.max))
    q_of, g_of = (_horner(tuple(map(dtype, c))) for c in (q, g))

    def exponential(x: Any) -> Any:
        shifted = x * log2_e + magic
        n = shifted - magic
        r = (x - n * ln2_high) - n * ln2_low
        y = _times_power_of_two(one + (r + r * r * q_of(r)), shifted)
        y = zero if x < lowest else y
        return y if x <= highest else x + infinity  # infinity; NaN for NaN

    exponential_compiled = njit(fastmath={"contract"})(exponential)

    def log_one_plus_exponential(x: Any) -> Any:
        e = exponential_compiled(-abs(x))
        s = e / (two + e)
        w = s * s
        return (x if x > zero else zero) + two * (s + s * w * g_of(w))

    def logistic(x: Any) -> Any:
        e = exponential_compiled(-abs(x))
        return (one if x >= zero else e) / (one + e)

    return exponential, log_one_plus_exponential, logistic


# Near-minimax on the intervals above. Relative error of e^r: 8e-9 and 1.3e-17; of ln(1 + e): 4e-10 and 1.4e-19.
_FLOAT32 = _make(
    np.float32,
    (0.693359375, -2.1219444005469058e-4),
    (0.5, 0.166665769896987757, 0.0416665546172045742, 0.00836317905272257737, 0.00139261835877134945),
    (0.333333336602637062, 0.199998531659648587, 0.142961789971514189, 0.108532879004401863, 0.116121646120116744),
)
_FLOAT64 = _make(
    np.float64,
    (0.6931471803691238, 1.9082149292705878e-10),
    (
        0.500000000000000102,
        0.166666666666666675,
        0.0416666666666241279,
        0.00833333333333006183,
        0.00138888889172137169,
        1.98412698630536169e-4,
        2.48015212959543751e-5,
        2.75572684599970648e-6,
        2.76200884454097482e-7,
        2.51003854955103191e-8,
    ),
    (
        0.333333333333333334,
        0.199999999999997613,
        0.142857142858000496,
        0.111111110991183853,
        0.0909090994898135719,
        0.0769227198243027464,
        0.0666758931572462792,
        0.0586713953065159873,
        0.0542258919744000741,
        0.0374607189777538365,
        0.0781528890046142522,
    ),
)


def _enter(stub: Callable, float32: Callable, float64: Callable) -> None:
    @overload(stub, jit_options={"fastmath": {"contract"}})
    def by_dtype(x: Any) -> Any:
        return {types.float32: float32, types.float64: float64}.get(x)


for _implementations in zip((exp, softplus, sigmoid), _FLOAT32, _FLOAT64, strict=True):
    _enter(*_implementations)
