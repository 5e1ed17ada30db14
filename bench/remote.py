"""Pod to pod on two nodes, for bench/pod.py: Fibril against the least Linux can do for the same.

        underlay: one bridge, a veth pair a node, in namespaces of their own
    node ------------------------------------------------ node
      |                                                     |
     pod (client)                                          pod (server)

Subject: two nodes of a lab, in overlay and in routed mode. Peers, on an underlay of the same kind: pods that are ports
of a bridge with a kernel VXLAN device (no filtering, no routing), and pods routed by the kernel (`ip_forward`, nothing
else). Packets are as large in both: the underlay's 1,500 bytes, 50 less in the overlay.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench.cnibase import Namespaces, netns_path
from bench.node import FIBRIL
from bench.pairs import Pair
from services.common.kernel import sysctl
from services.common.kernel.netns import NetNs

UNDERLAY_MTU, OVERLAY_MTU = 1500, 1450


@contextlib.contextmanager
def fibril_pair(mode: str) -> Iterator[Pair]:
    """A pod on each of two nodes of a lab in that mode; the lab is gone afterwards."""
    name = f"b{secrets.token_hex(3)}"
    root = Path(tempfile.mkdtemp(prefix="fibril-"))
    env = {**os.environ, "FIBRIL_RUN_ROOT": str(root / "run"), "FIBRIL_STATE_ROOT": str(root / "state")}

    def fibril(*words: str, stdout: int | None = None) -> str:
        done = subprocess.run(
            [str(FIBRIL), *words], env=env, check=True, stdout=stdout or sys.stderr.fileno(), text=True
        )
        return done.stdout or ""

    try:
        fibril("lab", "up", "--name", name, "--nodes", "2", "--mode", mode, "--pods", "1")
        fibril("connectivity", "test", "--lab", name)
        pods = [
            json.loads(fibril("-i", f"{name}-c1n{n}", "-o", "json", "pod", "ls", stdout=subprocess.PIPE))[0]
            for n in (1, 2)
        ]
        client, server = (Path(pod["netns"]).name for pod in pods)
        yield Pair(client, server, pods[1]["ipv4"], pods[1]["ipv6"])
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            fibril("lab", "down", "--name", name)
        shutil.rmtree(root, ignore_errors=True)


def vxlan_pair(spaces: Namespaces) -> Pair:
    """Pods that are ports of a bridge each, joined by VXLAN devices."""
    nodes = _underlay(spaces)
    pods = [spaces.add(), spaces.add()]
    for number, (node, pod) in enumerate(zip(nodes, pods, strict=True), 1):
        _ip(node, [
            "link add br0 type bridge",
            f"link add vx0 mtu {OVERLAY_MTU} type vxlan id 42 dstport 8472 dev eth0 local 172.28.0.{number} "
            f"remote 172.28.0.{3 - number}",
            f"link add pod mtu {OVERLAY_MTU} type veth peer name eth0 mtu {OVERLAY_MTU} netns {pod}",
            "link set vx0 master br0 up",
            "link set pod master br0 up",
            "link set br0 up",
        ])  # fmt: skip
        _ip(pod, [
            f"address add 10.87.0.{number}/24 dev eth0",
            f"address add fd00:87::{number}/64 dev eth0 nodad",
            "link set eth0 up",
        ])  # fmt: skip
    return Pair(*pods, "10.87.0.2", "fd00:87::2")


def routed_pair(spaces: Namespaces) -> Pair:
    """Pods whose nodes forward, each knowing the other's network."""
    nodes = _underlay(spaces)
    pods = [spaces.add(), spaces.add()]
    for number, (node, pod) in enumerate(zip(nodes, pods, strict=True), 1):
        other = 3 - number
        with NetNs.open(netns_path(node)) as space, space.entered():
            for key in ("net/ipv4/ip_forward", "net/ipv6/conf/all/forwarding"):
                sysctl.ensure(key, 1)
        _ip(node, [
            f"link add pod mtu {UNDERLAY_MTU} type veth peer name eth0 mtu {UNDERLAY_MTU} netns {pod}",
            f"address add 10.86.{number}.1/24 dev pod",
            f"address add fd00:86:{number}::1/64 dev pod nodad",
            "link set pod up",
            f"route add 10.86.{other}.0/24 via 172.28.0.{other}",
            f"route add fd00:86:{other}::/64 via fd28::{other}",
        ])  # fmt: skip
        _ip(pod, [
            f"address add 10.86.{number}.2/24 dev eth0",
            f"address add fd00:86:{number}::2/64 dev eth0 nodad",
            "link set eth0 up",
            f"route add default via 10.86.{number}.1",
            f"route add default via fd00:86:{number}::1",
        ])  # fmt: skip
    return Pair(*pods, "10.86.2.2", "fd00:86:2::2")


def _underlay(spaces: Namespaces) -> list[str]:
    """Two nodes on one network, as a lab has them: ports of a bridge in a namespace of its own."""
    net, nodes = spaces.add(), [spaces.add(), spaces.add()]
    _ip(net, ["link add br0 type bridge", "link set br0 up"])
    for number, node in enumerate(nodes, 1):
        _ip(net, [
            f"link add node{number} mtu {UNDERLAY_MTU} type veth peer name eth0 mtu {UNDERLAY_MTU} netns {node}",
            f"link set node{number} master br0 up",
        ])  # fmt: skip
        _ip(node, [
            "link set lo up",
            f"address add 172.28.0.{number}/16 dev eth0",
            f"address add fd28::{number}/64 dev eth0 nodad",
            "link set eth0 up",
        ])  # fmt: skip
    return nodes


def _ip(space: str, commands: list[str]) -> None:
    subprocess.run(["ip", "-n", space, "-batch", "-"], input="\n".join(commands), text=True, check=True)
