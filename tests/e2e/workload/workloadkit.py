"""Pods for workload identity: a cgroup and a network namespace each, known to the programs and to a service of its own.

No ipam service runs: the test writes ep_cgroup and ep_netns itself, so that it says exactly who is known by what.
"""

from __future__ import annotations

import asyncio
import ctypes as ct
import os
import queue
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
from google.protobuf import json_format

from fibril.endpoint.v1 import endpoint_pb2 as ep
from fibril.status.v1 import status_pb2
from fibril.status.v1.status_pb2_grpc import StatusServiceStub
from fibril.workload.v1.workload_pb2_grpc import WorkloadServiceStub
from services.common.instance import Instance
from services.common.kernel import cgroup, features, netns
from services.common.kernel.maps import BpfMap
from services.common.kernel.netns import NetNs
from services.identity.workload import programs
from services.identity.workload.abi import Kind
from services.identity.workload.api import RUNNING
from tests import session

ROOT = Path(__file__).parents[3]
HOST = Path(__file__).with_name("workloadhost.py")
HIDE_BTF = ("unshare", "-m", "sh", "-c", 'mount -t tmpfs none /sys/kernel/btf && exec "$@"', "sh")


def wait_until(condition: Callable[[], Any], what: str, seconds: float = 10.0) -> Any:
    """Poll until the condition gives something true, and give that."""
    deadline = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline, f"{what}: not within {seconds:g} s"
        time.sleep(0.02)
    return value


class Watch:
    """A stream being read in the background."""

    def __init__(self, call: Any) -> None:
        """Returns when tracing runs. Raises the stream's error if it never does."""
        self._call = call
        self._events: queue.Queue[Any] = queue.Queue()
        self.seen: list[Any] = []
        if RUNNING not in call.initial_metadata():
            next(iter(call))
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        try:
            for event in self._call:
                self._events.put(event)
        except grpc.RpcError as error:
            self._events.put(error)

    def until(self, wanted: Callable[[Any], bool], seconds: float = 10.0) -> Any:
        """The first event not seen yet that is wanted."""
        deadline = time.monotonic() + seconds
        while True:
            try:
                event = self._events.get(timeout=max(0.0, deadline - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no such event; seen: {self.seen[-20:]}") from None
            if isinstance(event, grpc.RpcError):
                raise event
            self.seen.append(event)
            if wanted(event):
                return event

    def close(self) -> None:
        self._call.cancel()
        self._thread.join(5)


class World:
    """An instance with pods `web` (number 1, known by cgroup and namespace) and `cart` (2, by namespace alone)."""

    def __init__(self) -> None:
        features.ensure_bpffs()
        self.name = session.name()
        self.root = Path(tempfile.mkdtemp(prefix=self.name))
        self.instance = Instance(self.name, self.root / "run", self.root / "state")
        self.instance.run_dir.mkdir(parents=True)
        self.groups = cgroup.create(f"fibril-test-{self.name}")
        self.web_group = cgroup.create(f"fibril-test-{self.name}/pods/web")
        self.nested = cgroup.create(f"fibril-test-{self.name}/pods/web/box/inner")
        self.web_netns, self.cart_netns = (Path(f"/run/netns/{self.name}-{pod}") for pod in ("web", "cart"))
        self._process: subprocess.Popen[bytes] | None = None
        # Namespaces are made on a thread of their own, which alone leaves home for a moment.
        with ThreadPoolExecutor(1) as thread:
            for path in (self.web_netns, self.cart_netns):
                thread.submit(netns.add, path).result()
                subprocess.run(["nsenter", f"--net={path}", "ip", "link", "set", "lo", "up"], check=True)
            cookies = [thread.submit(_cookie, path).result() for path in (self.web_netns, self.cart_netns)]
        self.endpoints = [
            ep.Endpoint(
                id=1,
                pod="shop/web",
                container_id="c1",
                cgroup_id=cgroup.cgroup_id(self.web_group),
                netns_cookie=cookies[0],
                labels={"app": "web", "tier": "front"},
                identity=70000,
                ipv4="10.0.0.1",
                ipv6="fd00::1",
            ),
            ep.Endpoint(
                id=2, pod="shop/cart", container_id="c2", netns_cookie=cookies[1], labels={"app": "cart"}
            ),
        ]
        self.channel = grpc.insecure_channel(
            f"unix:{self.instance.socket('identity')}",
            options=[("grpc.initial_reconnect_backoff_ms", 20), ("grpc.max_reconnect_backoff_ms", 50)],
        )
        self.workload = WorkloadServiceStub(self.channel)

    def load(self) -> None:
        """Load the programs as the service will, so that there are maps, and write the pods into them."""
        for kind in Kind:
            asyncio.run(programs.load(self.instance, kind))
        for name, field in (("ep_cgroup", "cgroup_id"), ("ep_netns", "netns_cookie")):
            path = programs.map_path(self.instance, name)
            with BpfMap.open(path, ct.c_uint64, ct.c_uint32) as opened:
                for endpoint in self.endpoints:
                    if getattr(endpoint, field):
                        opened.update(getattr(endpoint, field), endpoint.id)

    def start(self, wrapper: tuple[str, ...] = (), told: bool = True) -> None:
        """Run the service, in `wrapper` if given; with `told` it knows the pods."""
        endpoints = ",".join(json_format.MessageToJson(endpoint) for endpoint in self.endpoints)
        env = {
            **os.environ,
            "FIBRIL_RUN_ROOT": str(self.instance.run_root),
            "FIBRIL_STATE_ROOT": str(self.instance.state_root),
            "PYTHONPATH": str(ROOT),
        }
        argv = [*wrapper, sys.executable, str(HOST), self.name, f"[{endpoints}]" if told else "unknown"]
        with open(self.root / "log", "ab") as log:
            self._process = subprocess.Popen(
                argv, env=env, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        wait_until(self.component, f"service does not answer: {self.log()}", 20)

    def component(self) -> str:
        """What the service says of tracing; "" while it does not answer."""
        assert self._process is not None and self._process.poll() is None, self.log()
        # gRPC, refused once, tries again only five seconds later.
        if not self.instance.socket('identity').exists():
            return ""
        try:
            answer = StatusServiceStub(self.channel).GetStatus(status_pb2.GetStatusRequest(), timeout=2)
        except grpc.RpcError:
            return ""
        return next((part.message for part in answer.components if part.name == "trace"), "")

    def kill(self) -> None:
        assert self._process is not None
        self._process.send_signal(signal.SIGKILL)
        self._process.wait()
        self._process = None

    def log(self) -> str:
        return (self.root / "log").read_text(errors="replace")[-3000:]

    @contextmanager
    def watch(self, method: str, **request: Any) -> Iterator[Watch]:
        """WatchExecs or WatchConnects, running."""
        from fibril.workload.v1 import workload_pb2 as pb

        made = getattr(pb, f"{method}Request")(**request)
        watch = Watch(getattr(self.workload, method)(made, timeout=60))
        try:
            yield watch
        finally:
            watch.close()

    def run(self, *argv: str, group: Path | None = None, space: Path | None = None) -> None:
        """Run a program to its end, in a cgroup and a network namespace."""
        self.spawn(*argv, group=group, space=space).wait(20)

    def spawn(
        self, *argv: str, group: Path | None = None, space: Path | None = None
    ) -> subprocess.Popen[bytes]:
        enter = ["nsenter", f"--net={space}"] if space else []
        join = ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "sh"] if group else []
        return subprocess.Popen([*join, *enter, *argv], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)

    @contextmanager
    def sleeper(self, group: Path | None = None, space: Path | None = None) -> Iterator[int]:
        """A process that waits where it is told to; its id once it is there."""
        process = self.spawn("sleep", "60", group=group, space=space)
        try:
            comm = Path(f"/proc/{process.pid}/comm")
            wait_until(lambda: comm.read_text().strip() == "sleep", "process has not started")
            yield process.pid
        finally:
            process.kill()
            process.wait()

    def close(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        self.channel.close()
        asyncio.run(cgroup.remove(self.groups, kill=True))
        for path in (self.web_netns, self.cart_netns):
            netns.remove(path)
        shutil.rmtree(self.instance.pin_dir, ignore_errors=True)
        shutil.rmtree(self.root, ignore_errors=True)


def _cookie(path: Path) -> int:
    with NetNs.open(path) as space:
        return space.cookie()
