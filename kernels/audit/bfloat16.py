"""bf16 for Triton's interpreter, which keeps it as bit patterns and computes on those.

Arithmetic, comparisons, products and reductions on bf16 are done in fp32 and rounded to the nearest
even bf16, as on a GPU. Relies on private names of `triton.runtime.interpreter` (3.6 to 3.9).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter

Handle = triton_interpreter.TensorHandle
Builder = triton_interpreter.InterpreterBuilder
Reduce = triton_interpreter.ReduceOps
Scan = triton_interpreter.ScanOps

BITWISE = (np.bitwise_and, np.bitwise_or, np.bitwise_xor, np.left_shift, np.right_shift)

Patch = tuple[Any, str, Any]  # (owner, attribute, new value)


def widen(bits: np.ndarray) -> np.ndarray:
    """bf16 bit patterns (uint16) → fp32."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << np.uint32(16)).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """fp32 → bf16 bit patterns (uint16), to nearest even; NaN stays NaN."""
    values = np.ascontiguousarray(values, dtype=np.float32)
    bits = values.view(np.uint32)
    rounded = bits + (((bits >> np.uint32(16)) & np.uint32(1)) + np.uint32(0x7FFF))
    rounded = (rounded >> np.uint32(16)).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded)


def _is_bf16(handle: Any) -> bool:
    if not isinstance(handle, Handle) or isinstance(handle.dtype, tl.pointer_type):
        return False
    return handle.dtype.scalar == tl.bfloat16


def _up(handle: Any) -> Any:
    return Handle(widen(handle.data), tl.float32) if _is_bf16(handle) else handle


def _down(handle: Any) -> Any:
    if handle.data.dtype.kind != "f":
        return handle
    return Handle(narrow(handle.data), tl.bfloat16)


def _tensor(tensor: Any, handle: Any, dtype: Any) -> Any:
    shape = list(tensor.shape)
    return tl.core.tensor(handle, tl.block_type(dtype, shape) if shape else dtype)


def _up_tensor(tensor: Any) -> Any:
    return _tensor(tensor, _up(tensor.handle), tl.float32)


def _down_tensor(tensor: Any) -> Any:
    return _tensor(tensor, _down(tensor.handle), tl.bfloat16)


def _elementwise(original: Any, *, skip: tuple[Any, ...] = ()) -> Any:
    """Widen every bf16 operand, compute, narrow the result."""

    def compute(self: Any, *operands: Any) -> Any:
        if not any(_is_bf16(o) for o in operands) or operands[-1] in skip:
            return original(self, *operands)
        return _down(original(self, *[_up(o) for o in operands]))

    return compute


def _cast(original: Any) -> Any:
    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        from_bf16, to_bf16 = _is_bf16(source), target.scalar == tl.bfloat16
        if from_bf16 and not to_bf16:
            return _up(source) if target == tl.float32 else original(self, _up(source), target)
        if to_bf16 and not from_bf16:
            return Handle(narrow(source.data.astype(np.float32)), tl.bfloat16)
        return original(self, source, target)

    return cast_impl


def _dot(original: Any) -> Any:
    def create_dot(self: Any, a: Any, b: Any, *rest: Any) -> Any:
        return original(self, _up(a), _up(b), *rest)

    return create_dot


def _sum(original: Any) -> Any:
    def reduce_sum(self: Any, x: Any) -> Any:
        return (
            _down_tensor(original(self, _up_tensor(x))) if _is_bf16(x.handle) else original(self, x)
        )

    return reduce_sum


def _extremum(original: Any) -> Any:
    def min_max(self: Any, x: Any, *args: Any, **kwargs: Any) -> Any:
        first = x[0] if isinstance(x, tuple) else x
        if not _is_bf16(first.handle):
            return original(self, x, *args, **kwargs)
        found = original(self, _up_tensor(first), *args, **kwargs)
        if isinstance(found, tuple):
            return _down_tensor(found[0]), found[1]
        return found if found.dtype == tl.int32 else _down_tensor(found)

    return min_max


def _cumulative(original: Any) -> Any:
    def cumsum(self: Any, x: Any) -> Any:
        if not _is_bf16(x.handle):
            return original(self, x)
        return [_down_tensor(original(self, _up_tensor(x))[0])]

    return cumsum


def patches() -> list[Patch]:
    """What `interpreted` sets while it is active."""
    found: list[Patch] = [
        (Builder, "binary_op", _elementwise(Builder.binary_op, skip=BITWISE)),
        (Builder, "cast_impl", _cast(Builder.cast_impl)),
        (Builder, "create_dot", _dot(Builder.create_dot)),
        (Reduce, "sum", _sum(Reduce.sum)),
        (Reduce, "min_max", _extremum(Reduce.min_max)),
        (Scan, "cumsum", _cumulative(Scan.cumsum)),
    ]
    for name in ("unary_op", "create_fma", "create_rsqrt", "create_erf"):
        found.append((Builder, name, _elementwise(getattr(Builder, name))))
    return found
