"""`fibril whoami` and `fibril trace` on a whole node, with real pods."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ctlnode import FIBRIL, Node

from services.ctl import pods

# Who runs where is told by these.
UP = ("up", "--services", "ipam,identity")
CONNECT = "import socket, sys; socket.socket().connect_ex((sys.argv[1], 7))"


@contextmanager
def tracing(node: Node, *words: str) -> Iterator[subprocess.Popen[str]]:
    """`fibril -o json trace …`, from the moment that nothing is missed."""
    popen = node.start(*FIBRIL, "-o", "json", "trace", *words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    assert popen.stderr is not None
    try:
        said = popen.stderr.readline()
        assert said == "tracing\n", said + popen.stderr.read() + node.logs()
        yield popen
    finally:
        popen.kill()
        popen.communicate()


def event(popen: subprocess.Popen[str], **wanted: Any) -> dict[str, Any]:
    """The next event with these values."""
    assert popen.stdout is not None
    for line in popen.stdout:
        found: dict[str, Any] = json.loads(line)
        if wanted.items() <= found.items():
            return found
    raise AssertionError(f"the trace ended: {popen.stderr.read() if popen.stderr else ''}")


def test_processes_are_named_by_pod(node: Node) -> None:
    node.fibril(*UP)
    node.fibril("pod", "add", "web", "--label", "app=web", "--label", "tier=front")
    cart = node.json("pod", "add", "cart")

    # Told by ipam a moment after the pod is there.
    inside = node.run(*FIBRIL, "-o", "json", "pod", "exec", "web", "--", *FIBRIL, "-o", "json", "whoami")
    me = json.loads(inside.stdout)
    assert (me["pod"], me["labels"]) == ("web", {"app": "web", "tier": "front"})
    assert node.json("whoami", "--cgroup", "/" + pods.cgroup(node.instance, "cart"))["pod"] == "cart"
    assert "no pod of this node" in node.fibril("whoami", code=1).stderr

    with tracing(node, "exec") as execs, tracing(node, "connect", "--endpoint", "web") as connects:
        node.fibril("pod", "exec", "web", "--", "/bin/echo", "to be seen")
        seen = event(execs, path="/bin/echo")
        assert seen["arguments"] == ["/bin/echo", "to be seen"]
        workload = seen["process"]["workload"]
        assert (workload["pod"], workload["labels"]) == ("web", {"app": "web", "tier": "front"})
        assert workload["identity"] and len(workload["addresses"]) == 2

        # Of the other pod: not asked for.
        node.fibril("pod", "exec", "cart", "--", sys.executable, "-c", CONNECT, cart["ipv4"])
        node.fibril("pod", "exec", "web", "--", sys.executable, "-c", CONNECT, cart["ipv4"])
        opened = event(connects, destination=cart["ipv4"], destination_port=7)
        assert opened["process"]["workload"]["pod"] == "web"
        assert opened["source"] == next(a for a in workload["addresses"] if ":" not in a)


def test_a_trace_goes_on_with_a_restarted_service(node: Node) -> None:
    node.fibril(*UP)
    node.fibril("pod", "add", "web")
    with tracing(node, "exec") as before:
        os.kill(node.processes()["identity"], signal.SIGKILL)
        assert before.wait(30) == 1
    node.fibril(*UP)
    with tracing(node, "exec", "--count", "1") as after:
        node.fibril("pod", "exec", "web", "--", "/bin/true")
        assert event(after)["process"]["workload"]["pod"] == "web"
        assert after.wait(30) == 0
