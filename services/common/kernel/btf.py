"""Where fields lie in the running kernel's own structures, from the type information it carries (BTF).

Through libbpf (Debian: libbpf1), which reads all of it in about 30 ms.
"""

from __future__ import annotations

import ctypes as ct
import functools
import struct
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import Any, Final, Self

from services.common import errors

_STRUCT, _UNION, _ENUM, _TYPEDEF = 4, 5, 6, 8
_KINDS: Final = {_STRUCT: "structure", _ENUM: "enumeration", _TYPEDEF: "type"}
_TRANSPARENT: Final = frozenset({8, 9, 10, 11, 18})
"""Typedefs and qualifiers: the same layout under another name."""


@functools.cache
def _libbpf() -> Any:
    try:
        library = ct.CDLL("libbpf.so.1", use_errno=True)
    except OSError:
        raise errors.FailedPrecondition("libbpf.so.1 is missing", fix="install Debian's libbpf1") from None
    library.btf__load_vmlinux_btf.restype = ct.c_void_p
    library.btf__free.argtypes = [ct.c_void_p]
    library.btf__find_by_name_kind.argtypes = [ct.c_void_p, ct.c_char_p, ct.c_uint]
    library.btf__type_by_id.restype = ct.c_void_p
    library.btf__type_by_id.argtypes = [ct.c_void_p, ct.c_uint]
    library.btf__name_by_offset.restype = ct.c_char_p
    library.btf__name_by_offset.argtypes = [ct.c_void_p, ct.c_uint]
    return library


class Btf:
    """The kernel's types, open until the end of a `with`."""

    def __enter__(self) -> Self:
        """FailedPrecondition if the kernel carries no type information."""
        self._btf = _libbpf().btf__load_vmlinux_btf()
        if not self._btf:
            raise errors.FailedPrecondition(
                "the kernel carries no type information (BTF)",
                fix="use a kernel with CONFIG_DEBUG_INFO_BTF, as the distributions' are",
            )
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        _libbpf().btf__free(self._btf)

    def size(self, name: str) -> int:
        """Bytes of a structure. FailedPrecondition if there is none of that name."""
        return self._type(self._find(name))[1]

    def offset(self, path: str) -> int:
        """Bytes from the start of the structure named first to the field named last: "pid_namespace.ns.inum".

        Every name but the last is of a structure that lies within the one before; unnamed ones are looked through.
        FailedPrecondition if this kernel has no such field.
        """
        first, *fields = path.split(".")
        kind, total = self._find(first), 0
        for name in fields:
            found = self._field(kind, name)
            if found is None:
                raise errors.FailedPrecondition(f"this kernel's structures have no {path} (at {name!r})")
            at, kind = found
            total += at
        return total

    def enumerator(self, path: str) -> int:
        """The value of a name of an enumeration: "sock_flags.SOCK_DONE". FailedPrecondition if there is none."""
        kind, name = path.split(".")
        info, _, address = self._type(self._find(kind, _ENUM))
        for at in range(address, address + 8 * (info & 0xFFFF), 8):
            of, value = struct.unpack("Ii", ct.string_at(at, 8))
            if _libbpf().btf__name_by_offset(self._btf, of).decode() == name:
                return int(value)
        raise errors.FailedPrecondition(f"this kernel has no {path}")

    def typedef(self, name: str) -> int:
        """The number of a type of that name, as tracepoints' arguments have. FailedPrecondition if there is none."""
        return self._find(name, _TYPEDEF)

    def _find(self, name: str, kind: int = _STRUCT) -> int:
        number: int = _libbpf().btf__find_by_name_kind(self._btf, name.encode(), kind)
        if number < 0:
            raise errors.FailedPrecondition(f"this kernel has no {_KINDS[kind]} {name}")
        return number

    def _type(self, number: int) -> tuple[int, int, int]:
        """(info word, size or type referred to, address of what follows), typedefs and qualifiers resolved."""
        while True:
            address = _libbpf().btf__type_by_id(self._btf, number)
            _, info, size = struct.unpack("III", ct.string_at(address, 12))
            if info >> 24 & 0x1F not in _TRANSPARENT:
                return info, size, address + 12
            number = size

    def _members(self, kind: int) -> Iterator[tuple[str, int, int]]:
        """(name, offset in bytes, type) of each; nothing for what is no structure."""
        info, _, address = self._type(kind)
        if info >> 24 & 0x1F not in (_STRUCT, _UNION):
            return
        for at in range(address, address + 12 * (info & 0xFFFF), 12):
            name, of, bits = struct.unpack("III", ct.string_at(at, 12))
            # With the top bit of `info`, eight bits of the offset are a bit field's size.
            bits &= 0xFFFFFF if info >> 31 else 0xFFFFFFFF
            yield _libbpf().btf__name_by_offset(self._btf, name).decode(), bits // 8, of

    def _field(self, kind: int, wanted: str) -> tuple[int, int] | None:
        for name, at, of in self._members(kind):
            if name == wanted:
                return at, of
            inner = None if name else self._field(of, wanted)
            if inner is not None:
                return at + inner[0], inner[1]
        return None


def offsets(
    fields: Mapping[str, str], sizes: Sequence[tuple[str, str]] = (), enumerators: Sequence[tuple[str, str]] = ()
) -> dict[str, int]:
    """Name -> offset of a field path, size of a structure, or value of an enumerator, in one go. Blocking. Raises as Btf."""
    with Btf() as btf:
        return (
            {name: btf.offset(path) for name, path in fields.items()}
            | {name: btf.size(structure) for name, structure in sizes}
            | {name: btf.enumerator(path) for name, path in enumerators}
        )
