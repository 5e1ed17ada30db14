"""Where a probe is put: behind what leaves the arguments alone, in what does the work, else at the beginning."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from services.sockaccel.tls.places import cheap

PUSHES = bytes.fromhex("41564155")  # push %r14; push %r13
SUB, ENDBR = bytes.fromhex("4883ec08"), bytes.fromhex("f30f1efa")
WORK, PLAIN, EX = 0x100, 0x200, 0x300
GO, SEND = "crypto/tls.(*Conn).Write", "gnutls_record_send"


def file(tmp_path: Path, code: dict[int, bytes], machine: int = 62) -> Path:
    image = bytearray(0x400)
    image[:20] = b"\x7fELF\x02\x01".ljust(16, b"\0") + struct.pack("<HH", 3, machine)
    for at, text in code.items():
        image[at : at + len(text)] = text
    path = tmp_path / "libssl.so"
    path.write_bytes(image)
    return path


def call(at: int, to: int) -> bytes:
    return b"\xe8" + struct.pack("<i", to - at - 5)


def pair(ex: bytes = SUB, plain: bytes = SUB + b"\x90" * 9, work: bytes = PUSHES, to: int = WORK) -> dict[int, bytes]:
    """Two functions, each of which calls what does the work."""
    return {WORK: work, PLAIN: plain + call(PLAIN + len(plain), WORK), EX: ex + call(EX + len(ex), to)}


@pytest.mark.parametrize("name", ["SSL_read", "SSL_write"])
@pytest.mark.parametrize("ex", [SUB, ENDBR + SUB])
def test_both_are_probed_where_both_do_their_work(tmp_path: Path, name: str, ex: bytes) -> None:
    path = file(tmp_path, pair(ex))
    assert cheap(path, {name: PLAIN, f"{name}_ex": EX}) == {name: WORK, f"{name}_ex": WORK}
    assert cheap(path, {f"{name}_ex": EX}) == {f"{name}_ex": WORK}
    assert cheap(path, {name: PLAIN}) == {name: PLAIN}


@pytest.mark.parametrize(
    "code",
    [
        pair(work=ENDBR + PUSHES),  # it would be stepped there as well
        pair(work=b"\x48\x89\x5c\x24"),
        pair(ex=b"\x55" + SUB),
        pair(ex=SUB + b"\x31\xc9"),  # not its own arguments
        pair(to=-0x5000),
        pair(to=0x7000000),
        {EX: SUB + b"\xe8"},
    ],
)
def test_what_is_not_known_for_sure_is_left_where_it_is(tmp_path: Path, code: dict[int, bytes]) -> None:
    places = {"SSL_read": PLAIN, "SSL_read_ex": EX}
    assert cheap(file(tmp_path, code), places) == places


def test_one_that_does_its_work_elsewhere_keeps_its_place(tmp_path: Path) -> None:
    path = file(tmp_path, {**pair(), PLAIN: SUB + call(PLAIN + 4, 0x180)})
    assert cheap(path, {"SSL_read": PLAIN, "SSL_read_ex": EX}) == {"SSL_read": PLAIN, "SSL_read_ex": WORK}


@pytest.mark.parametrize(
    ("name", "code", "behind"),
    [
        (SEND, "4531c031c9e9669cffff", 5),
        (SEND, "f30f1efa4531c031c9e9669cffff", 9),
        (SEND, "4531c031c94889f2", 0),
        (GO, "493b66100f8600010000", 4),
        (GO, "4c8d6424b84d3b66100f86930700", 9),
        (GO, "4c8da42400ffffff4d3b661076aa", 12),
        (GO, "493b66104889c3", 0),
        ("SSL_write", "4531c031c9e9669cffff", 0),
    ],
)
def test_a_beginning_that_leaves_the_arguments_alone_is_passed(tmp_path: Path, name: str, code: str, behind: int) -> None:
    path = file(tmp_path, {EX: bytes.fromhex(code)})
    assert cheap(path, {name: EX}) == {name: EX + behind}


def test_other_machines_and_short_files_are_left_alone(tmp_path: Path) -> None:
    places = {"SSL_read": PLAIN, "SSL_read_ex": EX}
    assert cheap(file(tmp_path, pair(), machine=183), places) == places
    assert cheap(file(tmp_path, pair()), {"SSL_read_ex": 0x5000}) == {"SSL_read_ex": 0x5000}
