"""A process for test_host.py: hosts services that behave as the first argument (JSON) says and prints what happens.

{"services": [{"name": "ipam", "start": "ok" | "raise" | "bug" | "hang", "stop": "ok" | "hang" | "raise",
  "task": "" | "raise" | "return"}], "grace_s": 5, "tls": [ca, cert, key]}
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import Sequence
from typing import Any

from fibril.ipam.v1 import ipam_pb2, ipam_pb2_grpc
from services.common.errors import Unavailable
from services.common.host import ComponentStatus, HostConfig, HostContext, run
from services.common.instance import Instance
from services.common.rpc.server import RpcConfig


class Hosted(ipam_pb2_grpc.IpamServiceServicer):
    """The service, and its servicer: Allocate returns after 0.3 s or, for the owner "forever", never."""

    def __init__(self, name: str, start: str = "ok", stop: str = "ok", task: str = "") -> None:
        self.name = name
        self._start = start
        self._stop = stop
        self._task = task

    async def Allocate(self, request: ipam_pb2.AllocateRequest, context: Any) -> ipam_pb2.AllocateResponse:
        say("allocate")
        await asyncio.sleep(3600 if request.owner == "forever" else 0.3)
        return ipam_pb2.AllocateResponse()

    async def start(self, ctx: HostContext) -> None:
        say(f"start {self.name}")
        ctx.rpc.add(ipam_pb2_grpc.add_IpamServiceServicer_to_server, self)
        if self._start == "raise":
            raise Unavailable("etcd is away", fix="start it")
        if self._start == "bug":
            raise KeyError("oops")
        if self._start == "hang":
            await asyncio.sleep(3600)
        if self._task:
            ctx.tasks.spawn("worker", self._work())

    async def _work(self) -> None:
        if self._task == "raise":
            raise ValueError("worker broke")

    async def stop(self) -> None:
        say(f"stop {self.name}")
        if self._stop == "hang":
            await asyncio.sleep(3600)
        if self._stop == "raise":
            raise ValueError("cannot stop")

    def status(self) -> Sequence[ComponentStatus]:
        return [ComponentStatus("part")]


def say(text: str) -> None:
    """One event, seen at once."""
    print(text, flush=True)


if __name__ == "__main__":
    spec = json.loads(sys.argv[1])
    rpc = RpcConfig()
    if "tls" in spec:
        ca, cert, key = spec["tls"]
        rpc = RpcConfig(tcp=spec["tcp"], tls_ca=ca, tls_cert=cert, tls_key=key)
    services = [Hosted(**entry) for entry in spec["services"]]
    sys.exit(run(services, HostConfig(grace_s=spec.get("grace_s", 5), rpc=rpc), Instance.from_env("unit")))
