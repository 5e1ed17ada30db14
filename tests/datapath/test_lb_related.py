"""What belongs to a connection without having its ports: ICMP errors about its packets, and later fragments."""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP, fragment
from scapy.layers.inet6 import (
    ICMPv6DestUnreach,
    ICMPv6PacketTooBig,
    ICMPv6TimeExceeded,
    IPv6,
    IPv6ExtHdrFragment,
    fragment6,
)
from scapy.layers.l2 import Ether

from services.common.pipeline import abi as pipeline
from services.common.pipeline.reasons import Reason
from services.identity.network.install import FROM_OVERLAY
from services.identity.numbers import Reserved
from tests.datapath.cluster import OVERLAY, UNDERLAY, Tunnel
from tests.datapath.harness import REDIRECT, UNSPEC, A, B
from tests.datapath.lbkit import (
    CLIENT,
    HAIRPIN,
    NODE,
    ROUTER,
    SERVER,
    VIP,
    Uplink,
    answer,
    arriving,
    exact,
    outside,
    own,
    rewritten,
)  # fmt: skip
from tests.datapath.packets import ether, ip
from tests.datapath.test_between_nodes import IDENTITY, PEER, host, inner

BOTH = pytest.mark.parametrize("family", [4, 6])
EACH = pytest.mark.parametrize("layer", [TCP, UDP])


def error(about: Any, src: str, kind: str = "mtu", length: int = 0) -> Any:
    """An error of `src` about an IP packet, which is quoted in full or up to so many bytes."""
    quote = bytes(about)[: length or None]
    if isinstance(about, IP):
        header = {
            "mtu": ICMP(type=3, code=4, nexthopmtu=1280),
            "port": ICMP(type=3, code=3),
            "hops": ICMP(type=11),
        }[kind]
        return IP(src=src, dst=about.src) / header / quote
    made = {
        "mtu": ICMPv6PacketTooBig(mtu=1280),
        "port": ICMPv6DestUnreach(code=4),
        "hops": ICMPv6TimeExceeded(),
    }[kind]
    return IPv6(src=src, dst=about.src) / made / quote


def check(got: bytes, about: bytes, src: str, dst: str) -> None:
    """The error is whole, from `src` to `dst`, and quotes the beginning of `about`."""
    assert exact(got) == got
    packet = Ether(got)[1]
    assert (packet.src, packet.dst) == (src, dst)
    quote = bytes(packet)[28 if isinstance(packet, IP) else 48 :]
    assert quote == about[: len(quote)]


def original(seen: Any, src: str, dst: str, sport: int, dport: int) -> bytes:
    """A packet as one party saw it, with the ends that the other knows."""
    return rewritten(seen, src, dst, sport, dport, ttl=seen[1].ttl if IP in seen else seen[1].hlim)


@BOTH
@EACH
@pytest.mark.parametrize("length", [0, 28])
@pytest.mark.parametrize("kind", ["mtu", "port", "hops"])
def test_about_what_a_client_outside_sent(
    uplink: Uplink, family: int, layer: Any, length: int, kind: str
) -> None:
    uplink.lab.serve(family, [(SERVER[family], 8080)], layer)
    there = uplink.sends(outside(family, ttl=9) / layer(sport=7, dport=80) / b"abcdefghijklmnopqrst")
    about = original(there, CLIENT[family], VIP[family], 7, 80)
    length = length and (length if family == 4 else 48)
    for source in (SERVER[family], ROUTER[family]):
        said = error(there[1], source, kind, length)
        action, data = uplink.run(arriving(said))
        assert action == REDIRECT
        check(data, about, VIP[family], CLIENT[family])


@BOTH
@EACH
def test_about_what_a_client_outside_sent_to_a_pod_here(uplink: Uplink, family: int, layer: Any) -> None:
    uplink.lab.serve(family, [(own(A, family), 8080)], layer)
    there = uplink.sends(outside(family, ttl=9) / layer(sport=7, dport=80) / b"abc")
    result = uplink.from_pod(ether() / error(there[1], own(A, family), "port"))
    assert result.action == REDIRECT
    check(result.data, original(there, CLIENT[family], VIP[family], 7, 80), VIP[family], CLIENT[family])


@BOTH
@EACH
def test_about_what_a_pod_sent(uplink: Uplink, family: int, layer: Any) -> None:
    uplink.lab.cluster.know(host(PEER[family]), IDENTITY, OVERLAY)
    uplink.lab.serve(family, [(PEER[family], 8080)], layer)
    there = Ether(
        uplink.lab.dp.run(bytes(ether() / ip(VIP[family], family) / layer(sport=7, dport=80) / b"abc")).data
    )
    said = inner() / error(there[1], PEER[family], "port")
    result = uplink.lab.cluster.run(bytes(said), FROM_OVERLAY, Tunnel.of(UNDERLAY[OVERLAY][0], IDENTITY))
    assert (result.verdict, result.event.dst_id) == (pipeline.Verdict.DELIVERED, A.id)
    about = original(there, own(A, family), VIP[family], 7, 80)
    check(result.data, about, VIP[family], own(A, family))
    # By the stack, of a router on the way.
    frame = Ether(src="02:00:00:00:00:01", dst=bytes(A.pod_mac).hex(":"))
    result = uplink.lab.dp.run(bytes(frame / error(there[1], ROUTER[family])), "fib_to_pod")
    assert result.action == UNSPEC
    check(result.data, about, ROUTER[family], own(A, family))


@BOTH
@EACH
def test_a_pod_that_refuses_itself(uplink: Uplink, family: int, layer: Any) -> None:
    uplink.lab.serve(family, [(own(A, family), 8080)], layer)
    there = Ether(
        uplink.lab.dp.run(bytes(ether() / ip(VIP[family], family) / layer(sport=7, dport=80) / b"abc")).data
    )
    assert there[1].src == HAIRPIN[family]
    result = uplink.lab.dp.run(bytes(ether() / error(there[1], own(A, family), "port")))
    assert (result.verdict, result.event.dst_id) == (pipeline.Verdict.DELIVERED, A.id)
    check(result.data, original(there, own(A, family), VIP[family], 7, 80), VIP[family], own(A, family))


@BOTH
@EACH
def test_about_what_a_server_answered(uplink: Uplink, family: int, layer: Any) -> None:
    uplink.lab.serve(family, [(SERVER[family], 8080)], layer)
    there = uplink.sends(outside(family) / layer(sport=7, dport=80))
    back = uplink.sends(answer(bytes(there), layer) / b"abc")
    action, data = uplink.run(arriving(error(back[1], ROUTER[family])))
    assert action == REDIRECT
    check(
        data,
        original(back, SERVER[family], NODE[family], 8080, there[layer].sport),
        NODE[family],
        SERVER[family],
    )


@BOTH
@EACH
def test_about_what_a_pod_here_answered(uplink: Uplink, family: int, layer: Any) -> None:
    uplink.lab.serve(family, [(own(A, family), 8080)], layer)
    there = uplink.sends(outside(family) / layer(sport=7, dport=80))
    back = Ether(uplink.from_pod(ether() / answer(bytes(there), layer) / b"abc").data)
    action, data = uplink.run(arriving(error(back[1], ROUTER[family])))
    assert action == REDIRECT and uplink.event().dst_id == A.id
    check(data, original(back, own(A, family), CLIENT[family], 8080, 7), ROUTER[family], own(A, family))


@BOTH
@EACH
def test_about_what_a_pod_elsewhere_answered(uplink: Uplink, family: int, layer: Any) -> None:
    uplink.lab.cluster.know(host(PEER[family]), IDENTITY, OVERLAY)
    uplink.lab.serve(family, [(PEER[family], 8080)], layer)
    there = uplink.sends(outside(family) / layer(sport=7, dport=80))
    with uplink.netns.entered():
        reply = bytes(inner() / answer(bytes(there), layer) / b"abc")
        back = Ether(
            uplink.lab.cluster.run(reply, FROM_OVERLAY, Tunnel.of(UNDERLAY[OVERLAY][0], IDENTITY)).data
        )
    action, data = uplink.run(arriving(error(back[1], ROUTER[family])))
    event = uplink.event()
    assert (action, event.verdict, event.src_identity) == (
        REDIRECT,
        pipeline.Verdict.TO_OVERLAY,
        Reserved.REMOTE_NODE,
    )
    check(
        data, original(back, PEER[family], NODE[family], 8080, there[layer].sport), NODE[family], PEER[family]
    )


@BOTH
def test_errors_that_concern_nobody_go_on(uplink: Uplink, family: int) -> None:
    uplink.lab.serve(family, [(SERVER[family], 8080)])
    uplink.lab.tables.node_address(NODE[family])
    header = IP if family == 4 else IPv6
    about = header(src=NODE[family], dst=SERVER[family]) / TCP(sport=2000, dport=8080)
    uplink.passes(error(about, SERVER[family]))
    uplink.passes(error(header(src=NODE[family], dst=SERVER[family]) / b"", SERVER[family]))
    packet = ether() / error(header(src=own(A, family), dst=own(B, family)) / TCP(), own(A, family))
    packet[1].dst = own(B, family)
    assert uplink.lab.dp.run(bytes(packet)).data[14:] == rewritten(packet)


# -- fragments


def fragments(family: int, packet: Any) -> list[Any]:
    if family == 4:
        return list(fragment(packet, 600))
    whole = (
        IPv6(src=packet.src, dst=packet.dst, hlim=packet.hlim) / IPv6ExtHdrFragment(id=77) / packet.payload
    )
    return list(fragment6(whole, 700))


def joined(family: int, parts: list[Any]) -> bytes:
    """What is behind the IP headers, put together."""
    return b"".join(
        bytes(part.payload) if family == 4 else bytes(part[IPv6ExtHdrFragment].payload) for part in parts
    )


@BOTH
def test_fragments_follow_their_first(uplink: Uplink, family: int) -> None:
    uplink.lab.serve(family, [(SERVER[family], 8080)], UDP)
    packet = outside(family, ttl=9) / UDP(sport=7, dport=80) / (bytes(range(250)) * 7)
    packet = type(packet)(bytes(packet))
    parts = fragments(family, packet)
    assert len(parts) >= 3
    sent = [Ether(uplink.run(arriving(part))[1])[1] for part in parts]
    assert all((part.src, part.dst) == (NODE[family], SERVER[family]) for part in sent)
    whole = type(packet)(src=NODE[family], dst=SERVER[family]) / UDP(joined(family, sent))
    given = whole[UDP].chksum
    assert whole[UDP].dport == 8080 and bytes(whole[UDP].payload) == bytes(packet[UDP].payload)
    del whole[UDP].chksum
    assert type(whole)(bytes(whole))[UDP].chksum == given
    # The answer, in fragments as well.
    reply = (
        type(packet)(src=SERVER[family], dst=NODE[family])
        / UDP(sport=8080, dport=whole[UDP].sport)
        / bytes(1700)
    )
    back = [Ether(uplink.run(arriving(part))[1])[1] for part in fragments(family, type(packet)(bytes(reply)))]
    assert {(part.src, part.dst) for part in back} == {(VIP[family], CLIENT[family])}
    answer_ = UDP(joined(family, back))
    assert (answer_.sport, answer_.dport) == (80, 7)


@BOTH
def test_a_fragment_alone_is_dropped(uplink: Uplink, family: int) -> None:
    uplink.lab.serve(family, [(SERVER[family], 8080)], UDP)
    packet = outside(family) / UDP(sport=9, dport=80) / bytes(1700)
    later = fragments(family, type(packet)(bytes(packet)))[1]
    if family == 4:
        later.id = 4242
    else:
        later[IPv6ExtHdrFragment].id = 4242
    assert uplink.drops(later) == Reason.LB_FRAGMENT
    pod = ether() / type(later)(bytes(later))
    pod[1].src = own(A, family)
    assert uplink.lab.dp.run(bytes(pod)).reason == Reason.LB_FRAGMENT


@BOTH
def test_fragments_of_a_pod(uplink: Uplink, family: int) -> None:
    uplink.lab.serve(family, [(own(B, family), 8080)], UDP)
    packet = ip(VIP[family], family) / UDP(sport=7, dport=80) / bytes(1700)
    for part in fragments(family, type(packet)(bytes(packet))):
        result = uplink.lab.dp.run(bytes(ether() / part))
        assert (Ether(result.data)[1].dst, result.event.dst_id) == (own(B, family), B.id)
