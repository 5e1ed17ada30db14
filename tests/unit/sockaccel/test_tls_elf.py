"""Where functions begin in files that may have been made to hurt who reads them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from services.sockaccel.tls import elf

NAMES = ("SSL_write", "SSL_read")


def made(
    names: tuple[bytes, ...] = (b"prefixed_SSL_write", b"SSL_read"), at: int = 0x1010, section: int = 1, kind: int = 2
) -> bytes:
    """A library with these functions, 16 bytes apart; segment at 0x1000 of memory, 0x200 of the file."""
    strings = b"\0" + b"\0".join(names) + b"\0"
    symbols = bytes(24)
    for number, name in enumerate(names):
        symbols += struct.pack("<IBBHQQ", strings.index(name), 0x10 | kind, 0, section, at + 16 * number, 16)
    sections = struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
    sections += struct.pack("<IIQQQQIIQQ", 0, 11, 0, 0, 0x400, len(symbols), 2, 0, 8, 24)
    sections += struct.pack("<IIQQQQIIQQ", 0, 3, 0, 0, 0x600, len(strings), 0, 0, 1, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0x200, 0x1000, 0x1000, 0x100, 0x100, 0x1000)
    head = b"\x7fELF\x02\x01\x01" + bytes(9)
    head += struct.pack("<HHIQQQIHHHHHH", 3, 62, 1, 0, 64, 0x300, 0, 64, 56, 1, 64, 3, 2)
    whole = head + segment
    for start, part in ((0x300, sections), (0x400, symbols), (0x600, strings)):
        whole = whole.ljust(start, b"\0") + part
    return whole


def test_functions_are_found_where_they_are_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "lib"
    path.write_bytes(made((b"SSL_write", b"SSL_read", b"other")))
    assert elf.functions(path, NAMES) == {"SSL_write": 0x210, "SSL_read": 0x220}


def test_a_longer_name_is_another_function(tmp_path: Path) -> None:
    path = tmp_path / "lib"
    path.write_bytes(made())
    assert elf.functions(path, NAMES) == {"SSL_read": 0x220}


@pytest.mark.parametrize("changes", [{"section": 0}, {"kind": 1}, {"at": 0x5000}])
def test_what_is_not_defined_no_function_or_not_in_the_file_is_not_found(tmp_path: Path, changes: dict[str, int]) -> None:
    path = tmp_path / "lib"
    path.write_bytes(made((b"SSL_write",), **changes))  # type: ignore[arg-type]
    assert elf.functions(path, NAMES) == {}


def test_a_file_has_one_table_of_a_kind(tmp_path: Path) -> None:
    """Tens of thousands, each of 128 MiB of nothing, would be read for days."""
    path = tmp_path / "lib"
    whole = bytearray(made((b"SSL_write",)))
    # The first is empty, the second as it should be.
    table = whole[0x340:0x380]
    struct.pack_into("<Q", table, 32, 24)
    strings = whole[0x380:0x3C0]
    whole[0x380:0x3C0] = table
    whole[0x3C0:0x400] = strings
    second = bytearray(whole[0x340:0x380])
    whole[0x340:0x380] = table
    for at in (0x340, 0x380):
        struct.pack_into("<I", whole, at + 40, 3)
    struct.pack_into("<Q", whole, 0x380 + 32, struct.unpack_from("<Q", second, 32)[0])
    struct.pack_into("<H", whole, 60, 4)
    path.write_bytes(whole)
    assert elf.functions(path, NAMES) == {}
    struct.pack_into("<I", whole, 0x344, 1)
    path.write_bytes(whole)
    assert elf.functions(path, NAMES) == {"SSL_write": 0x210}


def test_what_is_no_elf_file_has_none_and_what_is_damaged_is_named(tmp_path: Path) -> None:
    path = tmp_path / "lib"
    for text in (b"", b"#!/bin/sh\n", bytes(100)):
        path.write_bytes(text)
        assert elf.functions(path, NAMES) == {}
    path.write_bytes(made()[:0x310])
    with pytest.raises(elf.Unreadable, match="cut short"):
        elf.functions(path, NAMES)
    path.write_bytes(b"\x7fELF\x01\x01\x01" + bytes(100))
    with pytest.raises(elf.Unreadable, match="64 bits"):
        elf.functions(path, NAMES)
    large = bytearray(made())
    struct.pack_into("<Q", large, 0x300 + 64 + 32, 1 << 40)
    path.write_bytes(large)
    with pytest.raises(elf.Unreadable, match="MiB"):
        elf.functions(path, NAMES)


@settings(suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(st.integers(0, 0x640), st.binary(min_size=1, max_size=8)), max_size=12))
@example([(32, b"\xff" * 16)])
@example([(40, b"\xff" * 8)])
@example([(60, b"\xff\xff")])
def test_any_damage_is_borne(tmp_path: Path, damage: list[tuple[int, bytes]]) -> None:
    whole = bytearray(made())
    for at, text in damage:
        whole[at : at + len(text)] = text
    path = tmp_path / "lib"
    path.write_bytes(whole)
    try:
        elf.functions(path, NAMES)
    except elf.Unreadable:
        pass


def test_texts_are_found_wherever_they_are(tmp_path: Path) -> None:
    path = tmp_path / "program"
    border = elf._PIECE
    path.write_bytes(b"first" + bytes(border - 7) + b"second" + bytes(100))
    assert elf.contains(path, (b"first", b"second", b"third")) == {b"first", b"second"}
