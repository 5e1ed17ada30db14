"""LbService: fibril.lb.v1 to the store and the plane and back. No decisions here."""

from __future__ import annotations

import heapq
from collections.abc import AsyncIterator, Callable
from typing import Final

from fibril.lb.v1 import lb_pb2 as pb
from fibril.lb.v1 import lb_pb2_grpc
from fibril.types.v1 import types_pb2
from services.common import errors
from services.lb import convert, fields
from services.lb.abi import BackendState
from services.lb.kernel.writer import Plane
from services.lb.model import BackendKey, Spec
from services.lb.services import Services
from services.lb.store import Store

PAGE_DEFAULT: Final = 1000
PAGE_MAX: Final = 10_000
IMPORT_MAX: Final = 1000

Trace = Callable[[pb.TraceServiceRequest], pb.TraceServiceResponse]


class LbApi(lb_pb2_grpc.LbServiceServicer):
    """One servicer for all servers of the process."""

    def __init__(
        self,
        services: Services,
        store: Store,
        plane: Plane,
        health: Callable[[str, BackendKey], str],
        trace: Trace,
    ) -> None:
        """health: why a backend of a service is not well, "" if it is."""
        self._services, self._store, self._plane = services, store, plane
        self._health, self._trace = health, trace

    async def UpsertService(
        self, request: pb.UpsertServiceRequest, context: object
    ) -> pb.UpsertServiceResponse:
        if not request.HasField("service"):
            raise errors.InvalidArgument("no service is given", field="service")
        spec, backends = convert.service(request.service)
        self._require_synced()
        done = await self._store.upsert(spec, backends, request.service.revision)
        await self._store.settle()
        message = convert.to_proto(spec, backends, revision=done.revision)
        return pb.UpsertServiceResponse(service=message, created=done.created)

    async def DeleteService(
        self, request: pb.DeleteServiceRequest, context: object
    ) -> pb.DeleteServiceResponse:
        await self._store.delete(fields.name(request.name, "name"))
        await self._store.settle()
        return pb.DeleteServiceResponse()

    async def GetService(self, request: pb.GetServiceRequest, context: object) -> pb.GetServiceResponse:
        name = fields.name(request.name, "name")
        self._require_synced()
        if name not in self._services.specs:
            raise self._services.missing(name, "name")
        return pb.GetServiceResponse(service=self._shown(name))

    async def ListServices(self, request: pb.ListServicesRequest, context: object) -> pb.ListServicesResponse:
        size = request.page.size or PAGE_DEFAULT
        if size > PAGE_MAX:
            raise errors.InvalidArgument(f"a page of {size} is larger than {PAGE_MAX}", field="page.size")
        self._require_synced()
        after = request.page.token
        if after:
            fields.name(after, "page.token")
        names = heapq.nsmallest(
            size + 1, (n for n in self._services.specs if n > after and n.startswith(request.prefix))
        )
        return pb.ListServicesResponse(
            services=[self._shown(name, not request.without_backends) for name in names[:size]],
            next_token=names[size - 1] if len(names) > size else "",
        )

    async def WatchServices(
        self, request: pb.WatchServicesRequest, context: object
    ) -> AsyncIterator[pb.WatchServicesResponse]:
        await self._services.synced.wait()
        async for change in self._services.feed.watch(request.after_revision):
            answer = pb.WatchServicesResponse(revision=change.revision)
            if change.item is None:
                answer.kind = types_pb2.WATCH_KIND_SYNCED
            elif change.kind == "delete" or change.item not in self._services.specs:
                answer.kind = types_pb2.WATCH_KIND_DELETE
                answer.service.name = change.item
            else:
                answer.kind = types_pb2.WATCH_KIND_PUT
                answer.service.CopyFrom(self._shown(change.item))
            yield answer

    async def AddBackends(self, request: pb.AddBackendsRequest, context: object) -> pb.AddBackendsResponse:
        name = fields.name(request.service, "service")
        backends = convert.backends(request.backends, "backends")
        if not backends:
            raise errors.InvalidArgument("no backends are given", field="backends")

        def check(spec: Spec) -> None:
            convert.check_backends(spec, backends.values(), "backends")

        added, changed = await self._store.add_backends(name, backends, check)
        await self._store.settle()
        return pb.AddBackendsResponse(added=added, changed=changed)

    async def RemoveBackends(
        self, request: pb.RemoveBackendsRequest, context: object
    ) -> pb.RemoveBackendsResponse:
        name = fields.name(request.service, "service")
        gone = convert.keys(request.backends, "backends")
        removed = await self._store.remove_backends(name, gone)
        await self._store.settle()
        return pb.RemoveBackendsResponse(removed=removed)

    async def SetBackendState(
        self, request: pb.SetBackendStateRequest, context: object
    ) -> pb.SetBackendStateResponse:
        name = fields.name(request.service, "service") if request.service else ""
        wanted = convert.keys(request.backends, "backends")
        state = convert.state(request.state, "state", BackendState.ACTIVE)
        self._require_synced()
        changed = await self._store.set_state(name, wanted, state)
        await self._store.settle()
        return pb.SetBackendStateResponse(changed=changed)

    async def ImportServices(
        self, request_iterator: AsyncIterator[pb.ImportServicesRequest], context: object
    ) -> pb.ImportServicesResponse:
        total = pb.ImportServicesResponse()
        self._require_synced()
        async for request in request_iterator:
            if len(request.services) > IMPORT_MAX:
                raise errors.InvalidArgument(
                    f"{len(request.services)} services in one message",
                    field="services",
                    fix=f"send at most {IMPORT_MAX}",
                )
            batch = [convert.service(each, f"services[{at}]") for at, each in enumerate(request.services)]
            names: set[str] = set()
            for at, (spec, _) in enumerate(batch):
                if spec.name in names:
                    raise errors.InvalidArgument(
                        f"service {spec.name} is given twice in one message",
                        field=f"services[{at}].name",
                        fix="give each service once",
                    )
                names.add(spec.name)
            created, changed, unchanged = await self._store.upsert_many(batch)
            total.created += created
            total.changed += changed
            total.unchanged += unchanged
        await self._store.settle()
        return total

    async def TraceService(self, request: pb.TraceServiceRequest, context: object) -> pb.TraceServiceResponse:
        return self._trace(request)

    async def GetUsage(self, request: pb.GetUsageRequest, context: object) -> pb.GetUsageResponse:
        return pb.GetUsageResponse(
            tables=[
                pb.TableUsage(name=each.name, used=each.used, size=each.size, limit=each.limit)
                for each in self._plane.usage()
            ],
            counters=self._plane.counters(),
            exhausted=[
                pb.Exhausted(
                    address=str(each.address),
                    port=each.port,
                    protocol=convert.NUMBERS.get(each.proto, pb.PROTOCOL_UNSPECIFIED),
                    times=each.times,
                )
                for each in self._plane.exhausted()
            ],
        )

    def _shown(self, name: str, with_backends: bool = True) -> pb.Service:
        """A service as declared and as it is served here."""
        spec = self._services.specs[name]
        message = convert.to_proto(spec, revision=self._services.revisions.get(name, 0))
        for backend in self._services.backends.get(name, {}).values() if with_backends else ():
            shown = convert.backend_to_proto(backend)
            state = self._plane.effective_state(name, backend.key)
            shown.effective_state = pb.BackendState.ValueType(backend.state if state is None else state)
            if state is BackendState.QUARANTINED:
                shown.health = self._health(name, backend.key)
            message.backends.append(shown)
        here = self._plane.service_state(name)
        message.status.CopyFrom(
            pb.ServiceStatus(
                programmed=here.programmed,
                problem=here.problem,
                inside=here.inside,
                outside=here.outside,
                connections=here.connections,
            )
        )
        return message

    def _require_synced(self) -> None:
        if not self._services.synced.is_set():
            raise errors.Unavailable(
                "the services have not been read from etcd yet", fix="check etcd and ask again"
            )
