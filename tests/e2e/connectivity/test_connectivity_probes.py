"""What a connectivity test's questions find out, on a network that answers, refuses, is silent, or is too narrow.

a 10.9.1.2 ---- router ---- 10.9.2.2 b
                      MTU 1400
"""

from __future__ import annotations

import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from services.common.kernel import netns, sysctl
from services.ctl.connectivity import runner
from services.ctl.connectivity.model import KINDS, POD, PORT, Probe, Source, Target
from services.ctl.connectivity.responder import Responder
from tests import session

B = ("10.9.2.2", "fd09:2::2")
QUICK = runner.Pace(wait_s=0.15, tries=3)
"""For what nobody will answer."""


class Net:
    """The three namespaces."""

    def __init__(self) -> None:
        self.prefix = session.name()

    def name(self, place: str) -> str:
        return f"{self.prefix}{place}"

    def path(self, place: str) -> str:
        return f"/run/netns/{self.name(place)}"

    def ip(self, place: str, *commands: str) -> None:
        argv = ["ip", "-netns", self.name(place), "-batch", "-"]
        subprocess.run(argv, input="\n".join(commands), text=True, check=True)

    @contextmanager
    def inside(self, place: str) -> Iterator[None]:
        with netns.NetNs.open(self.path(place)) as space, space.entered():
            yield

    def ask(
        self, *kinds: str, size: int = 0, addresses: tuple[str, ...] = B, pace: runner.Pace | None = None
    ) -> list[Probe]:
        """Ask from a; in the order of kinds, then addresses."""
        a = Source("a", "a", self.path("a"), frozenset(), frozenset({4, 6}), True)
        probes = [
            Probe(a, Target("b", "b", POD, address), kind, size)
            for kind in kinds or KINDS
            for address in addresses
        ]
        runner.run(probes, pace or runner.Pace())
        return probes


@pytest.fixture
def net() -> Iterator[Net]:
    made = Net()
    places = {"a": 1, "b": 2, "r": 0}
    try:
        for place in places:
            netns.add(Path(made.path(place)))
            with made.inside(place):
                # A router asks for neighbours from its link-local address: not until that has been checked.
                for which in ("all", "default"):
                    sysctl.ensure(f"net/ipv6/conf/{which}/accept_dad", 0)
        for place, number in list(places.items())[:2]:
            mtu = 1400 if place == "b" else 1500
            made.ip("r", f"link add name {place} mtu {mtu} type veth peer name eth0 mtu {mtu} netns {made.name(place)}",
                    f"address add 10.9.{number}.1/24 dev {place}", f"address add fd09:{number}::1/64 dev {place} nodad",
                    f"link set dev {place} up")  # fmt: skip
            made.ip(place, "link set lo up", f"address add 10.9.{number}.2/24 dev eth0",
                    f"address add fd09:{number}::2/64 dev eth0 nodad", "link set eth0 up",
                    f"route add default via 10.9.{number}.1", f"route add default via fd09:{number}::1")  # fmt: skip
        with made.inside("r"):
            for key in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
                sysctl.ensure(key, 1)
        yield made
    finally:
        for place in places:
            netns.remove(Path(made.path(place)))


def test_nothing_needs_to_run_at_a_target(net: Net) -> None:
    probes = net.ask("icmp", "tcp", "udp")
    assert [(p.ok, p.detail) for p in probes] == [
        (True, ""), (True, ""), (True, "refused"), (True, "refused"), (True, "refused"), (True, "refused"),
    ]  # fmt: skip
    assert all(0 < p.ms < 3000 for p in probes)


def test_a_responder_answers_with_data(net: Net) -> None:
    with Responder([net.path("b")], PORT):
        probes = net.ask("tcp", "udp")
    assert [(p.ok, p.detail) for p in probes] == [
        (True, "256 KiB there and back"), (True, "256 KiB there and back"), (True, "answered"), (True, "answered"),
    ]  # fmt: skip
    # It is gone afterwards, and may be there twice.
    assert {p.detail for p in net.ask("tcp")} == {"refused"}
    with Responder([net.path("b")], PORT), Responder([net.path("b"), "/run/netns/none"], PORT):
        assert {p.detail for p in net.ask("udp")} == {"answered"}


def test_a_responder_answers_from_the_address_that_was_asked(net: Net) -> None:
    net.ip("b", "address add 192.0.2.7/32 dev lo", "address add 2001:db8::7/128 dev lo")
    net.ip("r", "route add 192.0.2.7 via 10.9.2.2", "route add 2001:db8::7 via fd09:2::2")
    with Responder([net.path("b")], PORT):
        probes = net.ask("udp", "tcp", addresses=("192.0.2.7", "2001:db8::7"))
    assert {(p.ok, p.detail) for p in probes} == {(True, "answered"), (True, "256 KiB there and back")}


def test_somebody_else_s_listener_counts_as_reached(net: Net) -> None:
    import socket

    with net.inside("b"):
        server = socket.create_server(("", PORT))
    said = threading.Thread(target=lambda: server.accept()[0].sendall(b"220 hello\r\n"))
    said.start()
    with server:
        assert [(p.ok, p.detail) for p in net.ask("tcp", addresses=B[:1])] == [(True, "accepted")]
        said.join()
        # One that says nothing at all.
        assert [(p.ok, p.detail) for p in net.ask("tcp", addresses=B[:1], pace=runner.Pace(wait_s=0.5))] == [(True, "accepted")]


def test_silence_is_a_failure_of_every_kind(net: Net) -> None:
    net.ip("r", "route add blackhole 10.9.9.9/32", "route add blackhole fd09:9::9/128")
    with net.inside("r"):
        subprocess.run(["nft", "-f", "-"], check=True, text=True, input="""
            table inet t { chain f { type filter hook forward priority 0; policy drop; }; }""")  # fmt: skip
    probes = net.ask(pace=QUICK)
    assert not any(p.ok for p in probes)
    assert {p.detail for p in probes if p.kind != "large"} == {"no answer within 0.45 s"}
    # What the network says is passed on.
    net.ip("r", "route add unreachable 10.8.0.0/16")
    assert [p.detail for p in net.ask("icmp", "tcp", addresses=("10.8.0.1",))] == ["no route to host"] * 2


def test_what_fits_is_found_out_and_told(net: Net) -> None:
    probes = net.ask("large", size=1500)
    assert [(p.ok, p.passed) for p in probes] == [(True, 1400), (True, 1400)]
    # With nothing to expect: what the route is known to take.
    assert [(p.ok, p.passed) for p in net.ask("large")] == [(True, 1400), (True, 1400)]
    assert [(p.ok, p.passed) for p in net.ask("large", size=1280)] == [(True, 1280), (True, 1280)]


def test_a_black_hole_for_large_packets_is_seen(net: Net) -> None:
    """The router drops what is too large and says nothing: the first sign of a wrong MTU."""
    with net.inside("r"):
        subprocess.run(["nft", "-f", "-"], check=True, text=True, input="""
            table inet t { chain f { type filter hook forward priority 0; meta length > 1300 drop; }; }""")  # fmt: skip
    with Responder([net.path("b")], PORT):
        probes = net.ask("icmp", "large", "tcp", pace=runner.Pace(wait_s=0.5))
    assert [p.ok for p in probes] == [True, True, False, False, False, False]
    assert probes[2].detail.startswith("1400 bytes: no answer")
    assert "stands still after 0 of 256 KiB" in probes[4].detail


def test_a_namespace_that_is_gone_is_said(net: Net) -> None:
    gone = Source("x", "x", "/run/netns/not-there", frozenset(), frozenset({4}), True)
    probe = Probe(gone, Target("b", "b", POD, B[0]), "icmp")
    runner.run([probe], QUICK)
    assert not probe.ok and "cannot ask from there" in probe.detail


def test_many_questions_are_asked_at_once(net: Net) -> None:
    """300 silent addresses in five windows, not one after the other."""
    net.ip("r", "route add blackhole 10.7.0.0/16")
    with net.inside("r"):
        sysctl.ensure("net/ipv4/icmp_ratelimit", 0)
    a = Source("a", "a", net.path("a"), frozenset(), frozenset({4}), True)
    probes = [Probe(a, Target("x", "x", POD, f"10.7.{i // 250}.{i % 250}"), "icmp") for i in range(300)]
    told: list[int] = []
    runner.run(probes, QUICK, told.append)
    assert told == [300]
    assert not any(p.ok for p in probes)
    assert all("no answer" in p.detail or "invalid" in p.detail or "unreach" in p.detail for p in probes), {
        p.detail for p in probes
    }
