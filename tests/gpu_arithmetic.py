"""Triton's interpreter with the arithmetic of a GPU: what is approximate or truncated there, is so here.

The interpreter computes as numpy does, which is more exact than what kernels are compiled to. Their instructions may be
off by what the manual of PTX (NVIDIA, PTX ISA 9.1, section 9.7.3, "Floating Point Instructions") allows:

    tl.exp    ex2.approx.f32 of x log2(e)    2 units in the last place of the correctly rounded result
    a / b     div.full.f32                   2 units in the last place
    tl.sqrt   sqrt.approx.f32                relative 2**-23
    tl.rsqrt  rsqrt.approx.f32               relative 2**-22.9
    tl.log    no lg2.approx, but libdevice's logf: 1 unit in the last place (CUDA C++ Programming Guide, "Mathematical
              Functions"); that it stays so is a test of the compiled kernels

`div_rn`, `sqrt_rn`, sums and products round correctly. Tensor cores take float32 as three TF32 products and truncate
their sums.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import numpy as np
from numpy.typing import NDArray

_STEP = 8
"""Features that a tensor core multiplies in TF32 at a time."""

Array = NDArray[Any]

_seed: int | None = None


def is_on() -> bool:
    return _seed is not None


def _noise(exact: Array, seed: int) -> Array:
    """Values in [-1, 1], alike for one mantissa, as tables in hardware are; 0 for powers of two, which are exact."""
    mantissa, _ = np.frexp(exact)
    bits = np.ascontiguousarray(mantissa).view(np.uint64) ^ np.uint64(seed * 0x632BE59BD9B4E019 & (2**64 - 1))
    bits = (bits ^ (bits >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    bits = (bits ^ (bits >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    shift = (bits >> np.uint64(11)).astype(np.float64) * 2.0**-52 - 1
    return np.where((mantissa == 0) | (np.abs(mantissa) == 0.5), 0, shift)


def _off_by_units(units: float) -> Callable[[Array, int], Array]:
    def off(exact: Array, seed: int) -> Array:
        rounded = exact.astype(np.float32).astype(np.float64)
        unit = np.exp2(np.frexp(rounded)[1] - 24.0)
        moved = (rounded + _noise(exact, seed) * units * unit).astype(np.float32)
        return np.where(np.isfinite(exact), moved, exact.astype(np.float32))

    return off


def _off_by(relative: float) -> Callable[[Array, int], Array]:
    return lambda exact, seed: (exact * (1 + _noise(exact, seed) * relative)).astype(np.float32)


def _exp(x: Array) -> Array:
    return np.exp2((x * np.float32(np.log2(np.e))).astype(np.float64))


_APPROXIMATE: dict[str, tuple[Callable[..., Array], Callable[[Array, int], Array]]] = {
    "create_exp": (_exp, _off_by_units(2)),
    "create_exp2": (lambda x: np.exp2(x.astype(np.float64)), _off_by_units(2)),
    "create_fdiv": (lambda x, y: x.astype(np.float64) / y.astype(np.float64), _off_by_units(2)),
    "create_log": (lambda x: np.log(x.astype(np.float64)), _off_by_units(1)),
    "create_sqrt": (lambda x: np.sqrt(x.astype(np.float64)), _off_by(2.0**-23)),
    "create_rsqrt": (lambda x: 1 / np.sqrt(x.astype(np.float64)), _off_by(2.0**-22.9)),
}


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
    originals = {name: getattr(InterpreterBuilder, name) for name in _APPROXIMATE}

    def approximate(name: str) -> Any:
        exact, off = _APPROXIMATE[name]

        def run(builder: Any, *handles: Any) -> Any:
            if handles[0].data.dtype != np.float32:
                return originals[name](builder, *handles)
            with np.errstate(all="ignore"):
                return TensorHandle(off(exact(*(handle.data for handle in handles)), seed), handles[0].dtype.scalar)

        return run

    def dot(builder: Any, left: Any, right: Any, total: Any, *options: Any) -> Any:
        if left.data.dtype != np.float32:
            return exact_dot(builder, left, right, total, *options)
        with np.errstate(all="ignore"):
            return TensorHandle(tensor_core(left.data, right.data, total.data), total.dtype.scalar)

    global _seed
    patched = {name: approximate(name) for name in _APPROXIMATE}
    with mock.patch.multiple(InterpreterBuilder, create_dot=dot, **patched):
        _seed = seed
        try:
            yield
        finally:
            _seed = None
