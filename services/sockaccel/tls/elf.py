"""Where functions begin in ELF files: 64 bits, little endian.

Files are those of processes in pods, which may have made them up, and change them while they are read: sizes are checked
before anything is read, and nothing is mapped into memory.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

_HEADER: Final = struct.Struct("<16sHHIQQQIHHHHHH")
_SECTION: Final = struct.Struct("<IIQQQQIIQQ")
_SEGMENT: Final = struct.Struct("<IIQQQQQQ")
_SYMBOL: Final = struct.Struct("<IBBHQQ")
_LITTLE_64: Final = b"\x7fELF\x02\x01"
_SYMTAB, _DYNSYM, _LOAD, _FUNCTION = 2, 11, 1, 2
_TABLE_MAX: Final = 128 << 20
_PIECE: Final = 8 << 20


class Unreadable(ValueError):
    """Why nothing can be said about a file."""


@dataclass(frozen=True)
class _Table:
    kind: int
    at: int
    size: int
    link: int


def functions(path: Path, names: Iterable[str]) -> dict[str, int]:
    """Offset in the file of each of those functions it defines; nothing if it is no ELF file. Unreadable; OSError."""
    with path.open("rb", buffering=0) as file:
        try:
            return _functions(file.fileno(), {name.encode(): name for name in names})
        except struct.error:
            raise Unreadable("it is cut short") from None


def contains(path: Path, texts: Iterable[bytes]) -> set[bytes]:
    """Which of these a file has in it. OSError: it cannot be read."""
    wanted, found, rest = set(texts), set[bytes](), b""
    keep = max(map(len, wanted)) - 1
    with path.open("rb", buffering=0) as file:
        while wanted - found and (piece := file.read(_PIECE)):
            rest += piece
            found |= {text for text in wanted - found if text in rest}
            rest = rest[-keep:]
    return found


def _functions(fd: int, names: dict[bytes, str]) -> dict[str, int]:
    raw = os.pread(fd, _HEADER.size, 0)
    if not raw.startswith(b"\x7fELF"):
        return {}
    if not raw.startswith(_LITTLE_64):
        raise Unreadable("it is not of 64 bits")
    _, _, _, _, _, segments_at, sections_at, _, _, segment_size, segments, section_size, sections, _ = _HEADER.unpack(raw)
    tables = [
        _Table(kind, at, size, link)
        for _, kind, _, _, at, size, link, *_ in _entries(fd, _SECTION, sections_at, section_size, sections)
    ]
    found: dict[str, int] = {}
    # That of the linker last: it is the larger one. A file has one of each: whoever read thousands would be busy for days.
    for kind in (_DYNSYM, _SYMTAB):
        table = next((each for each in tables if each.kind == kind), None)
        if table is not None and table.link < len(tables) and len(found) < len(names):
            for name, value in _symbols(_read(fd, table), _read(fd, tables[table.link]), names):
                found.setdefault(name, value)
    loaded = [each for each in _entries(fd, _SEGMENT, segments_at, segment_size, segments) if each[0] == _LOAD]
    return {
        name: value - address + at
        for name, value in found.items()
        for _, _, at, address, _, held, _, _ in loaded
        if address <= value < address + held
    }


def _symbols(symbols: bytes, strings: bytes, names: dict[bytes, str]) -> Iterator[tuple[str, int]]:
    """Defined functions of these names, and their addresses."""
    # A name may be the end of a longer one.
    at = {
        match.start(): name
        for text, name in names.items()
        for match in re.finditer(re.escape(text) + b"\0", strings)
    }
    if not at:
        return
    whole = len(symbols) - len(symbols) % _SYMBOL.size
    for where, info, _, section, value, _ in _SYMBOL.iter_unpack(symbols[:whole]):
        if where in at and section and info & 0xF == _FUNCTION:
            yield at[where], value


def _entries(fd: int, shape: struct.Struct, at: int, size: int, count: int) -> list[tuple[int, ...]]:
    if size < shape.size and count:
        raise Unreadable("its headers make no sense")
    return [shape.unpack(os.pread(fd, shape.size, _within(at + size * number))) for number in range(count)]


def _read(fd: int, table: _Table) -> bytes:
    if table.size > _TABLE_MAX:
        raise Unreadable(f"its symbols are more than {_TABLE_MAX >> 20} MiB")
    return os.pread(fd, table.size, _within(table.at))


def _within(at: int) -> int:
    if at >= 1 << 62:
        raise Unreadable("its headers make no sense")
    return at
