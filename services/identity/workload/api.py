"""fibril.workload.v1 to workload identity and back."""

from __future__ import annotations

import contextlib
from collections.abc import AsyncGenerator
from typing import Any, Final

from fibril.endpoint.v1 import endpoint_pb2 as ep
from fibril.workload.v1 import workload_pb2 as pb
from fibril.workload.v1 import workload_pb2_grpc
from services.common import errors
from services.common.pipeline.events import clock_offset
from services.identity.workload import abi
from services.identity.workload.abi import Kind
from services.identity.workload.endpoints import Endpoints
from services.identity.workload.trace import Tracer, Watcher
from services.identity.workload.whoami import Whoami

RUNNING: Final = ("fibril-trace", "running")
"""Initial metadata of a watch: from now on the client misses nothing."""
_ENDPOINT_MAX: Final = 65535


class WorkloadApi(workload_pb2_grpc.WorkloadServiceServicer):
    """Whoami, and the watchers of a tracer."""

    def __init__(self, endpoints: Endpoints, tracer: Tracer) -> None:
        self._whoami = Whoami(endpoints)
        self._tracer = tracer

    async def Whoami(self, request: pb.WhoamiRequest, context: Any) -> pb.WhoamiResponse:
        by = request.WhichOneof("by")
        if by == "pid":
            found = await self._whoami.by_pid(request.pid)
        elif by == "cgroup_id":
            found = await self._whoami.by_cgroup(request.cgroup_id)
        elif by == "netns_cookie":
            found = await self._whoami.by_netns(request.netns_cookie)
        else:
            # The kernel knows who is at the other end of a unix socket, but gRPC does not hand it out.
            raise errors.InvalidArgument(
                "nothing was asked for, and gRPC does not tell which process asks",
                field="by",
                fix="give pid, cgroup_id or netns_cookie; a process that asks for itself gives its own pid",
            )
        return pb.WhoamiResponse(workload=workload(found))

    async def WatchExecs(
        self, request: pb.WatchExecsRequest, context: Any
    ) -> AsyncGenerator[pb.WatchExecsResponse, None]:
        watcher = _watcher(Kind.EXEC, request)
        async for event, pod in self._events(watcher, context):
            assert isinstance(event, abi.Exec)
            yield pb.WatchExecsResponse(
                time_unix_nanos=event.who.time_ns + clock_offset(),
                process=_process(event.who, pod),
                path=event.path,
                arguments=event.arguments,
                lost=watcher.lost,
            )

    async def WatchConnects(
        self, request: pb.WatchConnectsRequest, context: Any
    ) -> AsyncGenerator[pb.WatchConnectsResponse, None]:
        watcher = _watcher(Kind.CONNECT, request)
        async for event, pod in self._events(watcher, context):
            assert isinstance(event, abi.Connect)
            yield pb.WatchConnectsResponse(
                time_unix_nanos=event.who.time_ns + clock_offset(),
                process=_process(event.who, pod),
                protocol=event.protocol,
                source=event.source,
                source_port=event.source_port,
                destination=event.destination,
                destination_port=event.destination_port,
                lost=watcher.lost,
            )

    async def _events(
        self, watcher: Watcher, context: Any
    ) -> AsyncGenerator[tuple[abi.Exec | abi.Connect, ep.Endpoint | None], None]:
        async with contextlib.aclosing(self._tracer.follow(watcher)) as batches:
            await anext(batches)
            await context.send_initial_metadata((RUNNING,))
            async for batch in batches:
                for sight in batch:
                    yield sight.event, sight.pod


def _process(who: abi.Actor, pod: ep.Endpoint | None) -> pb.Process:
    process = pb.Process(pid=who.pid, parent_pid=who.parent, uid=who.uid, command=who.command)
    if who.endpoint:
        # The programs may know a pod a moment before this process does.
        known = workload(pod) if pod is not None else pb.Workload(endpoint_id=who.endpoint)
        process.workload.CopyFrom(known)
    return process


def workload(endpoint: ep.Endpoint) -> pb.Workload:
    """An endpoint as the pod of a process."""
    return pb.Workload(
        endpoint_id=endpoint.id,
        pod=endpoint.pod,
        container_id=endpoint.container_id,
        labels=endpoint.labels,
        identity=endpoint.identity,
        addresses=[address for address in (endpoint.ipv4, endpoint.ipv6) if address],
    )


def _watcher(kind: Kind, request: pb.WatchExecsRequest | pb.WatchConnectsRequest) -> Watcher:
    if request.endpoint_id > _ENDPOINT_MAX:
        raise errors.InvalidArgument(
            f"{request.endpoint_id} is no endpoint number",
            field="endpoint_id",
            fix="use 1 to 65,535, or 0 for all",
        )
    if request.host and request.endpoint_id:
        raise errors.InvalidArgument(
            "the host's processes and those of one endpoint exclude each other",
            field="host",
            fix="leave out one of the two",
        )
    return Watcher(kind, request.host, request.endpoint_id)
