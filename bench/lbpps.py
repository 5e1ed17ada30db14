"""Packets a second forwarded to a backend by one core: the balancer in XDP against nftables' DNAT and masquerade.

    client ──▶ fbx0 (node: 192.168.7.1) ──▶ backend behind the router at fbx1

The kernel's live frames (BPF_PROG_TEST_RUN) are the wire: 64-byte TCP packets of one established connection come in by the
node's veth, are translated at both ends, and leave by it towards the router, whose end counts and drops them. So the same
generator, device and sink serve both; what differs is who forwards: services/lb's XDP program, or the host's stack with a
ruleset as a node port would have it and the kernel's connection tracking. All of it happens on one CPU, and taking turns.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes as ct
import os
import secrets
import shutil
import struct
import subprocess
import sys
import time
from pathlib import Path
from typing import Final

from bench.common import Bench, cpus, interleave, log, median, pinned, quick
from bench.lbpath import CLIENT, NODE, NODE_MAC, ROUTER_MAC, VIP, links
from services.common.instance import Instance
from services.common.kernel import bpf, features, loader, netns, progs, xdp
from services.common.kernel.maps import BpfMap
from services.common.kernel.netlink import Rtnl
from services.common.kernel.netns import NetNs
from services.lb import abi, install
from services.lb.kernel.flows import FLOW_LINES
from services.lb.xdp import abi as xdp_abi
from tests.datapath.lbtables import LbTables

SERVICE: Final = "lbpps"
NEXT, FRAMES, ARRIVED = (f"{SERVICE}/{name}" for name in ("next", "frames", "arrived"))
LIVE_FRAMES: Final = 1 << 1
BATCH: Final = 64
BACKEND: Final = "10.20.0.1"
RULES: Final = f"""
table ip bench {{
    chain dstnat {{ type nat hook prerouting priority dstnat; ip daddr {VIP[4]} tcp dport 80 dnat to {BACKEND}:8080; }}
    chain srcnat {{ type nat hook postrouting priority srcnat; ip daddr {BACKEND} masquerade; }}
}}
"""


def spec() -> loader.ProgramSpec:
    """Frames and sink."""
    return loader.ProgramSpec(
        source=Path(__file__).with_name("lbpps.c"), service=SERVICE, functions={"fib_again": "xdp", "fib_sink": "xdp"},
        maps={"next": NEXT, "frames": FRAMES, "arrived": ARRIVED},
    )  # fmt: skip


def summed(data: bytes) -> int:
    total = sum(struct.unpack(f">{len(data) // 2}H", data))
    while total >> 16:
        total = (total & 0xFFFF) + (total >> 16)
    return ~total & 0xFFFF


def frame(flags: int) -> bytes:
    """A TCP packet of the client's, 64 bytes, with both checksums."""
    source, target = (bytes(map(int, text.split("."))) for text in (CLIENT[4], VIP[4]))
    tcp = struct.pack(">HHIIBBHHH", 40000, 80, 1, 1, 0x50, flags, 1024, 0, 0) + b"x" * 10
    tcp = tcp[:16] + struct.pack(">H", summed(source + target + struct.pack(">HH", 6, len(tcp)) + tcp)) + tcp[18:]
    head = struct.pack(">BBHHHBBH", 0x45, 0, 50, 0, 0, 64, 6, 0) + source + target
    head = head[:10] + struct.pack(">H", summed(head)) + head[12:]
    return bytes.fromhex(NODE_MAC.replace(":", "") + ROUTER_MAC.replace(":", "")) + b"\x08\x00" + head + tcp


class Rig:
    """The node: tables of the balancer, rules of nftables, a sink at the router's end."""

    def __init__(self, stack: contextlib.ExitStack, node: Rtnl, ifindex: int) -> None:
        instance = Instance.from_env(f"bench-{os.getpid()}-pps")
        stack.callback(shutil.rmtree, instance.pin_dir, ignore_errors=True)
        asyncio.run(loader.load([install.xdp(), spec()], instance.pin_dir))
        self._pins, self._ifindex = instance.pin_dir, ifindex
        self._tables = LbTables(instance.pin_dir, 1024, FLOW_LINES, 65536)
        stack.callback(self._tables.close)
        self._tables.snat(*NODE.values())
        self._tables.service([(VIP[4], 80)], [(BACKEND, 8080)], flags=abi.ServiceFlag.MAGLEV)
        with BpfMap.open(self._pins / xdp_abi.MAPS["lb_xdp"], ct.c_uint32, xdp_abi.Own) as own:
            own.update(0, xdp_abi.Own.of([NODE_MAC]))
        self._fds = {
            name: stack.enter_context(progs.opened(self._pins / "prog" / service / name))
            for name, service in (("fib_again", SERVICE), ("fib_sink", SERVICE), (install.XDP, install.SERVICE))
        }
        # A veth's end takes frames from its peer's XDP only if it has a program itself.
        xdp.put(node, node.ifindex("fbx1"), xdp.Mode.NATIVE, self._fds["fib_sink"])
        xdp.put(node, ifindex, xdp.Mode.NATIVE, self._fds["fib_again"])
        self._arrived = stack.enter_context(BpfMap.open(self._pins / ARRIVED, ct.c_uint32, ct.c_uint64))

    def _send(self, flags: int, count: int) -> float:
        """Seconds for so many packets."""
        data = frame(flags)
        with BpfMap.open(self._pins / FRAMES, ct.c_uint32, ct.c_uint64 * 8) as frames:
            frames.update(0, (ct.c_uint64 * 8).from_buffer_copy(data))
        packet = ct.create_string_buffer(data, len(data))
        context = ct.create_string_buffer(struct.pack("=6I", 0, len(data), 0, self._ifindex, 0, 0), 24)
        attr = struct.pack(
            "IIIIQQIIIIQQIII4x", self._fds["fib_again"], 0, len(data), 0, ct.addressof(packet), 0, count, 0, 24, 0,
            ct.addressof(context), 0, LIVE_FRAMES, 0, BATCH,
        )  # fmt: skip
        began = time.perf_counter()
        bpf.call(bpf.PROG_TEST_RUN, attr, "live frames")
        return time.perf_counter() - began

    def run(self, through: str, count: int) -> float:
        """Packets a second that came out at the router. through: a program; "": the host's stack."""
        if through:
            progs.set_slot(self._pins / NEXT, 0, self._fds[through])
        else:
            progs.clear_slot(self._pins / NEXT, 0)
        if through:
            self._send(0x02, BATCH)
        # The kernel's connection tracking takes a connection over in the middle, but not one whose SYN nobody answers.
        self._send(0x10, 4096)
        before = self._count()
        took = self._send(0x10, count)
        deadline = time.monotonic() + 1
        while self._count() - before < 0.95 * count and time.monotonic() < deadline:
            time.sleep(0.001)
        came = self._count() - before
        if came < 0.95 * count:
            raise RuntimeError(f"of {count} packets {came} came out of {through or 'the stack'}")
        return came / took

    def _count(self) -> int:
        found = self._arrived.lookup(0)
        return found.value if found is not None else 0


def main() -> int:
    features.ensure_bpffs()
    count, rounds = quick(200_000, 1_000_000), quick(5, 15)
    path = Path(f"/run/netns/fbx-{secrets.token_hex(3)}")
    netns.add(path)
    try:
        with Bench("lb") as bench, contextlib.ExitStack() as stack:
            space = stack.enter_context(NetNs.open(path))
            stack.enter_context(space.entered())
            with Rtnl(space) as node:
                index = links(node)
                subprocess.run(["nft", "-f", "-"], input=RULES, text=True, check=True)
                for key in ("all", "default", "fbx0"):
                    for option in ("send_redirects", "rp_filter"):
                        Path(f"/proc/sys/net/ipv4/conf/{key}/{option}").write_text("0")
                Path("/proc/sys/net/netfilter/nf_conntrack_tcp_be_liberal").write_text("1")
                rig = Rig(stack, node, index)
            with pinned(cpus()[-1]):
                runs = {"xdp": lambda: rig.run(install.XDP, count), "nft": lambda: rig.run("", count)}
                found = interleave(runs, rounds)
            for name, values in found.items():
                log(f"{name}: {median(values) / 1e6:.3f} million packets a second")
            ratios = [ours / theirs for ours, theirs in zip(found["xdp"], found["nft"], strict=True)]
            log(f"ratio {median(ratios):.2f}")
            bench.emit("veth_xdp_pps", "packets/s", median(found["xdp"]), "nftables", median(found["nft"]))
    finally:
        netns.remove(path)
    return 0


if __name__ == "__main__":
    sys.exit(main())
