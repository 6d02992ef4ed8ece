"""Run `@triton.jit` kernels on CPU tensors, without TRITON_INTERPRET and without importing anew.

Triton's own interpreter is used, with what it lacks: bf16 that is right (`bfloat16`), Python floats
as fp32 scalars, autotuned kernels, and a language that is whole again afterwards, so that the same
process can still compile. Relies on private names of `triton.runtime` (3.6 to 3.9).
"""

from __future__ import annotations

import contextlib
import contextvars
import types
from collections.abc import Iterator
from typing import Any

import numpy as np
import triton
import triton.language as tl
from triton.runtime import interpreter as triton_interpreter
from triton.runtime.autotuner import Autotuner
from triton.runtime.jit import JITFunction

from lit_align_kernels.audit import bfloat16

_active: contextvars.ContextVar[bool] = contextvars.ContextVar("interpreted", default=False)
_interpreted_functions: dict[int, tuple[JITFunction, Any]] = {}


def _interpreted_function(function: JITFunction) -> Any:
    known = _interpreted_functions.get(id(function))
    if known is None or known[0] is not function:
        known = (function, triton_interpreter.InterpretedFunction(function.fn))
        _interpreted_functions[id(function)] = known
    return known[1]


def _run(self: JITFunction, *args: Any, grid: Any, warmup: bool = False, **options: Any) -> Any:
    if not isinstance(grid, tuple) and not callable(grid):
        grid = tuple(grid)
    return _interpreted_function(self).run(*args, grid=grid, warmup=warmup, **options)


def _call(self: JITFunction, *args: Any, **options: Any) -> Any:
    options.pop("_semantic", None)
    options.pop("_generator", None)
    return _interpreted_function(self).rewrite()(*args, **options)


def _run_first_config(self: Any, *args: Any, **options: Any) -> Any:
    self.nargs = dict(zip(self.arg_names, args, strict=False))
    config = self.prune_configs(options)[0]
    if config.pre_hook is not None:
        config.pre_hook({**self.nargs, **options, **config.all_kwargs()})
    return self.fn.run(*args, **options, **config.all_kwargs())


def _indexable(original: Any) -> Any:
    """Scalars may index static Python sequences, as in compiled kernels."""

    def patch_lang_tensor(tensor: Any, scope: Any) -> None:
        original(tensor, scope)

        def index(self: Any) -> int:
            return int(np.asarray(self.handle.data).reshape(-1)[0])

        scope.set_attr(tensor, "__index__", index)

    return patch_lang_tensor


def _fp32_scalars(original: Any) -> Any:
    """A Python float argument is an fp32 scalar on a GPU."""

    def implicit_convert(argument: Any) -> Any:
        if type(argument) is not float:
            return original(argument)
        handle = bfloat16.Handle(np.array([argument], dtype=np.float32), tl.float32)
        return tl.tensor(handle, tl.float32)

    return implicit_convert


def is_interpreted() -> bool:
    """Whether kernels run in the interpreter now."""
    return _active.get()


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Kernels launched inside run in the interpreter, on CPU tensors."""
    ours = triton_interpreter
    patches: list[bfloat16.Patch] = [
        (ours, "_implicit_cvt", _fp32_scalars(ours._implicit_cvt)),
        (ours, "_patch_lang_tensor", _indexable(ours._patch_lang_tensor)),
        (JITFunction, "run", _run),
        (JITFunction, "__call__", _call),
        (Autotuner, "run", _run_first_config),
        *bfloat16.patches(),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in patches]
    knob = triton.knobs.runtime.interpret
    token = _active.set(True)
    for owner, name, value in patches:
        setattr(owner, name, value)
    triton.knobs.runtime.interpret = True
    language = types.SimpleNamespace(__globals__={"tl": tl, "core": tl.core})
    scope = ours._patch_lang(language)
    try:
        yield
    finally:
        scope.restore()
        triton.knobs.runtime.interpret = knob
        for owner, name, value in before:
            setattr(owner, name, value)
        _active.reset(token)
