"""A shortened connection whose ends turn the kernel's TLS on, on a kernel that has it."""

from __future__ import annotations

import asyncio
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from services.common import errors
from services.sockaccel import abi, install, ulp
from tests.e2e.lb.sockrig import Process, forget, make_instance
from tests.e2e.sockaccel.accelrig import B4, Rig, at_work, two_spaces, until
from tests.e2e.sockaccel.test_tls_seen import certificate
from tests.vm.run import PAIRS
from tests.vm.test_ktls import PORT, SIDES


@pytest.fixture(scope="module")
def rig() -> Iterator[Rig]:
    made = make_instance()
    try:
        try:
            asyncio.run(install.load(made, PAIRS))
        except errors.FailedPrecondition as error:
            pytest.skip(f"nothing is shortened on this kernel: {error}")
        subprocess.run(["modprobe", "tls"], check=True)
        with two_spaces() as spaces, at_work(made, f"fibril-test-{made.name}") as group:
            rig = Rig(made, group, spaces)
            try:
                yield rig
            finally:
                rig.close()
    finally:
        forget(made)


def connected(rig: Rig) -> tuple[Process, Process]:
    """Client and server with a connection."""
    client, server = rig.process(0), rig.process(1)
    for end in (client, server):
        end.do(SIDES)
    server.do(f"l = socket.create_server(({B4!r}, {PORT}))")
    client.do(f"c = socket.create_connection(({B4!r}, {PORT}), 20)")
    server.do("c = l.accept()[0]; c.settimeout(20); l.close()")
    return client, server


def shortened(rig: Rig) -> tuple[Process, Process]:
    """Client and server with a connection that is."""
    client, server = connected(rig)
    before = rig.stat(abi.Stat.SENDS)
    turns(client, server, 12)
    assert rig.stat(abi.Stat.SENDS) > before
    return client, server


def turns(client: Process, server: Process, count: int) -> None:
    for number in range(count):
        word = b"%08d" % number
        server.send("", "c.recv(8).decode()")
        client.do(f"c.sendall({word!r})")
        assert server.receive() == word.decode()
        client.send("", "c.recv(8).decode()")
        server.do(f"c.sendall({word!r})")
        assert client.receive() == word.decode()


def record(text: bytes) -> bytes:
    """The first of TLS 1.3 with the key of SIDES, as a library makes it."""
    head = b"\x17\x03\x03" + struct.pack(">H", len(text) + 17)
    return head + AESGCM(bytes(range(16))).encrypt(bytes(12), text + b"\x17", head)


def turn_on(end: Process, *ways: int) -> None:
    """TLS at an end: 1 as it writes, 2 as it reads."""
    for way in ways:
        end.do(f"key(c, {way})")


@pytest.fixture
def allowed(rig: Rig) -> None:
    if not ulp.possible():
        pytest.skip("this kernel lets no socket in a map of sockets turn TLS on")


def test_who_is_refused_by_the_kernel_itself_goes_on(rig: Rig) -> None:
    if ulp.possible():
        pytest.skip("it does not")
    client, server = shortened(rig)
    with pytest.raises(OSError, match="Invalid"):
        client.do("key(c, 1)")
    turns(client, server, 4)


@pytest.mark.usefixtures("allowed")
def test_nobody_turns_tls_on_before_something_that_was_handed_over(rig: Rig) -> None:
    client, server = shortened(rig)
    sends = rig.stat(abi.Stat.SENDS)
    sealed = record(b"hello")
    server.do(f"c.sendall({sealed!r})")
    assert rig.stat(abi.Stat.SENDS) > sends
    with pytest.raises(PermissionError):
        client.do("key(c, 2)")
    # As it was sent: a library decrypts it.
    assert client.give("c.recv(100).hex()") == sealed.hex()
    # What is sent from here on is for the kernel.
    server.do(f"c.sendall({sealed!r})")
    assert rig.stat(abi.Stat.SENDS) == sends + 1
    turn_on(client, 2)
    assert client.give("c.recv(100).decode('latin-1')") == "hello"


@pytest.mark.usefixtures("allowed")
def test_tls_is_turned_on_where_nothing_was_handed_over(rig: Rig) -> None:
    client, server = connected(rig)
    sends = rig.stat(abi.Stat.SENDS)
    turn_on(client, 1, 2)
    turn_on(server, 2, 1)
    turns(client, server, 12)
    assert rig.stat(abi.Stat.SENDS) == sends



@pytest.mark.usefixtures("allowed")
@pytest.mark.parametrize("asks", [("client",), ("server",), ("client", "server")], ids="+".join)
def test_openssl_that_is_refused_goes_on_without(rig: Rig, tmp_path: Path, asks: tuple[str, ...]) -> None:
    """As with STARTTLS: a connection that is shortened when TLS begins."""
    pem = certificate(tmp_path / "b.pem")
    client, server = shortened(rig)
    ended = rig.ended(abi.EndReason.OPTION)
    server.do(f"context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER); context.load_cert_chain({str(pem)!r})")
    client.do("context = ssl._create_unverified_context()")
    for name, end in (("client", client), ("server", server)):
        if name in asks:
            end.do("context.options |= 8")  # SSL_OP_ENABLE_KTLS
    server.send("c = context.wrap_socket(c, server_side=True)", "c.recv(5).decode()")
    # Its last word of the handshake and its first of what follows may wait together.
    client.do("c = context.wrap_socket(c); c.sendall(b'first')")
    assert server.receive() == "first"
    turns(client, server, 12)
    option = abi.EndReason.OPTION
    until(lambda: rig.ended(option) > ended or any(pair.ended == option for pair in rig.pairs()), 20)


@pytest.mark.usefixtures("allowed")
def test_what_its_ends_encrypt_goes_by_tcp_byte_by_byte(rig: Rig) -> None:
    client, server = shortened(rig)
    ended = rig.ended(abi.EndReason.OPTION)
    sends = rig.stat(abi.Stat.SENDS)
    for end in (client, server):
        # Nothing waits, but whether a sender is at it nobody knows before it has sent by TCP.
        with pytest.raises(PermissionError):
            end.do("key(c, 1)")
    turns(client, server, 2)
    turn_on(client, 1, 2)
    turn_on(server, 2, 1)
    turns(client, server, 4)
    server.send("", "digest(c, len(BULK))")
    client.do("at = 0\nwhile at < len(BULK): at += c.send(BULK[at : at + 1 + at * 7 % 50000])")
    assert server.receive() == client.give("hashlib.sha256(BULK).hexdigest()")
    assert rig.stat(abi.Stat.SENDS) == sends
    until(lambda: rig.ended(abi.EndReason.OPTION) > ended or all(pair.ended for pair in rig.pairs()), 20)
