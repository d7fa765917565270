"""Triton's interpreter with the arithmetic of a GPU: what is approximate or truncated there, is so here.

The interpreter computes as numpy does, which is more exact than what the kernels are compiled to: ex2.approx.f32,
div.full.f32 and sqrt.approx.f32 may be off by the bounds below, and tensor cores take float32 as three TF32 products
and truncate their sums.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

_EXP2, _DIVIDE, _SQRT = 2.0**-22, 2.0**-22, 2.0**-23
"""Relative errors that the PTX manual allows: 2**-22 and 2 ulp of a quotient, 2**-23 of a root."""
_STEP = 8
"""Features that a tensor core multiplies in TF32 at a time."""

Array = NDArray[Any]


def _off(exact: Array, bound: float, seed: int) -> Array:
    """float32 off by up to `bound`, alike for one mantissa, as tables in hardware are; powers of two are exact."""
    mantissa, _ = np.frexp(exact)
    bits = np.ascontiguousarray(mantissa).view(np.uint64) ^ np.uint64(seed * 0x632BE59BD9B4E019 & (2**64 - 1))
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    shift = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1
    shift = np.where(np.abs(mantissa) == 0.5, 0, shift)
    return (exact * (1 + shift * bound)).astype(np.float32)


def _tf32(x: Array) -> Array:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + np.uint32(0x1000)) & np.uint32(0xFFFFE000)).view(np.float32)
    return np.where(np.isfinite(x), rounded, x)


def _truncated(x: Array) -> Array:
    nearest = x.astype(np.float32)
    beyond = np.abs(nearest.astype(np.float64)) > np.abs(x)
    return np.where(beyond, np.nextafter(nearest, np.float32(0)), nearest)


def tensor_core(left: Array, right: Array, total: Array) -> Array:
    """total + left @ right of float32 by three TF32 products, every partial sum truncated to float32."""
    heads = _tf32(left), _tf32(right)
    tails = [np.nan_to_num(_tf32(x - head)) for x, head in zip((left, right), heads, strict=True)]
    for first, second in ((tails[0], heads[1]), (heads[0], tails[1]), heads):
        for start in range(0, left.shape[1], _STEP):
            columns = slice(start, start + _STEP)
            part = first[:, columns].astype(np.float64) @ second[columns].astype(np.float64)
            total = _truncated(total.astype(np.float64) + part)
    return total


@contextmanager
def gpu_arithmetic(seed: int) -> Iterator[None]:
    """Kernels interpreted in this block compute as a GPU may; the errors that are allowed to it depend on `seed`."""
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    exact_dot = InterpreterBuilder.create_dot
    originals = {name: getattr(InterpreterBuilder, name) for name in ("create_exp", "create_fdiv", "create_sqrt")}

    def approximate(name: str, exact: Any, bound: float) -> Any:
        def run(builder: Any, *handles: Any) -> Any:
            if handles[0].data.dtype != np.float32:
                return originals[name](builder, *handles)
            with np.errstate(all="ignore"):
                result = _off(exact(*(handle.data for handle in handles)), bound, seed)
            return TensorHandle(result, handles[0].dtype.scalar)

        return run

    def dot(builder: Any, left: Any, right: Any, total: Any, *options: Any) -> Any:
        if left.data.dtype != np.float32:
            return exact_dot(builder, left, right, total, *options)
        with np.errstate(all="ignore"):
            return TensorHandle(tensor_core(left.data, right.data, total.data), total.dtype.scalar)

    exp = approximate("create_exp", lambda x: np.exp2((x * np.float32(np.log2(np.e))).astype(np.float64)), _EXP2)
    divide = approximate("create_fdiv", lambda x, y: x.astype(np.float64) / y.astype(np.float64), _DIVIDE)
    root = approximate("create_sqrt", lambda x: np.sqrt(x.astype(np.float64)), _SQRT)
    with mock.patch.multiple(InterpreterBuilder, create_exp=exp, create_fdiv=divide, create_sqrt=root, create_dot=dot):
        yield
