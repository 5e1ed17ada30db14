"""What the compiler made of a BPF source: instructions of each function, shapes of the maps they refer to. Kept on disk.

A unit takes one to five seconds to compile on a busy machine, and every node, restart and test compiles the same ones.
So what BCC made is kept under a digest of all that goes into it, and loaded without BCC the next time. What cannot be
read, was written by others, or is refused by the kernel is compiled anew: nothing depends on what is kept.

FIBRIL_BPF_CACHE names the directory; empty: nothing is kept.
"""

from __future__ import annotations

import base64
import contextlib
import ctypes as ct
import hashlib
import importlib.metadata
import json
import os
import re
import stat
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from services.common.kernel import bpf

DIRECTORY: Final = "/var/cache/fibril/bpf"
KEPT_MAX: Final = 128
"""Units kept; beyond, those not used for longest go."""
_FORMAT: Final = 1
_LOAD_IMM64: Final = 0x18
_MAP_FD: Final = 1
_INNER: Final = re.compile(r'"(?:array|hash)_of_maps\$(\w+)"\s*,[^,;]+,[^,;]+,\s*(\w+)\s*,')


@dataclass(frozen=True)
class MapShape:
    """A map as the kernel makes it.

    inner: name of the map whose shape its own maps have. types: type information (BTF) for kinds that cannot be without,
    with the numbers of key and value in it.
    """

    name: str
    kind: str
    key: int
    value: int
    entries: int
    flags: int
    inner: str = ""
    types: bytes = b""
    key_type: int = 0
    value_type: int = 0

    def create(self, inner_fd: int) -> int:
        """A new one's descriptor."""
        if not self.types:
            return bpf.map_create(self.kind, self.key, self.value, self.entries, self.flags, self.name, inner_fd)
        types = bpf.btf_load(self.types)
        try:
            return bpf.map_create(
                self.kind, self.key, self.value, self.entries, self.flags, self.name, 0, (types, self.key_type, self.value_type)
            )
        finally:
            os.close(types)


@dataclass(frozen=True)
class Unit:
    """A compiled source. Instructions that load a map's address have the map's number in `maps` instead of a descriptor."""

    maps: tuple[MapShape, ...]
    functions: Mapping[str, bytes]

    def create_maps(self) -> dict[str, int]:
        """New maps: name -> descriptor."""
        made: dict[str, int] = {}
        try:
            for shape in sorted(self.maps, key=lambda each: bool(each.inner)):
                made[shape.name] = shape.create(made[shape.inner] if shape.inner else 0)
        except BaseException:
            for fd in made.values():
                os.close(fd)
            raise
        return made

    def code(self, function: str, fds: Mapping[str, int]) -> bytes:
        """Instructions as they are loaded. KeyError: no such function."""
        numbers = [fds[shape.name] for shape in self.maps]
        return _relocated(self.functions[function], lambda number: numbers[number])


def of_module(module: Any, text: str) -> tuple[Unit, dict[str, int]]:
    """What BCC made, and the maps it has created: name -> descriptor (the module's own)."""
    from bcc import lib

    lib.bpf_num_tables.restype = ct.c_size_t
    lib.bpf_num_tables.argtypes = [ct.c_void_p]
    lib.bpf_table_name.restype = ct.c_char_p
    lib.bpf_table_name.argtypes = [ct.c_void_p, ct.c_size_t]
    raw = module.module
    fds = {}
    for number in range(lib.bpf_num_tables(raw)):
        name = lib.bpf_table_name(raw, number)
        fds[name.decode()] = int(lib.bpf_table_fd(raw, name))
    inner = {outer: template for template, outer in _INNER.findall(text)}
    maps = tuple(_shape(name, fd, inner.get(name, "")) for name, fd in fds.items())
    numbers = {fd: number for number, fd in enumerate(fds.values())}
    functions = {}
    for number in range(lib.bpf_num_functions(raw)):
        name = lib.bpf_function_name(raw, number)
        start, size = lib.bpf_function_start(raw, name), lib.bpf_function_size(raw, name)
        functions[name.decode()] = _relocated(ct.string_at(start, size), numbers.__getitem__)
    return Unit(maps, functions), fds


def _shape(name: str, fd: int, inner: str) -> MapShape:
    info = bpf.map_info(fd)
    shape = MapShape(name, info.type, info.key_size, info.value_size, info.max_entries, info.flags, inner)
    if not info.type.endswith("_storage"):
        return shape
    types, key_type, value_type = bpf.map_types(fd)
    return replace(shape, types=bpf.btf_raw(types), key_type=key_type, value_type=value_type)


def _relocated(code: bytes, number: Any) -> bytes:
    out = bytearray(code)
    for at in range(0, len(code), 8):
        if out[at] == _LOAD_IMM64 and out[at + 1] >> 4 == _MAP_FD:
            struct.pack_into("i", out, at + 4, number(struct.unpack_from("i", code, at + 4)[0]))
    return bytes(out)


# ---- on disk ------------------------------------------------------------------------------------------------
def digest(text: str, flags: Sequence[str], headers: Path) -> str:
    """Of everything that goes into a unit. headers: what BCC takes for the kernel's."""
    found = hashlib.sha256(f"{_FORMAT}\0{_compiler()}\0{os.uname().machine}\0{bpf.possible_cpus()}\0".encode())
    for word in (*flags, text):
        found.update(word.encode() + b"\0")
    for path in (*sorted(headers.rglob("*.h")), Path("/usr/include/linux/bpf.h")):
        with contextlib.suppress(OSError):
            found.update(path.read_bytes())
    return found.hexdigest()


def _compiler() -> str:
    """The compiler's version, without loading it."""
    for name in ("libbcc.so.0", "libbcc.so"):
        for root in Path("/usr/lib").glob(f"*/{name}"):
            details = root.resolve().stat()
            return f"{root.resolve().name} {details.st_size} {details.st_mtime_ns}"
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version("bcc")
    return ""


def directory() -> Path | None:
    """Where units are kept; None: nowhere. It is root's alone: what is in it runs in the kernel."""
    name = os.environ.get("FIBRIL_BPF_CACHE", DIRECTORY)
    if not name:
        return None
    path = Path(name)
    try:
        path.mkdir(parents=True, exist_ok=True, mode=0o700)
        details = path.lstat()
    except OSError:
        return None
    mine = stat.S_ISDIR(details.st_mode) and details.st_uid == os.geteuid() and not details.st_mode & 0o077
    return path if mine else None


def read(name: str) -> Unit | None:
    """What is kept under a digest, if it is of any use."""
    where = directory()
    if where is None:
        return None
    path = where / name
    try:
        details = path.lstat()
        if not stat.S_ISREG(details.st_mode) or details.st_uid != os.geteuid():
            return None
        found = json.loads(path.read_text())
        maps = tuple(MapShape(**{**each, "types": base64.b64decode(each["types"])}) for each in found["maps"])
        functions = {each: base64.b64decode(code, validate=True) for each, code in found["functions"].items()}
        os.utime(path)
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return Unit(maps, functions)


def write(name: str, unit: Unit) -> None:
    """Keep a unit; a disk that will not is no reason to fail."""
    where = directory()
    if where is None:
        return
    maps = [{**shape.__dict__, "types": base64.b64encode(shape.types).decode()} for shape in unit.maps]
    functions = {each: base64.b64encode(code).decode() for each, code in unit.functions.items()}
    fresh = where / f"{name}.{os.getpid()}~"
    try:
        fresh.write_text(json.dumps({"maps": maps, "functions": functions}))
        fresh.rename(where / name)
        _prune(where)
    except OSError:
        with contextlib.suppress(OSError):
            fresh.unlink(missing_ok=True)


def forget(name: str) -> None:
    """What is kept under a digest is of no use."""
    where = directory()
    if where is not None:
        with contextlib.suppress(OSError):
            (where / name).unlink(missing_ok=True)


def _prune(where: Path) -> None:
    ages = []
    for path in where.iterdir():
        with contextlib.suppress(OSError):
            ages.append((path.stat().st_mtime, path))
    for _, path in sorted(ages)[:-KEPT_MAX]:
        with contextlib.suppress(OSError):
            path.unlink()
