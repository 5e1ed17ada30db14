"""Real packets between two pods through the attached programs, in namespaces of the test's own.

    pod A eth0 ---- a [node: from_pod, to_pod on each host side] b ---- eth0 pod B
    10.1.0.10       gateway 10.1.0.1, fd00:1::1                        10.1.0.11
    fd00:1::a                                                          fd00:1::b

The counters tell which way a packet took: past the stack (redirect_peer), or through it (then to_pod sees it).
"""

from __future__ import annotations

import contextlib
import os
import socket
import struct
import threading
import time
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from scapy.layers.inet import ICMP, IP, UDP
from scapy.layers.inet6 import ICMPv6PacketTooBig, ICMPv6TimeExceeded, IPv6
from scapy.layers.l2 import ARP, Ether

from services.common.instance import Instance
from services.common.kernel import attach, netns, podlink, progs
from services.common.kernel import netlink as nl
from services.common.kernel.netlink import Rtnl
from services.common.kernel.netns import NetNs
from services.common.pipeline import abi, install
from services.common.pipeline.counters import open_counters, read_counters
from services.common.pipeline.endpoints import AddrTable, IfaceTable
from services.common.pipeline.reasons import Reason
from tests import session

FROM_POD, TO_POD = int(abi.Direction.FROM_POD), int(abi.Direction.TO_POD)
# Multicast listener reports the node may send to each pod while a test runs, at most.
REPORTS = 10
GATEWAYS = ("10.1.0.1", "fd00:1::1")
FAMILIES = pytest.mark.parametrize("family", [4, 6])


class Live:
    """Two pods on one node, each a network namespace."""

    def __init__(self, instance: Instance, exit_stack: contextlib.ExitStack) -> None:
        self.instance = instance
        self.counters = exit_stack.enter_context(open_counters(instance))
        self.tables = [exit_stack.enter_context(contextlib.closing(kind(instance))) for kind in (IfaceTable, AddrTable)]
        prefix = session.name()
        self.spaces = {}
        for name in ("node", "a", "b"):
            path = Path(f"/run/netns/{prefix}-{name}")
            netns.add(path)
            exit_stack.callback(netns.remove, path)
            self.spaces[name] = exit_stack.enter_context(NetNs.open(path))
        exit_stack.callback(self._unplug)
        with self.spaces["node"].entered():
            for option in ("ipv4/ip_forward", "ipv6/conf/all/forwarding"):
                Path("/proc/sys/net", option).write_text("1")
            with Rtnl() as node:
                node.apply([nl.link_up(1), *(nl.address_add(1, ip_address(a)) for a in GATEWAYS)])
                self.pods = {"a": self._wire(node, "a", 10, 9000), "b": self._wire(node, "b", 11, 1500)}

    def _wire(self, node: Rtnl, name: str, number: int, mtu: int) -> abi.Endpoint:
        link = podlink.PodLink(
            host_ifname=name, host_mac=f"02:00:00:00:00:{number:02x}", pod_mac=f"02:00:00:00:01:{number:02x}", mtu=mtu,
            netns=self.spaces[name].path, v4=ip_address(f"10.1.0.{number}"), v6=ip_address(f"fd00:1::{number:x}"),
            gateway4=ip_address(GATEWAYS[0]), gateway6=ip_address(GATEWAYS[1]))
        ready: list[abi.Endpoint] = []

        def attach_programs(wired: podlink.WiredLink) -> None:
            pod = abi.Endpoint.of(
                id=number, ifindex=wired.host_ifindex, mac=link.pod_mac, host_mac=link.host_mac, mtu=mtu,
                ipv4=str(link.v4), ipv6=str(link.v6))
            self.put(pod)
            for direction, program in (("ingress", install.FROM_POD), ("egress", install.TO_POD)):
                with progs.opened(install.program_path(self.instance, program)) as fd:
                    attach.attach_tc(wired.host_ifindex, direction, fd)
            ready.append(pod)

        podlink.wire(node, link, attach_programs)
        return ready[0]

    def _unplug(self) -> None:
        """Now, not when the kernel gets to it: what devices say when they go is counted and reported as any other packet, and
        the interfaces of tests to come may have the same numbers.
        """
        with Rtnl(self.spaces["node"]) as node:
            for link in node.links():
                if link.kind == "veth":
                    node.delete_link(link.name)

    def put(self, pod: abi.Endpoint) -> None:
        interfaces, addresses = self.tables
        interfaces.update(pod.ifindex, pod)
        for address in (pod.ipv4, pod.ipv6):
            assert address is not None
            addresses.update(abi.FibAddr.of(address), pod)

    def socket(self, pod: str, family: int, kind: int) -> socket.socket:
        made = self.spaces[pod].socket(socket.AF_INET if family == 4 else socket.AF_INET6, kind)
        made.settimeout(5)
        return made

    def raw(self, pod: str) -> socket.socket:
        """All frames of a pod's eth0, both ways."""
        with self.spaces[pod].entered():
            made = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(3))
            made.bind(("eth0", 0))
        made.settimeout(5)
        return made

    def address(self, pod: str, family: int) -> str:
        return str(self.pods[pod].ipv4 if family == 4 else self.pods[pod].ipv6)

    def frame(self, family: int = 4, **fields: int) -> Ether:
        """From pod A to pod B."""
        a, b = self.address("a", family), self.address("b", family)
        header = IP(src=a, dst=b, **fields) if family == 4 else IPv6(src=a, dst=b, **fields)
        return Ether(src="02:00:00:00:01:0a", dst="02:00:00:00:00:0a") / header

    @contextlib.contextmanager
    def counted(self, due: tuple[int, int] | None = None) -> Iterator[dict[tuple[int, int], int]]:
        """Packets by (reason, direction) that came during the body, without multicast listener reports; and those that are
        due after it, which the kernel may have put off.

        Those of the pods are dropped with a reason of their own; the node's are a few that reach the pods.
        """
        before, result = read_counters(self.counters), {}
        yield result
        until = time.monotonic() + 5
        while due and read_counters(self.counters).get(due) == before.get(due) and time.monotonic() < until:
            time.sleep(0.005)
        for key, (packets, _) in read_counters(self.counters).items():
            more = packets - before.get(key, (0, 0))[0]
            if more > (REPORTS if key == (0, TO_POD) else 0) and key != (Reason.MULTICAST, FROM_POD):
                result[key] = more


@pytest.fixture
def live(instance: Instance) -> Iterator[Live]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with contextlib.ExitStack() as exit_stack:
        made = Live(instance, exit_stack)
        yield made
        for table in made.tables:
            for key, _ in list(table.items()):
                table.delete(key)


def answer(sock: socket.socket, wanted: type, frames: int = 50) -> Ether:
    """The next frame that has the layer, of those coming in."""
    for _ in range(frames):
        data, where = sock.recvfrom(65536)
        packet = Ether(data)
        if where[2] != socket.PACKET_OUTGOING and wanted in packet:
            return packet
    raise AssertionError(f"no {wanted.__name__} among {frames} frames")


def transfer(live: Live, family: int, size: int) -> None:
    """`size` bytes by TCP from pod A to pod B, compared at the end."""
    sent, received = os.urandom(size), bytearray()
    with live.socket("b", family, socket.SOCK_STREAM) as listener:
        listener.bind((live.address("b", family), 7000))
        listener.listen()

        def serve() -> None:
            connection, _ = listener.accept()
            with connection:
                while chunk := connection.recv(1 << 16):
                    received.extend(chunk)

        server = threading.Thread(target=serve)
        server.start()
        with live.socket("a", family, socket.SOCK_STREAM) as client:
            client.connect((live.address("b", family), 7000))
            client.sendall(sent)
        server.join()
    assert received == sent


@FAMILIES
def test_tcp_between_pods_passes_by_the_stack_with_super_packets(live: Live, family: int) -> None:
    with live.counted() as seen:
        transfer(live, family, 4_000_000)
    assert set(seen) == {(0, FROM_POD)}
    # Segments alone would be 4,000,000 / 1,460 = 2,740 packets and as many acknowledgements.
    assert seen[0, FROM_POD] < 2000


@FAMILIES
def test_shaped_pod_is_reached_through_its_egress(live: Live, family: int) -> None:
    shaped = live.pods["b"]
    shaped.flags = abi.EndpointFlag.SHAPED_IN
    live.put(shaped)
    with live.counted() as seen:
        transfer(live, family, 4_000_000)
    assert seen[0, TO_POD] > 50 and set(seen) == {(0, FROM_POD), (0, TO_POD)}


@FAMILIES
def test_pod_shaped_on_its_way_out_still_talks(live: Live, family: int) -> None:
    shaped = live.pods["a"]
    shaped.flags = abi.EndpointFlag.SHAPED_OUT
    live.put(shaped)
    with live.counted() as seen:
        transfer(live, family, 4_000_000)
    assert seen[0, TO_POD] > 50 and set(seen) == {(0, FROM_POD), (0, TO_POD)}


def test_expired_and_oversized_packets_are_answered_by_the_gateway(live: Live) -> None:
    with live.raw("a") as sock:
        sock.send(bytes(live.frame(ttl=1) / UDP(dport=9)))
        error = answer(sock, ICMP)
        assert (error[ICMP].type, error[ICMP].code, error[IP].src) == (11, 0, GATEWAYS[0])
        sock.send(bytes(live.frame(flags="DF") / UDP(dport=9) / bytes(2000)))
        error = answer(sock, ICMP)
        assert (error[ICMP].type, error[ICMP].code, error[ICMP].nexthopmtu) == (3, 4, 1500)
        sock.send(bytes(live.frame(6, hlim=1) / UDP(dport=9)))
        assert answer(sock, ICMPv6TimeExceeded)[IPv6].src == GATEWAYS[1]
        sock.send(bytes(live.frame(6) / UDP(dport=9) / bytes(2000)))
        assert answer(sock, ICMPv6PacketTooBig)[ICMPv6PacketTooBig].mtu == 1500


@FAMILIES
def test_frame_with_hardly_a_linear_byte_is_delivered(live: Live, family: int) -> None:
    """A packet socket puts all but 14 bytes of a frame above a page into fragments."""
    big = live.pods["b"]
    big.mtu = 9000
    live.put(big)
    with Rtnl(live.spaces["node"]) as node, Rtnl(live.spaces["b"]) as pod:
        for side, index in ((node, big.ifindex), (pod, 2)):
            side.apply([nl.Message(nl.rtnl.SETLINK, {"index": index}, [("IFLA_MTU", 9000)])])
    with live.raw("a") as sock, live.socket("b", family, socket.SOCK_DGRAM) as server:
        server.bind((live.address("b", family), 7000))
        with live.counted() as seen:
            sock.send(bytes(live.frame(family) / UDP(sport=1, dport=7000) / (b"x" * 6000)))
            assert server.recv(65536) == b"x" * 6000
    assert set(seen) == {(0, FROM_POD)}


@pytest.mark.parametrize("frame", [b"\x08\x00", b"\x08\x00\x45" + bytes(18), b"\x86\xdd\x60" + bytes(30)])
def test_frame_that_ends_within_its_ip_header_is_truncated(live: Live, frame: bytes) -> None:
    macs = bytes.fromhex("02000000000a" "02000000010a")
    with live.raw("a") as sock, live.counted((Reason.TRUNCATED, FROM_POD)) as seen:
        sock.send(macs + frame)
    assert seen == {(Reason.TRUNCATED, FROM_POD): 1}


def test_vlan_device_in_a_pod_gets_nowhere(live: Live) -> None:
    """The kernel takes the tag out of the frame before from_pod sees it; it travels beside."""
    tagged = live.frame() / UDP(dport=9)
    with live.raw("a") as sock, live.counted((Reason.VLAN, FROM_POD)) as seen:
        sock.send(bytes(tagged)[:12] + b"\x81\0\0\x07" + bytes(tagged)[12:])
    assert seen == {(Reason.VLAN, FROM_POD): 1}


def test_arping_the_gateway_is_answered(live: Live) -> None:
    with live.raw("a") as sock:
        sock.send(bytes(Ether(src="02:00:00:00:01:0a", dst="ff:ff:ff:ff:ff:ff") / ARP(
            psrc=live.address("a", 4), hwsrc="02:00:00:00:01:0a", pdst=GATEWAYS[0])))
        assert answer(sock, ARP)[ARP].hwsrc == "02:00:00:00:00:0a"


@FAMILIES
def test_pod_that_forgot_its_gateway_finds_it_again(live: Live, family: int) -> None:
    """Its kernel asks by ARP or ND once the permanent entry is gone."""
    with Rtnl(live.spaces["a"]) as pod:
        pod.apply([nl.neighbour_del(2, ip_address(GATEWAYS[0 if family == 4 else 1]))])
    transfer(live, family, 1000)


@FAMILIES
def test_host_and_pod_talk(live: Live, family: int) -> None:
    gateway = GATEWAYS[0 if family == 4 else 1]
    with live.socket("node", family, socket.SOCK_DGRAM) as host, live.socket("a", family, socket.SOCK_DGRAM) as pod:
        host.bind((gateway, 7000))
        with live.counted() as seen:
            pod.sendto(b"ping", (gateway, 7000))
            data, sender = host.recvfrom(100)
            host.sendto(data, sender)
            assert pod.recv(100) == b"ping"
    assert seen == {(0, FROM_POD): 1}


def test_dscp_and_payload_of_a_struct_survive(live: Live) -> None:
    """Nothing but MACs, hop count and checksum changes on the way."""
    frame = live.frame(tos=0xB8, id=4711) / UDP(sport=1, dport=7000) / struct.pack(">IH", 1, 2)
    with live.raw("b") as sock, live.raw("a") as sender:
        sender.send(bytes(frame))
        got = answer(sock, UDP)
    frame[IP].ttl -= 1
    frame.src, frame.dst = "02:00:00:00:00:0b", "02:00:00:00:01:0b"
    assert bytes(got) == bytes(frame)
