"""The host as an endpoint: at the uplink, and beside the policies of its pods."""

from __future__ import annotations

import contextlib
import errno
import socket
import subprocess
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
from scapy.layers.inet import ICMP, IP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach, ICMPv6EchoRequest, ICMPv6ND_NS, IPv6
from scapy.layers.l2 import ARP, Dot1Q, Ether
from scapy.layers.vxlan import VXLAN

from services.common.kernel import netlink as nl
from services.common.kernel import netns, progs, tc_classic
from services.common.kernel.netlink import Rtnl
from services.common.kernel.netns import NetNs
from services.common.pipeline.reasons import Reason
from services.identity.numbers import Reserved
from services.policy import abi, install
from tests import session
from tests.datapath import policykit as kit
from tests.datapath.cluster import DIRECT, HERE, HOST_MAC, OVERLAY_PORT, ROUTED, Cluster
from tests.datapath.harness import REDIRECT, UNSPEC, Datapath
from tests.datapath.lbkit import exact
from tests.datapath.policykit import ALL, NONE, REJECT, WORLD, Rig, only, refuse
from tests.datapath.test_between_nodes import IDENTITY, PEER

BOTH = pytest.mark.parametrize("family", [4, 6])
OWN = {4: "192.168.7.1", 6: "fd77::1"}
NODE = {4: "192.168.7.4", 6: "fd77::4"}
PROBE = 4242
MARK = 0x66


@pytest.fixture
def cluster(network: None, dp: Datapath) -> Iterator[Cluster]:
    made = Cluster(dp)
    for family, bits in ((4, 32), (6, 128)):
        made.know(f"{OWN[family]}/{bits}", Reserved.HOST, HERE)
        made.know(f"{NODE[family]}/{bits}", Reserved.REMOTE_NODE, ROUTED)
    yield made
    made.close()


@pytest.fixture
def rig(rig: Rig, cluster: Cluster) -> Rig:
    rig.configure(probe_port=PROBE)
    return rig


def comes(rig: Rig, packet: Any, **options: Any) -> kit.Seen:
    """To the uplink."""
    return rig.run(
        Ether(src="02:00:00:00:00:fe", dst="02:00:00:00:00:11") / packet,
        install.HOST_IN,
        rig.space.uplink,
        **options,
    )


def leaves(rig: Rig, packet: Any) -> kit.Seen:
    """By the uplink. Test runs have a socket without ports, as raw ones have: TCP and UDP look as if they were forwarded."""
    return rig.run(
        Ether(src="02:00:00:00:00:11", dst="02:00:00:00:00:fe") / packet, install.HOST_OUT, rig.space.uplink
    )


def syn(family: int, port: int = 22, src: str = "", sport: int = 4000) -> Any:
    return kit.header(src or WORLD[family], OWN[family]) / TCP(sport=sport, dport=port, flags="S")


def ping(family: int, src: str, dst: str) -> Any:
    return kit.header(src, dst) / (ICMP(id=7) if family == 4 else ICMPv6EchoRequest(id=7))


# ---- at the uplink ------------------------------------------------------------------------------------------
@BOTH
def test_without_a_policy_all_passes(rig: Rig, family: int) -> None:
    assert comes(rig, syn(family)).passed
    assert leaves(rig, ping(family, OWN[family], WORLD[family])).passed
    assert not rig.entries(False) and not rig.entries()


@BOTH
def test_what_comes_is_asked_about(rig: Rig, family: int) -> None:
    revision = rig.policy(0, [[NONE], [only((6, 22, 22))]], None, peers={Reserved.WORLD: 1})
    rig.events()
    assert comes(rig, syn(family, 22)).passed
    assert comes(rig, syn(family, 23)).reason is Reason.POLICY_DEFAULT
    (event,) = rig.events()
    assert (event.src_id, event.dst_id, event.src_identity, event.dst_identity) == (
        0,
        0,
        Reserved.WORLD,
        Reserved.HOST,
    )
    assert (event.revision, event.direction) == (revision, 0)
    assert comes(rig, syn(family, 22, NODE[family])).reason is Reason.POLICY_DEFAULT
    # An address of its own, or one that comes by the overlay, is nobody's by the uplink.
    assert comes(rig, syn(family, 22, OWN[family], 4001)).passed
    entry, _ = rig.entries(False)[0]
    assert entry.proto == 6 and len(rig.entries(False)) == 2


@BOTH
def test_what_leaves_is_asked_about_and_answers_are_not(rig: Rig, family: int) -> None:
    request, proto = (8 if family == 4 else 128), kit.ICMP[family]
    rig.policy(0, NONE, only((proto, request, request)))
    answer = ping(family, WORLD[family], OWN[family])
    answer[1].type = 0 if family == 4 else 129
    assert not comes(rig, answer).passed
    assert leaves(rig, ping(family, OWN[family], WORLD[family])).passed
    assert comes(rig, answer).passed
    rig.policy(0, NONE, NONE)
    assert comes(rig, answer).reason is Reason.POLICY_REVOKED
    assert leaves(rig, ping(family, OWN[family], WORLD[family])).reason is Reason.POLICY_REVOKED


@BOTH
def test_what_is_masqueraded_is_noted_and_answered(rig: Rig, family: int) -> None:
    rig.policy(0, NONE, NONE)
    there = kit.header(OWN[family], WORLD[family]) / TCP(sport=4000, dport=80, flags="S")
    here = kit.header(WORLD[family], OWN[family]) / TCP(sport=80, dport=4000, flags="SA")
    assert not comes(rig, here).passed
    assert leaves(rig, there).passed
    assert comes(rig, here).passed
    there[TCP].flags = "A"
    assert leaves(rig, there).passed and rig.entry()[1]
    rig.policy(0, NONE, NONE)
    assert comes(rig, here).passed and leaves(rig, there).passed
    assert not comes(
        rig, kit.header(WORLD[family], OWN[family]) / TCP(sport=80, dport=4001, flags="A")
    ).passed


@BOTH
def test_what_answers_late_is_the_hosts(rig: Rig, family: int) -> None:
    """A pod and somebody outside must not open a port of the host by a datagram that was masqueraded."""
    rig.policy(0, NONE, NONE)
    rig.configure(any_s=120)
    there = kit.header(OWN[family], WORLD[family]) / UDP(sport=53, dport=4000)
    here = kit.header(WORLD[family], OWN[family]) / UDP(sport=4000, dport=53)
    assert leaves(rig, there).passed and comes(rig, here).passed
    assert leaves(rig, there).passed and rig.entry()[1]
    rig.age(30)
    assert comes(rig, here).passed
    rig.age(31)
    assert not comes(rig, here).passed


@BOTH
def test_what_is_not_the_hosts_is_left_alone(rig: Rig, family: int) -> None:
    rig.policy(0, refuse(), refuse())
    assert comes(rig, kit.header(WORLD[family], kit.own(rig.a, family)) / TCP(dport=80)).passed
    assert leaves(rig, kit.header(kit.own(rig.a, family), WORLD[family]) / TCP(dport=80)).passed
    assert leaves(
        rig, kit.header("198.51.100.9" if family == 4 else "2001:db8:9::9", WORLD[family]) / TCP(dport=80)
    ).passed
    group = "224.0.0.251" if family == 4 else "ff02::fb"
    assert leaves(rig, kit.header(OWN[family], group) / UDP(sport=5353, dport=5353)).passed
    assert rig.run(
        Ether(src="02:00:00:00:00:fe", dst="02:00:00:00:00:11") / ARP(), install.HOST_IN, rig.space.uplink
    ).passed
    tagged = Ether(src="02:00:00:00:00:fe", dst="02:00:00:00:00:11") / Dot1Q(vlan=5) / syn(family)
    assert rig.run(tagged, install.HOST_IN, rig.space.uplink).passed
    assert not rig.entries(False)


def test_other_addresses_of_the_host_are_the_hosts_too(rig: Rig) -> None:
    """What the stack would keep, and link-local ones."""
    rig.policy(0, refuse(), None)
    assert not comes(rig, IP(src=WORLD[4], dst="198.51.100.77") / TCP(dport=22, flags="S")).passed
    assert not comes(rig, IPv6(src="fe80::1", dst="fe80::2") / TCP(dport=22, flags="S")).passed


@BOTH
@pytest.mark.parametrize("mac", ["ff:ff:ff:ff:ff:ff", "01:00:5e:00:00:01"])
def test_frames_to_all_or_many_reach_the_host_by_its_address(rig: Rig, family: int, mac: str) -> None:
    """The stack takes datagrams by their address, whatever the frame says; what is for all is nobody's in particular."""
    rig.policy(0, refuse(), None)

    def frame(packet: Any) -> kit.Seen:
        return rig.run(Ether(src="02:00:00:00:00:fe", dst=mac) / packet, install.HOST_IN, rig.space.uplink)

    datagram = UDP(sport=4000, dport=9)
    assert frame(kit.header(WORLD[family], OWN[family]) / datagram).reason is Reason.POLICY_DENIED
    group = "224.0.0.251" if family == 4 else "ff02::fb"
    assert frame(kit.header(WORLD[family], group) / datagram).passed
    assert frame(ARP()).passed
    assert rig.run(
        Ether(src="02:00:00:00:00:fe", dst="02:00:00:00:00:99") / kit.header(WORLD[family], OWN[family]) / datagram,
        install.HOST_IN,
        rig.space.uplink,
    ).passed


def test_what_the_host_sends_to_all_of_its_network_is_left_alone(rig: Rig, cluster: Cluster) -> None:
    """Its broadcast address is known as its own, for pods that send there."""
    cluster.know("192.168.7.255/32", Reserved.HOST, HERE)
    rig.policy(0, refuse(), refuse())
    assert leaves(rig, ping(4, OWN[4], "192.168.7.255")).passed
    assert not leaves(rig, ping(4, OWN[4], "192.168.7.254")).passed


@BOTH
def test_what_passes_whatever_policy_says(rig: Rig, family: int) -> None:
    rig.policy(0, refuse(), refuse(), flags=abi.EpFlag.LOCKDOWN)
    about = kit.header(OWN[family], WORLD[family]) / UDP(sport=1, dport=2)
    unreachable = (ICMP(type=3) if family == 4 else ICMPv6DestUnreach()) / bytes(about)
    passing = [
        kit.header(NODE[family], OWN[family]) / UDP(sport=40000, dport=OVERLAY_PORT),
        kit.header(NODE[family], OWN[family]) / UDP(sport=40000, dport=PROBE),
        kit.header(NODE[family], OWN[family]) / UDP(sport=PROBE + 1, dport=PROBE),
        kit.header(WORLD[family], OWN[family]) / unreachable,
    ]
    client, server = (68, 67) if family == 4 else (546, 547)
    passing.append(kit.header(WORLD[family], OWN[family]) / UDP(sport=server, dport=client) / bytes(64))
    if family == 6:
        passing.append(IPv6(src="fe80::1", dst=OWN[6], hlim=255) / ICMPv6ND_NS(tgt=OWN[6]))
    for packet in passing:
        assert comes(rig, packet).passed, packet.summary()
    assert leaves(rig, kit.header(OWN[family], WORLD[family]) / unreachable).passed
    refused = [
        kit.header(WORLD[family], OWN[family]) / UDP(sport=40000, dport=OVERLAY_PORT),
        kit.header(WORLD[family], OWN[family]) / UDP(sport=40000, dport=PROBE),
        kit.header(NODE[family], OWN[family]) / UDP(sport=40000, dport=53),
        kit.header(NODE[family], OWN[family]) / UDP(sport=PROBE, dport=53),
        kit.header(WORLD[family], OWN[family]) / UDP(sport=client, dport=server) / bytes(64),
    ]
    for packet in refused:
        assert not comes(rig, packet).passed, packet.summary()


def test_lockdown_and_audit(rig: Rig) -> None:
    rig.policy(0, ALL, ALL, flags=abi.EpFlag.LOCKDOWN)
    assert comes(rig, syn(4)).reason is Reason.POLICY_LOCKDOWN
    assert leaves(rig, ping(4, OWN[4], WORLD[4])).reason is Reason.POLICY_LOCKDOWN
    rig.policy(0, refuse(), refuse(), flags=abi.EpFlag.AUDIT)
    assert comes(rig, syn(4)).passed
    rig.policy(0, refuse(), refuse())
    rig.configure(flags=abi.ConfigFlag.AUDIT)
    assert comes(rig, syn(4)).passed


@BOTH
def test_refusals_at_the_uplink(rig: Rig, family: int) -> None:
    rig.policy(0, refuse(kit.DENY | REJECT), refuse(kit.DENY | REJECT))
    seen = comes(rig, syn(family))
    assert seen.action == REDIRECT and exact(seen.data) == seen.data
    got: Any = Ether(seen.data)
    assert (got[1].src, got[1].dst, str(got[TCP].flags)) == (OWN[family], WORLD[family], "RA")
    assert leaves(rig, got[1]).passed
    seen = leaves(rig, ping(family, OWN[family], WORLD[family]))
    assert (seen.action, seen.mark) == (REDIRECT, MARK) and exact(seen.data) == seen.data
    got = Ether(seen.data)
    assert (got.src, got.dst) == ("02:00:00:00:00:fe", "02:00:00:00:00:11")
    assert (got[1].src, got[1].dst) == (WORLD[family], OWN[family])
    reset = kit.header(WORLD[family], OWN[family]) / TCP(sport=80, dport=4000, flags="RA")
    assert not comes(rig, reset).passed
    after = comes(rig, reset, mark=MARK)
    assert (after.passed, after.mark) == (True, 0)


# ---- with pods ----------------------------------------------------------------------------------------------
@BOTH
def test_a_pod_that_speaks_to_the_host(rig: Rig, family: int) -> None:
    """Both policies are asked, and both again when they change."""
    rig.policy(rig.a, NONE, only((6, 80, 81)))
    assert rig.packet(rig.a, OWN[family], TCP(sport=4000, dport=81, flags="S"), family).passed
    rig.policy(0, [[NONE], [only((6, 80, 80))]], [[NONE], [NONE]], peers={rig.a.identity: 1})
    there, here = TCP(sport=4000, dport=80, flags="S"), TCP(sport=80, dport=4000, flags="SA")
    assert (
        rig.packet(rig.a, OWN[family], TCP(sport=4000, dport=82, flags="S"), family).reason
        is Reason.POLICY_DEFAULT
    )
    assert (
        rig.packet(rig.a, OWN[family], TCP(sport=4001, dport=81, flags="S"), family).reason
        is Reason.POLICY_DEFAULT
    )
    rig.forget()
    assert rig.packet(rig.a, OWN[family], there, family).passed
    assert rig.packet(rig.a, OWN[family], here, family, back=True).passed
    there.flags, here.flags = "A", "A"
    assert rig.packet(rig.a, OWN[family], there, family).passed
    entry, established = rig.entry()
    assert established and all(entry.revision)
    checked = rig.stat(abi.Stat.CHECKED)
    assert rig.packet(rig.a, OWN[family], there, family).passed
    assert rig.packet(rig.a, OWN[family], here, family, back=True).passed
    assert rig.stat(abi.Stat.CHECKED) == checked
    rig.policy(0, NONE, NONE)
    assert rig.packet(rig.a, OWN[family], there, family).reason is Reason.POLICY_REVOKED
    assert rig.packet(rig.a, OWN[family], here, family, back=True).reason is Reason.POLICY_REVOKED
    rig.set_ep(0, 0, 0)
    assert rig.packet(rig.a, OWN[family], there, family).passed
    rig.policy(0, ALL, NONE)
    rig.policy(rig.a, NONE, NONE)
    assert rig.packet(rig.a, OWN[family], there, family).reason is Reason.POLICY_REVOKED


@BOTH
def test_the_host_that_speaks_to_a_pod(rig: Rig, family: int) -> None:
    rig.policy(rig.a, only((6, 80, 81)), NONE)
    rig.policy(0, [[NONE], [NONE]], [[NONE], [only((6, 80, 80))]], peers={rig.a.identity: 1})
    there, here = TCP(sport=4000, dport=80, flags="S"), TCP(sport=80, dport=4000, flags="SA")
    assert not rig.packet(rig.a, OWN[family], TCP(sport=4000, dport=81, flags="S"), family, back=True).passed
    assert not rig.packet(rig.a, OWN[family], TCP(sport=4000, dport=82, flags="S"), family, back=True).passed
    rig.forget()
    assert rig.packet(rig.a, OWN[family], there, family, back=True).passed
    assert rig.packet(rig.a, OWN[family], here, family).passed
    there.flags = "A"
    assert rig.packet(rig.a, OWN[family], there, family, back=True).passed
    assert rig.entry()[1]
    rig.policy(0, NONE, NONE)
    here.flags = "A"
    assert rig.packet(rig.a, OWN[family], here, family).reason is Reason.POLICY_REVOKED
    assert rig.packet(rig.a, OWN[family], there, family, back=True).reason is Reason.POLICY_REVOKED
    rig.configure(flags=abi.ConfigFlag.HOST)
    assert not rig.packet(rig.a, OWN[family], there, family, back=True).passed, "that is about pods' policies"


@BOTH
def test_refusals_between_pods_and_host(rig: Rig, family: int) -> None:
    rig.open_all()
    rig.policy(0, refuse(kit.DENY | REJECT), refuse(kit.DENY | REJECT))
    seen = rig.packet(rig.a, OWN[family], TCP(sport=4000, dport=80, flags="S"), family)
    assert seen.action == REDIRECT and exact(seen.data) == seen.data
    got: Any = Ether(seen.data)
    assert (got.dst, got[1].src) == ("02:00:00:00:01:14", OWN[family])
    seen = rig.packet(rig.a, OWN[family], TCP(sport=4000, dport=80, flags="S"), family, back=True)
    assert (seen.action, seen.mark) == (REDIRECT, MARK)
    after = rig.run(Ether(seen.data), "fib_from_pod", rig.a.ifindex, mark=MARK)
    assert (after.passed, after.action, after.mark) == (True, UNSPEC, 0)


# ---- in the overlay -----------------------------------------------------------------------------------------
GATEWAY = {4: "10.1.0.1", 6: "fd00:1::1"}


@BOTH
def test_what_comes_out_of_the_overlay_for_the_host(rig: Rig, cluster: Cluster, family: int) -> None:
    """Of pods of other nodes, and of nodes, whose probes are never asked about."""
    bits = 32 if family == 4 else 128
    cluster.know(f"{PEER[family]}/{bits}", IDENTITY, DIRECT)
    cluster.know(f"{GATEWAY[family]}/{bits}", Reserved.HOST, HERE)
    rig.know(IDENTITY)

    def arrives(layer: Any) -> kit.Seen:
        return rig.overlay(cluster, kit.header(PEER[family], GATEWAY[family]) / layer, IDENTITY, DIRECT)

    assert arrives(TCP(sport=4000, dport=81, flags="S")).passed
    rig.policy(
        0, [[NONE], [only((6, 80, 80), other=kit.DENY | REJECT)]], [[NONE], [NONE]], peers={IDENTITY: 1}
    )
    assert arrives(TCP(sport=4000, dport=80, flags="S")).passed
    seen = arrives(TCP(sport=4000, dport=81, flags="S"))
    assert (seen.action, seen.reason) == (REDIRECT, Reason.POLICY_DENIED)
    vxlan = VXLAN(bytes(Ether(seen.data)[UDP].payload))
    assert vxlan.vni == Reserved.REMOTE_NODE
    assert (vxlan[2].src, vxlan[2].dst) == (GATEWAY[family], PEER[family])
    assert not arrives(UDP(sport=4000, dport=PROBE)).passed
    cluster.know(f"{PEER[family]}/{bits}", Reserved.REMOTE_NODE, DIRECT)
    probe = kit.header(PEER[family], GATEWAY[family]) / UDP(sport=4000, dport=PROBE)
    assert rig.overlay(cluster, probe, Reserved.REMOTE_NODE, DIRECT).passed


@BOTH
def test_what_the_host_sends_into_the_overlay(rig: Rig, cluster: Cluster, family: int) -> None:
    """As remote-node, though its policy knows it as the host; pods that need the stack are not asked about again."""
    bits = 32 if family == 4 else 128
    request, proto = (8 if family == 4 else 128), kit.ICMP[family]
    cluster.know(f"{PEER[family]}/{bits}", IDENTITY, DIRECT)
    cluster.know(f"{GATEWAY[family]}/{bits}", Reserved.HOST, HERE)
    rig.know(IDENTITY)

    def sends(packet: Any) -> kit.Seen:
        return rig.run(
            Ether(src=HOST_MAC, dst="02:00:00:00:00:98") / packet, "fib_from_host", rig.space.uplink
        )

    message = ping(family, GATEWAY[family], PEER[family])
    answer = ping(family, PEER[family], GATEWAY[family])
    answer[1].type = 0 if family == 4 else 129
    assert sends(message).passed
    rig.policy(
        0,
        [[NONE], [NONE]],
        [[NONE], [only((proto, request, request), other=kit.DENY | REJECT)]],
        peers={IDENTITY: 1},
    )
    assert not rig.overlay(cluster, answer, IDENTITY, DIRECT).passed
    seen = sends(message)
    assert seen.passed and VXLAN(bytes(Ether(seen.data)[UDP].payload)).vni == Reserved.REMOTE_NODE
    assert rig.overlay(cluster, answer, IDENTITY, DIRECT).passed
    rig.policy(0, [[NONE], [NONE]], [[NONE], [refuse(kit.DENY | REJECT)]], peers={IDENTITY: 1})
    seen = sends(message)
    assert (seen.action, seen.reason, seen.mark) == (REDIRECT, Reason.POLICY_REVOKED, 0)
    got: Any = Ether(seen.data)
    assert (got.dst, got[1].src, got[1].dst) == (HOST_MAC, PEER[family], GATEWAY[family])
    seen = sends(ping(family, kit.own(rig.a, family), PEER[family]))
    assert seen.passed and VXLAN(bytes(Ether(seen.data)[UDP].payload)).vni == rig.a.identity


# ---- live ---------------------------------------------------------------------------------------------------
class Live:
    """A node with the programs at its uplink, and a machine outside."""

    def __init__(self, rig: Rig) -> None:
        self._exit = contextlib.ExitStack()
        self.node, self.outside = (self.space() for _ in range(2))
        with Rtnl(self.node) as node, Rtnl(self.outside) as outside:
            near = node.create_veth(
                "fbh0", "02:00:00:00:00:11", "fbh1", "02:00:00:00:00:fe", 1500, self.outside
            )
            far = outside.ifindex("fbh1")
            for space, rtnl, ifindex, number in ((self.node, node, near, 1), (self.outside, outside, far, 4)):
                mac = "02:00:00:00:00:fe" if number == 1 else "02:00:00:00:00:11"
                with space.entered():
                    for name in ("accept_dad", "router_solicitations"):
                        Path("/proc/sys/net/ipv6/conf/all", name).write_text("0")
                        Path(f"/proc/sys/net/ipv6/conf/fbh{number // 4}", name).write_text("0")
                rtnl.apply([
                    nl.link_up(1),
                    nl.link_up(ifindex),
                    nl.address_add(ifindex, ip_address(f"192.168.7.{number}"), 24),
                    nl.address_add(ifindex, ip_address(f"fd77::{number}"), 64),
                    *(nl.neighbour_put(ifindex, ip_address(f"{net}{5 - number}"), mac) for net in ("192.168.7.", "fd77::")),
                ])  # fmt: skip
        fds = {
            name: self._exit.enter_context(progs.opened(install.program_path(rig.dp.instance, name)))
            for name in (install.HOST_IN, install.HOST_OUT)
        }
        with self.node.entered():
            tc_classic.attach(near, {"ingress": fds[install.HOST_IN], "egress": fds[install.HOST_OUT]})

    def space(self) -> NetNs:
        path = Path(f"/run/netns/{session.name()}")
        netns.add(path)
        self._exit.callback(netns.remove, path)
        return self._exit.enter_context(NetNs.open(path))

    def close(self) -> None:
        self._exit.close()

    def socket(self, space: NetNs, family: int, kind: int = socket.SOCK_STREAM) -> socket.socket:
        made = self._exit.enter_context(
            space.socket(socket.AF_INET if family == 4 else socket.AF_INET6, kind)
        )
        made.settimeout(5)
        return made

    def listen(self, space: NetNs, family: int, port: int) -> socket.socket:
        made = self.socket(space, family)
        made.bind(("0.0.0.0" if family == 4 else "::", port))
        made.listen()
        return made

    def connect(self, space: NetNs, family: int, port: int) -> socket.socket:
        made = self.socket(space, family)
        made.connect(((OWN if space is self.outside else NODE)[family], port))
        return made


@pytest.fixture
def live(rig: Rig, cluster: Cluster) -> Iterator[Live]:
    cluster.forget()
    for family, bits in ((4, 32), (6, 128)):
        cluster.know(f"{OWN[family]}/{bits}", Reserved.HOST, HERE)
    made = Live(rig)
    yield made
    made.close()


@BOTH
def test_processes_of_the_host(rig: Rig, live: Live, family: int) -> None:
    ssh, http = live.listen(live.node, family, 22), live.listen(live.outside, family, 80)
    live.listen(live.node, family, 23), live.listen(live.outside, family, 81)
    rig.policy(
        0, [[only((6, 22, 22), other=kit.DENY | REJECT)]], [[only((6, 80, 80), other=kit.DENY | REJECT)]]
    )
    for server, space, port in ((ssh, live.outside, 22), (http, live.node, 80)):
        client = live.connect(space, family, port)
        accepted, _ = server.accept()
        for one, other in ((client, accepted), (accepted, client)):
            one.sendall(b"hello")
            assert other.recv(5) == b"hello"
        client.close()
        accepted.close()
        with pytest.raises(ConnectionRefusedError):
            live.connect(space, family, port + 1)


@BOTH
def test_connections_that_are_older_than_the_policy_go_on(rig: Rig, live: Live, family: int) -> None:
    """In both directions, whoever speaks first, until they end."""
    ssh, http = live.listen(live.node, family, 22), live.listen(live.outside, family, 80)
    pairs = []
    for server, space, port in (
        (ssh, live.outside, 22),
        (ssh, live.outside, 22),
        (http, live.node, 80),
        (http, live.node, 80),
    ):
        client = live.connect(space, family, port)
        pairs.append((client, server.accept()[0]))
    refused = refuse(kit.DENY | REJECT)
    rig.policy(0, refused, refused)
    for turn in range(3):
        for number, (client, server) in enumerate(pairs):
            for one, other in ((client, server), (server, client))[:: -1 if number % 2 else 1]:
                one.sendall(b"hello")
                assert other.recv(5) == b"hello"
        if turn == 1:
            rig.policy(0, refused, refused)
    for client, server in pairs:
        client.close()
        assert server.recv(1) == b""
        server.close()
    for space, port in ((live.outside, 22), (live.node, 80)):
        with pytest.raises(ConnectionRefusedError):
            live.connect(space, family, port)


@BOTH
def test_datagrams_of_the_host(rig: Rig, live: Live, family: int) -> None:
    rig.policy(0, NONE, [[only((17, 53, 53), other=kit.DENY | REJECT)]])
    server = live.socket(live.outside, family, socket.SOCK_DGRAM)
    server.bind(("0.0.0.0" if family == 4 else "::", 53))
    client = live.socket(live.node, family, socket.SOCK_DGRAM)
    client.sendto(b"?", (NODE[family], 53))
    data, peer = server.recvfrom(10)
    assert data == b"?"
    server.sendto(b"!", peer)
    assert client.recv(10) == b"!"
    other = live.socket(live.node, family, socket.SOCK_DGRAM)
    other.connect((NODE[family], 54))
    other.send(b"?")
    with pytest.raises(OSError) as told:
        other.recv(10)
    assert told.value.errno == (errno.EHOSTUNREACH if family == 4 else errno.EACCES)


@BOTH
@pytest.mark.parametrize("tags", [1, 2, 3, 4, 8])
def test_a_priority_is_no_way_past_policy(rig: Rig, live: Live, family: int, tags: int) -> None:
    """The stack takes what is tagged for VLAN 0 as if it were not tagged, however often it is."""
    rig.policy(0, only((17, 53, 53)), None)
    servers = {}
    for port in (53, 54):
        servers[port] = live.socket(live.node, family, socket.SOCK_DGRAM)
        servers[port].bind(("0.0.0.0" if family == 4 else "::", port))
    with live.outside.socket(socket.AF_PACKET, socket.SOCK_RAW) as raw:
        raw.bind(("fbh1", 0))
        for port in (54, 53):
            frame = Ether(src="02:00:00:00:00:fe", dst="02:00:00:00:00:11")
            for _ in range(tags):
                frame /= Dot1Q(vlan=0, prio=5)
            raw.send(bytes(frame / kit.header(NODE[family], OWN[family]) / UDP(sport=4000, dport=port) / b"hello"))
    if tags <= 3:
        assert servers[53].recv(10) == b"hello"
    else:
        # Nobody sends such things but to hide something.
        servers[53].settimeout(0.2)
        with pytest.raises(TimeoutError):
            servers[53].recv(10)
    servers[54].setblocking(False)
    with pytest.raises(BlockingIOError):
        servers[54].recv(10)


@BOTH
def test_what_others_send_in_the_hosts_name(rig: Rig, live: Live, family: int) -> None:
    """Masqueraded: the host's policy, which forbids everything, is not asked about it, nor about the answers."""
    inside = live.space()
    with Rtnl(live.node) as node, Rtnl(inside) as there:
        near = node.create_veth("fbh2", "02:00:00:00:00:12", "fbh3", "02:00:00:00:00:13", 1500, inside)
        far = there.ifindex("fbh3")
        for space, rtnl, ifindex, number in ((live.node, node, near, 1), (inside, there, far, 2)):
            with space.entered():
                Path("/proc/sys/net/ipv6/conf/all/accept_dad").write_text("0")
                Path(f"/proc/sys/net/ipv6/conf/fbh{number + 1}/accept_dad").write_text("0")
            rtnl.apply(
                [
                    nl.link_up(ifindex),
                    nl.address_add(ifindex, ip_address(f"10.77.0.{number}"), 24),
                    nl.address_add(ifindex, ip_address(f"fd00:77::{number}"), 64),
                ]
            )
        there.apply(
            [
                nl.route_put(ip_network("0.0.0.0/0"), far, ip_address("10.77.0.1")),
                nl.route_put(ip_network("::/0"), far, ip_address("fd00:77::1")),
            ]
        )
    with live.node.entered():
        for option in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
            Path("/proc/sys/net", option).write_text("1")
        rules = "add table inet t; add chain inet t p { type nat hook postrouting priority 100; }; "
        subprocess.run(["nft", rules + 'add rule inet t p oifname "fbh0" masquerade'], check=True)
    server = live.listen(live.outside, family, 80)
    refused = refuse(kit.DENY | REJECT)
    rig.policy(0, refused, refused)
    client = live.connect(inside, family, 80)
    accepted, peer = server.accept()
    assert peer[0] == OWN[family]
    for one, other in ((client, accepted), (accepted, client)) * 2:
        one.sendall(b"hello")
        assert other.recv(5) == b"hello"
    rig.policy(0, refused, refused)
    accepted.sendall(b"hello")
    assert client.recv(5) == b"hello"
    with pytest.raises(ConnectionRefusedError):
        live.connect(live.node, family, 80)
