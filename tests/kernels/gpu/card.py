"""Run the bodies of tests/kernels/interpreted on a GPU: the same cases, compiled."""

import contextlib
import functools
import math
from collections.abc import Iterator
from types import SimpleNamespace

import torch
from torch.overrides import TorchFunctionMode
from triton.runtime.jit import JITFunction

FACTORIES = frozenset(
    {torch.arange, torch.empty, torch.eye, torch.full, torch.ones, torch.rand, torch.randint}
    | {torch.randn, torch.randperm, torch.tensor, torch.as_tensor, torch.zeros}
)


class OnCard(TorchFunctionMode):
    """What a test makes without naming a device, or on the CPU, is made there and handed over.

    So the generators' seeds give the values that they give in the interpreter.
    """

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if func not in FACTORIES or kwargs.get("pin_memory"):
            return func(*args, **kwargs)
        if kwargs.get("device") is not None and torch.device(kwargs["device"]).type != "cpu":
            return func(*args, **kwargs)
        wants_gradient = kwargs.pop("requires_grad", False)
        return func(*args, **kwargs).cuda().requires_grad_(wants_gradient)


class Launches(list):
    """In the place of `traffic`'s record: a GPU does not count what kernels touch."""

    races = out_of_bounds = 0

    @property
    def launches(self):
        return self


@contextlib.contextmanager
def launches(*_, **__) -> Iterator[Launches]:
    """Note the name and the programs of every launch."""
    seen, run = Launches(), JITFunction.run

    @functools.wraps(run)
    def noted(self, *args, grid, warmup=False, **options):
        if not warmup:
            seen.append(SimpleNamespace(kernel=self.fn.__name__, programs=math.prod(grid)))
        return run(self, *args, grid=grid, warmup=warmup, **options)

    JITFunction.run = noted
    try:
        yield seen
    finally:
        JITFunction.run = run
        torch.cuda.synchronize()  # an error of a kernel belongs to its own test
