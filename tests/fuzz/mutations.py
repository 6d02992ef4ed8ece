"""Damage and lies: seeded changes of a file's bytes, of JSON in it, and of safetensors headers."""

import io
import json
import random
import struct
import zipfile
from collections.abc import Callable

DEEP = b"[" * 100_000
# Written into JSON as they stand: Python's own writer would not make them.
RAW = (
    b"NaN", b"-Infinity", b"1e999", b"9" * 5000, b"-" + b"9" * 30, DEEP, b"[" * 80 + b"]" * 80,
    b'"\xff\xfe"', b'"\\ud800"', b'{"a":1,"a":2}', b"", b"\x00", b'"\\u0000"',
)  # fmt: skip
VALUES = (
    None, True, False, -1, 0, 1, 3, 2**31, 2**40, 2**62, 2**63, -(2**63), 0.5, -1e308, "",
    "x" * 400,
    "../../../etc/passwd", "/etc/passwd", "..", "a/../../b", "C:\\x", "\x1b[2J", "<script>", "F4",
    "I64", "all", "rows", "LORA", [], {}, [-1], [2**40, 2**40], [2**62], [0], [[1]], [None], ["x"],
    {"": 0}, {"__class__": "os.system"},
)  # fmt: skip
PLACEHOLDER = "@raw@"
Mutation = Callable[[bytes, random.Random], bytes]


def damaged(data: bytes, source: random.Random) -> bytes:
    """A bit, a byte or a stretch that is another, gone, there twice or new; or an end cut off."""
    data = bytearray(data)
    at = source.randrange(max(len(data), 1))
    stretch = source.randrange(1, 64)
    kind = source.randrange(7)
    if kind == 0 and data:
        data[at] ^= 1 << source.randrange(8)
    elif kind == 1:
        data[at : at + stretch] = source.randbytes(stretch)
    elif kind == 2:
        del data[at:]
    elif kind == 3:
        del data[at : at + stretch]
    elif kind == 4:
        data[at:at] = data[at : at + stretch]
    elif kind == 5:
        data[at:at] = source.randbytes(stretch)
    else:
        data += source.randbytes(stretch)
    return bytes(data)


def other_json(data: bytes, source: random.Random) -> bytes:
    """A JSON document with one value, name or object that is another, gone or there twice."""
    document = json.loads(data)
    places = list(_places(document))
    owner, name = source.choice(places) if places else (None, None)
    kind = source.randrange(6)
    if owner is None:
        return source.choice(RAW)
    if kind == 0:
        del owner[name]
    elif kind == 1 and isinstance(owner, dict):
        owner[source.choice(["", "x", "format_version", "../x", "\x1b[2J"])] = owner.pop(name)
    elif kind == 2 and isinstance(owner, list):
        owner.insert(0, owner[name])
    elif kind in (3, 4):
        owner[name] = PLACEHOLDER
        text = json.dumps(document).encode()
        return text.replace(json.dumps(PLACEHOLDER).encode(), source.choice(RAW))
    else:
        owner[name] = source.choice(VALUES)
    return json.dumps(document).encode()


def _places(value):
    names = value if isinstance(value, dict) else range(len(value))
    for name in list(names):
        yield value, name
        if isinstance(value[name], dict | list):
            yield from _places(value[name])


def other_lines(data: bytes, source: random.Random) -> bytes:
    """JSON lines of which one is another."""
    lines = data.splitlines()
    at = source.randrange(len(lines))
    lines[at] = other_json(lines[at], source)
    return b"\n".join(lines) + b"\n"


def other_header(data: bytes, source: random.Random) -> bytes:
    """A safetensors file whose header, or the length of it, says something else."""
    size = struct.unpack("<Q", data[:8])[0]
    if source.random() < 0.2:
        lie = source.choice([0, 1, size - 1, size + 1, len(data), 2**31, 2**40, 2**63, 2**64 - 1])
        return struct.pack("<Q", lie) + data[8:]
    header = other_json(data[8 : 8 + size], source)
    return struct.pack("<Q", len(header)) + header + data[8 + size :]


def other_record(data: bytes, source: random.Random) -> bytes:
    """A zip archive with one damaged record, whose checksum is right again."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        names = old.namelist()
        chosen = source.choice([n for n in names if n.endswith("data.pkl")] * 3 + names)
        for name in names:
            content = old.read(name)
            new.writestr(name, damaged(content, source) if name == chosen else content)
    return out.getvalue()
