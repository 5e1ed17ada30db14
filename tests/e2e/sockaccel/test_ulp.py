"""Who asks for a protocol on top of a socket (TCP_ULP), as TLS of the kernel is. What is asked for here is none: who is let
through hears ENOENT.

What becomes of TLS itself: tests/vm/test_ktls_accel.py.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator
from pathlib import Path

import pytest
from accelrig import A4, B4, Rig, until
from test_shorten import TALK, pair_up

from services.common.instance import Instance
from services.common.kernel import attach, progs
from services.sockaccel import abi, hooks, install, teardown, ulp
from tests.e2e.lb.sockrig import Process

TURNS = 7
ASK = """
def ask(s):
    try:
        s.setsockopt(socket.SOL_TCP, 31, b"fibril")
    except OSError as error:
        return errno.errorcode[error.errno]
"""


@pytest.fixture
def asked(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[Process]:
    """A process whose sockets may have TLS, as far as the service knows."""
    monkeypatch.setattr(ulp, "possible", lambda: True)
    hooks.attach_all(rig.instance, rig.group.name)
    process = rig.process()
    process.do(ASK)
    yield process


def on_group(group: Path) -> list[int]:
    return [entry.prog_id for entry in attach.attached_cgroup(group, "cgroup_setsockopt")]


def test_it_is_refused_while_something_waits(rig: Rig, asked: Process) -> None:
    pair_up(asked)
    asked.do("talk(20); d.sendall(b'one')")
    (pair,) = rig.pairs()
    assert pair.ends[1].mode == abi.Mode.SHORT and hooks.waits(rig.instance, [pair.ends[0].cookie])
    assert asked.give("ask(c)") == "EPERM"
    assert rig.pairs()[0].ended == abi.EndReason.OPTION
    handed = rig.stat(abi.Stat.SENDS)
    # What was handed over is read, what is sent now comes by TCP, and its sender is done with what it sent before.
    asked.do("d.sendall(b'two')")
    assert asked.give("take(c, 6).decode()") == "onetwo"
    assert asked.give("ask(c)") == "ENOENT"
    asked.do("talk(20)")
    assert rig.stat(abi.Stat.SENDS) == handed


def test_it_is_let_through_where_nothing_was_handed_over(rig: Rig, asked: Process) -> None:
    pair_up(asked)
    asked.do("talk(1)")
    handed = rig.stat(abi.Stat.SENDS)
    assert asked.give("ask(d)") == "ENOENT"
    assert rig.pairs()[0].ended == abi.EndReason.OPTION
    asked.do("talk(20)")
    assert rig.stat(abi.Stat.SENDS) == handed


def test_other_sockets_and_options_are_left_alone(rig: Rig, asked: Process) -> None:
    with contextlib.closing(Process(None, rig.spaces[0])) as stranger:
        stranger.do(f"l = socket.create_server(({A4!r}, 0))")
        asked.do(f"alone = socket.create_connection(({A4!r}, {stranger.give('l.getsockname()[1]')}), 5)")
    assert asked.give("ask(alone)") == "ENOENT"
    pair_up(asked)
    asked.do("talk(20)")
    # The last is larger than a page, and more than the kernel looks at.
    asked.do("""
c.setsockopt(socket.SOL_TCP, socket.TCP_NODELAY, 1)
c.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
c.setsockopt(socket.SOL_TCP, socket.TCP_CONGESTION, b"reno" + bytes(200000))
""")
    assert asked.give("[c.getsockopt(6, 1), c.getsockopt(1, 9)]") == [1, 1]
    assert asked.give("c.getsockopt(6, 13, 4).decode()") == "reno"
    handed = rig.stat(abi.Stat.SENDS)
    asked.do("talk(20)")
    assert rig.stat(abi.Stat.SENDS) > handed


def test_who_is_let_through_while_the_other_sends_has_it_by_tcp(rig: Rig, asked: Process) -> None:
    """At the moment when the first word is to be handed over: it waits for its reader, who is refused, or comes by TCP."""
    # Those of the turns, and the client's that says when.
    rig.write(proofs=2 * TURNS + 1)
    server = rig.process(1)
    for end in (asked, server):
        end.do(TALK)
    server.do(f"l = socket.create_server(({B4!r}, 0))")
    port = server.give("l.getsockname()[1]")
    for number in range(100):
        asked.do(f"c = socket.create_connection(({B4!r}, {port}), 5)")
        server.do("c = l.accept()[0]; c.settimeout(5)")
        handed = rig.stat(abi.Stat.SENDS)
        server.send(f"""
for _ in range({TURNS}): take(c, 1); c.sendall(b".")
at = float(take(c, 20))
while time.monotonic() < at: pass
c.sendall(b"word")
""")
        asked.do(f"""
for _ in range({TURNS}): c.sendall(b"."); take(c, 1)
at = time.monotonic() + 0.002
c.sendall(b"%020.9f" % at)
at += {number} * 4e-7
while time.monotonic() < at: pass
said = ask(c)
""")
        server.receive()
        said = asked.give("said")
        assert said == "EPERM" or rig.stat(abi.Stat.SENDS) == handed
        assert asked.give("take(c, 4).decode()") == "word"
        for end in (asked, server):
            end.do("c.close()")
        until(lambda: not rig.pairs())


def test_it_is_attached_where_there_may_be_tls_and_taken_off(
    instance: Instance, rig: Rig, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = rig.group.name
    monkeypatch.setattr(ulp, "possible", lambda: False)
    hooks.detach_all(instance)
    hooks.attach_all(instance, name)
    assert on_group(rig.group) == [] and not hooks.missing(instance, name)
    monkeypatch.setattr(ulp, "possible", lambda: True)
    assert hooks.missing(instance, name) == [install.ULP]
    hooks.attach_all(instance, name)
    assert on_group(rig.group) == [progs.info(install.program_path(instance, install.ULP)).id]
    assert not hooks.missing(instance, name)
    monkeypatch.setattr(ulp, "possible", lambda: False)
    assert hooks.missing(instance, name) == [install.ULP]
    hooks.attach_all(instance, name)
    assert on_group(rig.group) == [] and not hooks.missing(instance, name)
    monkeypatch.setattr(ulp, "possible", lambda: True)
    hooks.attach_all(instance, name)
    # Of a newer version: in the place of the older one.
    asyncio.run(install.load(instance))
    assert install.ULP in hooks.missing(instance, name)
    hooks.attach_all(instance, name)
    assert on_group(rig.group) == [progs.info(install.program_path(instance, install.ULP)).id]
    told = asyncio.run(teardown.remove(instance))
    assert on_group(rig.group) == [] and any(name in each for each in told)
