"""Sixteen numbers at a time: the SIMD values that the Numba kernels compute with.

A :class:`Lanes` holds ``WIDTH`` numbers in vector registers. :func:`row` and :func:`set_row` move it from and to arrays
of shape (..., WIDTH), ``+ - * /`` act lane by lane, with plain numbers too, and so do :func:`exp`, :func:`softplus` and
:func:`sigmoid`. LLVM's own vectoriser is not relied on: it cannot know that the arrays of a kernel are distinct, and
guards short loops with more tests than they have work (scalar-A scan: 0.9 ns an element against 0.08).

exp is within 2 units in the last place, softplus and sigmoid within 4, right at 0, at infinities and NaN. Results
below the smallest normal number are 0: subnormal numbers slow vector units down a hundredfold.

Numba's on-disk cache watches the file of a kernel, not the files it calls: after editing this one, delete the
``*.nbi`` and ``*.nbc`` files in ``__pycache__`` beside it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import numpy as np
from llvmlite import ir
from numba import extending, njit, types
from numba.core.imputils import lower_builtin
from numba.core.typing.templates import AbstractTemplate, infer_global, signature
from numba.extending import models, overload, register_model

WIDTH = 16
#: Bytes.
CACHE_LINE = 64


def intrinsic(make: Callable[..., Any]) -> Any:
    """Numba's decorator, with a type: ``make`` takes a typing context more than the function it defines."""
    return extending.intrinsic(make)


class Lanes(types.Type):
    """The Numba type of ``WIDTH`` numbers of a floating ``dtype``."""

    def __init__(self, dtype: Any) -> None:
        self.dtype = dtype
        super().__init__(name=f"Lanes({dtype})")


@register_model(Lanes)
class _LanesModel(models.PrimitiveModel):
    def __init__(self, manager: Any, lanes: Any) -> None:
        number = manager.lookup(lanes.dtype).get_value_type()
        super().__init__(manager, lanes, ir.VectorType(number, WIDTH))


def _shuffle(builder: Any, vector: Any, places: list[int], second: Any = None) -> Any:
    """The numbers at ``places`` of ``vector``, followed by ``second`` if given."""
    mask = ir.Constant(ir.VectorType(ir.IntType(32), len(places)), places)
    return builder.shuffle_vector(vector, second or ir.Constant(vector.type, ir.Undefined), mask)


def _splat(context: Any, builder: Any, number: Any, lanes: Any) -> Any:
    vector = ir.Constant(context.get_value_type(lanes), ir.Undefined)
    first = builder.insert_element(vector, number, ir.Constant(ir.IntType(32), 0))
    return _shuffle(builder, first, [0] * WIDTH)


def _enter_arithmetic(symbol: Any, instruction: str) -> None:
    """Give Numba ``Lanes symbol Lanes``, and the same with a number of their dtype on one side."""

    @infer_global(symbol)  # type: ignore[misc]
    class _Typing(AbstractTemplate):
        def generic(self, args: Any, kws: Any) -> Any:
            lanes = next((a for a in args if isinstance(a, Lanes)), None)
            if lanes is not None and len(args) == 2 and all(a in (lanes, lanes.dtype) for a in args):
                return signature(lanes, *args)
            return None

    def lower(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        left, right = (
            value if isinstance(kind, Lanes) else _splat(context, builder, value, sig.return_type)
            for value, kind in zip(args, sig.args, strict=True)
        )
        return getattr(builder, instruction)(left, right)

    for kinds in ((Lanes, Lanes), (Lanes, types.Float), (types.Float, Lanes)):
        lower_builtin(symbol, *kinds)(lower)


for _symbol, _instruction in (
    (operator.add, "fadd"),
    (operator.sub, "fsub"),
    (operator.mul, "fmul"),
    (operator.truediv, "fdiv"),
):
    _enter_arithmetic(_symbol, _instruction)


def _address(context: Any, builder: Any, kind: Any, array: Any, place: Any) -> Any:
    """Where the WIDTH numbers from the flat index ``place`` of a C-contiguous array stand."""
    data = context.make_array(kind)(context, builder, array).data
    lanes = ir.VectorType(context.get_data_type(kind.dtype), WIDTH)
    return builder.bitcast(builder.gep(data, [place]), lanes.as_pointer())


def _times(builder: Any, index: Any, factor: int) -> Any:
    return builder.mul(index, ir.Constant(index.type, factor))


def _reader(factor: int) -> Callable[..., Any]:
    def read(typingctx: Any, array: Any, k: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            address = _address(context, builder, array, args[0], _times(builder, args[1], factor))
            return builder.load(address, align=array.dtype.bitwidth // 8)

        return Lanes(array.dtype)(array, types.intp), codegen

    return read


def _writer(factor: int) -> Callable[..., Any]:
    def write(typingctx: Any, array: Any, k: Any, value: Any) -> Any:
        def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
            address = _address(context, builder, array, args[0], _times(builder, args[1], factor))
            builder.store(args[2], address, align=array.dtype.bitwidth // 8)
            return context.get_dummy_value()

        return types.none(array, types.intp, value), codegen

    return write


#: ``row(array, k)``: row k of an array (..., WIDTH), all axes but the last counted as one.
row = intrinsic(_reader(WIDTH))
#: ``set_row(array, k, value)``: write it.
set_row = intrinsic(_writer(WIDTH))
#: ``lanes_at(array, place)``: WIDTH numbers of a C-contiguous array from the flat index ``place`` on.
lanes_at = intrinsic(_reader(1))
#: ``set_lanes_at(array, place, value)``: write them.
set_lanes_at = intrinsic(_writer(1))


@njit(error_model="numpy")
def aligned_zeros(count: Any, like: Any) -> Any:
    """``count`` zeros in the dtype of ``like``, from a cache line on: read by lanes, none then lies in two lines."""
    block = np.zeros(count + CACHE_LINE // like.itemsize, like.dtype)
    first = (-block.ctypes.data % CACHE_LINE) // like.itemsize
    return block[first : first + count]


@intrinsic
def transpose(
    typingctx: Any, source: Any, place: Any, stride: Any, target: Any, target_place: Any, target_stride: Any
) -> Any:
    """``target[target_place + k · target_stride + i] = source[place + i · stride + k]`` for i, k < WIDTH.

    Both arrays are C-contiguous, the indices flat. A butterfly: every stage swaps halves of blocks between two rows.
    """

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        align = source.dtype.bitwidth // 8

        def address(first: int, i: int) -> Any:
            kind, (array, start, step) = sig.args[first], args[first : first + 3]
            return _address(context, builder, kind, array, builder.add(start, _times(builder, step, i)))

        rows = [builder.load(address(0, i), align=align) for i in range(WIDTH)]
        block = 1
        while block < WIDTH:
            for i in range(WIDTH):
                if i & block:
                    continue
                upper, lower = rows[i], rows[i | block]
                for r, shift in ((i, 0), (i | block, block)):
                    places = [
                        (k & ~block | shift) if not k & block else WIDTH + (k & ~block | shift) for k in range(WIDTH)
                    ]
                    rows[r] = _shuffle(builder, upper, places, lower)
            block *= 2
        for k, value in enumerate(rows):
            builder.store(value, address(3, k), align=align)
        return context.get_dummy_value()

    indices = types.intp, types.intp
    return types.none(source, *indices, target, *indices), codegen


@intrinsic
def fill(typingctx: Any, number: Any) -> Any:
    """Lanes that all hold ``number``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return _splat(context, builder, args[0], sig.return_type)

    return Lanes(number)(number), codegen


@intrinsic
def total(typingctx: Any, x: Any) -> Any:
    """The sum of the lanes, halves added to halves: the same order on every machine."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        (value,) = args
        width = WIDTH
        while width > 1:
            width //= 2
            low, high = (_shuffle(builder, value, list(range(s, s + width))) for s in (0, width))
            value = builder.fadd(low, high)
        return builder.extract_element(value, ir.Constant(ir.IntType(32), 0))

    return x.dtype(x), codegen


@intrinsic
def where_less(typingctx: Any, x: Any, bound: Any, yes: Any, no: Any) -> Any:
    """In every lane ``yes`` if x < bound, else (NaN too) ``no``."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        return builder.select(builder.fcmp_ordered("<", args[0], args[1]), args[2], args[3])

    return x(x, x, x, x), codegen


@intrinsic
def _minus_abs(typingctx: Any, x: Any) -> Any:
    """``-|x|``: the sign bit set."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        number = ir.IntType(x.dtype.bitwidth)
        bits = ir.VectorType(number, WIDTH)
        sign = ir.Constant(bits, [1 << (x.dtype.bitwidth - 1)] * WIDTH)
        return builder.bitcast(builder.or_(builder.bitcast(args[0], bits), sign), args[0].type)

    return x(x), codegen


@intrinsic
def _times_power_of_two(typingctx: Any, y: Any, n: Any) -> Any:
    """``y · 2^n`` for the integers in the low bits of ``n``: added to the exponent bits of y."""

    def codegen(context: Any, builder: Any, sig: Any, args: Any) -> Any:
        bits = ir.VectorType(ir.IntType(y.dtype.bitwidth), WIDTH)
        mantissa = ir.Constant(bits, [int(np.finfo(str(y.dtype)).nmant)] * WIDTH)
        value, power = (builder.bitcast(v, bits) for v in args)
        return builder.bitcast(builder.add(value, builder.shl(power, mantissa)), args[0].type)

    return y(y, y), codegen


def exp(x: Any) -> Any:
    """``e^x`` in every lane."""
    raise NotImplementedError("for Numba kernels only")


def softplus(x: Any) -> Any:
    """``ln(1 + e^x)`` in every lane, of full relative accuracy also where it is tiny."""
    raise NotImplementedError("for Numba kernels only")


def sigmoid(x: Any) -> Any:
    """``1 / (1 + e^-x)`` in every lane."""
    raise NotImplementedError("for Numba kernels only")


def _horner(coefficients: tuple[Any, ...]) -> Any:
    """``x -> c_0 + c_1 x + c_2 x² + …``; LLVM unrolls the loop over constants."""
    degree = len(coefficients) - 1

    @njit(fastmath={"contract"})
    def polynomial(x: Any) -> Any:
        value = fill(coefficients[degree])
        for i in range(degree - 1, -1, -1):
            value = coefficients[i] + x * value
        return value

    return polynomial


def _make(
    dtype: Any,
    ends: tuple[float, float],
    ln2: tuple[float, float],
    q: tuple[float, ...],
    g: tuple[float, ...],
) -> tuple[Callable, ...]:
    """exp, softplus and sigmoid in one dtype.

    ``ends``: the first x whose exponential is a normal number, and the first whose exponential is too large.

    ``x = n ln 2 + r`` with |r| ≤ ln(2)/2, ln 2 in two parts so that n ln 2 is subtracted without rounding;
    adding 1.5 · 2^mantissa rounds to an integer and leaves n in the low bits. ``e^r = 1 + r (1 + r q(r))``.

    ``ln(1 + e) = 2 atanh(s)`` with ``s = e / (2 + e) ≤ 1/3``, and ``atanh(s) = s + s³ g(s²)``.
    """
    zero, tiny, one, two, infinity = map(dtype, (0, 1e-10, 1, 2, np.inf))
    magic, log2_e, ln2_high, ln2_low = map(dtype, (1.5 * 2.0 ** np.finfo(dtype).nmant, np.log2(np.e), *ln2))
    lowest, too_high = map(dtype, ends)
    q_of, g_of = (_horner(tuple(map(dtype, c))) for c in (q, g))

    def exponential(x: Any) -> Any:
        shifted = x * log2_e + magic
        n = shifted - magic
        r = (x - n * ln2_high) - n * ln2_low
        y = _times_power_of_two(one + r * (one + r * q_of(r)), shifted)  # no r²: it may be subnormal, and slow
        y = where_less(x, fill(lowest), fill(zero), y)
        return where_less(x, fill(too_high), y, x + infinity)  # NaN for NaN

    exponential_inner: Any = njit(fastmath={"contract"})(exponential)

    def log_one_plus_exponential(x: Any) -> Any:
        e = exponential_inner(_minus_abs(x))
        s = e / (two + e)
        t = where_less(s, fill(tiny), fill(zero), s)  # s² would be subnormal long after it has ceased to count
        w = t * t
        return where_less(x, fill(zero), fill(zero), x) + two * (s + s * w * g_of(w))

    def logistic(x: Any) -> Any:
        e = exponential_inner(_minus_abs(x))
        return where_less(x, fill(zero), e, fill(one)) / (one + e)

    return exponential, log_one_plus_exponential, logistic


# Near-minimax on the intervals above. Relative error of e^r: 8e-9 and 1.3e-17; of ln(1 + e): 4e-10 and 1.4e-19.
_FLOAT32 = _make(
    np.float32,
    (-87.33654022216797, 88.72283935546875),
    (0.693359375, -2.1219444005469058e-4),
    (0.5, 0.166665769896987757, 0.0416665546172045742, 0.00836317905272257737, 0.00139261835877134945),
    (0.333333336602637062, 0.199998531659648587, 0.142961789971514189, 0.108532879004401863, 0.116121646120116744),
)
_FLOAT64 = _make(
    np.float64,
    (-708.3964185322641, 709.7827128933841),
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


def _enter_function(stub: Callable, float32: Callable, float64: Callable) -> None:
    @overload(stub, jit_options={"fastmath": {"contract"}})
    def by_dtype(x: Any) -> Any:
        if isinstance(x, Lanes):
            return {types.float32: float32, types.float64: float64}[x.dtype]
        return None


for _implementations in zip((exp, softplus, sigmoid), _FLOAT32, _FLOAT64, strict=True):
    _enter_function(*_implementations)
