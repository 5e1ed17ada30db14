"""Running Fibril on the nodes of a lab: what each is started with, and what the lab's provider hands out."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterable, Sequence

from lab import build
from lab.topology import Lab, Node
from services.common.errors import FailedPrecondition

AT_ONCE = 6  # nodes worked on at the same time: more only wait for each other's CPU


def environment(lab: Lab, node: Node) -> dict[str, str]:
    """What makes `fibril` on that node mean that node, and this very `fibril` be found there; and the part of the
    services' configuration in which nodes differ."""
    path = f"{os.path.dirname(sys.executable)}:{os.environ.get('PATH', os.defpath)}"
    return {**os.environ, "PATH": path, **lab.environment(node)}


def enter_cgroup(node: Node) -> None:
    """Have this process be one of that node's host, whose connections to services the node balances."""
    from services.common.instance import Instance
    from services.common.kernel import cgroup
    from services.ctl import pods

    cgroup.move(cgroup.create(pods.host_cgroup(Instance.from_env(node.instance))), os.getpid())


def up_words(lab: Lab, services: str, node: Node) -> list[str]:
    """How a node is started: `fibril …`. services: "" for all."""
    from services.common.instance import Instance
    from services.ctl.children import embedded_etcd

    line = ["up", "--cluster", node.cluster_name]
    if services:
        line += ["--services", services]
    members = lab.etcd_addresses(node.cluster)
    if members:
        return [*line, "--etcd-members", ",".join(members)]
    if node.number > 1:
        first = lab.node(node.cluster, 1)
        line += ["--etcd", embedded_etcd(Instance.from_env(first.instance)).endpoint]
    return line


def pod_words(number: int, _node: Node) -> list[str]:
    """How a node's sample pod of that number is made. Those of one number have one label set on all nodes."""
    return ["pod", "add", f"p{number}", "--label", f"app=p{number}"]


def pool_words(lab: Lab, node: Node) -> list[str]:
    """Cloud mode: the pool, made by the first node of a cluster."""
    cidrs = [cidr for cidr, have in zip(node.pool, (lab.ipv4, lab.ipv6), strict=True) if have]
    options = [word for cidr in cidrs for word in ("--cidr", cidr)]
    return ["ipam", "pool", "put", "default", "--cloud", *options]


def address_words(lab: Lab, node: Node) -> list[str]:
    """Cloud mode: the addresses given to a node."""
    four, six = node.cloud_addresses()
    return ["ipam", "address", "add", "default", *(four if lab.ipv4 else ()), *(six if lab.ipv6 else ())]


def batches(lab: Lab) -> list[list[Node]]:
    """Nodes in order of start: those with a cluster's etcd first, since the others need it."""
    firsts = [n for n in lab.nodes() if n.number <= lab.etcd_members]
    others = [n for n in lab.nodes() if n.number > lab.etcd_members]
    return [batch for batch in (firsts, others) if batch]


def fibril(
    lab: Lab,
    nodes: Iterable[Node],
    line: Callable[[Node], Sequence[str]],
    failure: str,
    options: Sequence[str] = (),
) -> None:
    """As `run`; FailedPrecondition with `failure` names the nodes on which it failed."""
    failed = run(lab, nodes, line, options)
    if failed:
        raise FailedPrecondition(
            f"lab {lab.name!r}: {', '.join(node.name for node in failed)} {failure} (said above why)",
            fix=f"try again, or remove it: fibril lab down --name {lab.name}",
        )


def run(
    lab: Lab, nodes: Iterable[Node], line: Callable[[Node], Sequence[str]], options: Sequence[str] = ()
) -> list[Node]:
    """Run `fibril …` on several nodes at once, its messages on our standard error; gives the nodes where it
    failed."""
    failed: list[Node] = []
    running: list[tuple[Node, subprocess.Popen[bytes]]] = []

    def reap() -> None:
        node, popen = running.pop(0)
        if popen.wait() != 0:
            failed.append(node)

    for node in nodes:
        if len(running) == AT_ONCE:
            reap()
        argv = [sys.executable, "-m", "services.ctl.main", *options, *line(node)]
        with build.inside(lab.name, node.name):
            popen = subprocess.Popen(
                argv, env=environment(lab, node), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL
            )
        running.append((node, popen))
    while running:
        reap()
    return failed
