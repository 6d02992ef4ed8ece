"""What comes of reading a pickle that is damaged, or not of `torch.save`, without running it.

`weights_only=True` lets nothing run, and yet a file of a kilobyte may stand for more than any
machine holds: lists that hold one another again and again, tensors that repeat one value.
"""

from __future__ import annotations

import pickle
import pickletools
import struct
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lit_align.errors import LIBRARY_ERRORS

MOST_PARTS = 1 << 26  # values and characters that a checkpoint unfolds to
DEEPEST = 100
MOST_IN_A_TUPLE = 1 << 16

# `weights_only=True` lets nothing run, but what it meets in a damaged file it does not catch.
UNREADABLE_PICKLE: tuple[type[Exception], ...] = (
    *LIBRARY_ERRORS,
    EOFError,
    struct.error,
    pickle.UnpicklingError,
    zipfile.BadZipFile,
)


def check_pickles(path: Path) -> None:
    """`check_tuples` of the pickles in a file of `torch.save`; what is no archive has none.

    Raises:
        ValueError: as `check_tuples`.
        zipfile.BadZipFile: the archive is damaged.
    """
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            for record in archive.infolist():
                if record.filename.endswith(".pkl"):
                    if record.compress_type != zipfile.ZIP_STORED:  # it could claim any size
                        raise ValueError(f"{record.filename} is compressed")
                    check_tuples(archive.read(record))


def check_tuples(pickled: bytes) -> None:
    """Refuse tuples that hold one another so often that hashing one, as a key is, does not end.

    Nothing is made of the pickle: of all its values, the sizes of tuples are followed.

    Raises:
        ValueError: a tuple unfolds to more than 65,536 values, or the pickle is damaged.
    """
    stack: list[int | None] = []  # sizes; None: a mark
    memo: dict[Any, int | None] = {}
    try:
        for code, argument, _ in pickletools.genops(pickled):
            if "GET" in code.name:
                stack.append(memo[argument])
            elif "PUT" in code.name or code.name == "MEMOIZE":
                memo[len(memo) if argument is None else argument] = stack[-1]
            else:
                _follow(code, stack)
    except (LookupError, TypeError) as error:
        raise ValueError(f"a damaged pickle: {error!r}") from error


def _follow(code: pickletools.OpcodeInfo, stack: list[int | None]) -> None:
    """What one operation does to the sizes on the stack."""
    inner: list[Any] = []
    if pickletools.markobject in code.stack_before:
        while (size := stack.pop()) is not None:
            inner.append(size)
        if code.stack_before[0] is not pickletools.markobject:
            return  # into the list or dict below the mark
    else:
        inner = [stack.pop() for _ in code.stack_before]
    size = 1 + sum(inner) if "TUPLE" in code.name else 1
    if size > MOST_IN_A_TUPLE:
        raise ValueError("a tuple that unfolds to more values than anybody stores")
    stack += [None if kind is pickletools.markobject else size for kind in code.stack_after]


def check_unpickled(value: Any) -> None:
    """Refuse what is small only for as long as nobody walks through it, prints or copies it.

    Raises:
        ValueError: lists that hold themselves, or one another so often that they unfold to more
            than 67 million values; a tensor that is larger than its storage, or has none.
    """
    _count_parts(value, {}, 0)


def _count_parts(value: Any, known: dict[int, int], depth: int) -> int:
    """How many values and characters there are in it, each as often as it would be met."""
    if isinstance(value, str | bytes | bytearray):
        return len(value)
    if isinstance(value, Tensor):
        _check_tensor(value)
    inner: list[Any] = []
    if isinstance(value, dict):
        inner = [*value.keys(), *value.values()]
    elif isinstance(value, list | tuple | set | frozenset):
        inner = [*value]
    if not inner:
        return 1
    if depth > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} deep")
    if id(value) not in known:
        known[id(value)] = 1 + sum(_count_parts(each, known, depth + 1) for each in inner)
        if known[id(value)] > MOST_PARTS:
            raise ValueError("it unfolds to more values than a checkpoint has")
    return known[id(value)]


def _check_tensor(tensor: Tensor) -> None:
    plain = tensor.layout == torch.strided and tensor.device.type == "cpu"
    if not plain or tensor.is_quantized:
        raise ValueError("a tensor that is not dense")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise ValueError(f"a tensor of shape {tuple(tensor.shape)} is larger than what it holds")
