"""EndpointService: fibril.endpoint.v1 to the manager and back. No decisions here."""

from __future__ import annotations

import ipaddress
from collections.abc import AsyncIterator

from fibril.endpoint.v1 import endpoint_pb2 as pb
from fibril.endpoint.v1 import endpoint_pb2_grpc
from fibril.types.v1 import types_pb2
from services.common import errors
from services.ipam.endpoints import model
from services.ipam.endpoints.manager import EndpointManager
from services.ipam.endpoints.model import EndpointRecord, EndpointSpec

PAGE_DEFAULT, PAGE_MAX = 1000, 10_000
IDENTITIES_MAX = 10_000


class EndpointApi(endpoint_pb2_grpc.EndpointServiceServicer):
    """One servicer for all servers of the process."""

    def __init__(self, manager: EndpointManager) -> None:
        self._manager = manager

    async def CreateEndpoint(
        self, request: pb.CreateEndpointRequest, context: object
    ) -> pb.CreateEndpointResponse:
        record = await self._manager.create(
            EndpointSpec(
                container_id=request.container_id,
                ifname=request.ifname,
                netns=request.netns,
                pool=request.pool,
                ipv4=request.ipv4,
                ipv6=request.ipv6,
                mtu=request.mtu,
                pod=request.pod,
                labels=dict(request.labels),
                cgroup_path=request.cgroup_path,
            )
        )
        return pb.CreateEndpointResponse(endpoint=to_proto(record))

    async def DeleteEndpoint(
        self, request: pb.DeleteEndpointRequest, context: object
    ) -> pb.DeleteEndpointResponse:
        return pb.DeleteEndpointResponse(
            deleted=await self._manager.delete(request.container_id, request.ifname)
        )

    async def GetEndpoint(self, request: pb.GetEndpointRequest, context: object) -> pb.GetEndpointResponse:
        by = request.WhichOneof("by")
        record: EndpointRecord | None
        if by == "id":
            record, what = self._manager.by_id(request.id), f"number {request.id}"
        elif by == "key":
            container_id, ifname = model.check_key(request.key.container_id, request.key.ifname)
            record, what = self._manager.get(container_id, ifname), f"{ifname} of container {container_id}"
        elif by == "address":
            address = _address(request.address)
            record, what = self._manager.by_address(address), f"with address {address}"
        elif by == "cgroup_id":
            record, what = self._manager.by_cgroup(request.cgroup_id), f"in cgroup {request.cgroup_id}"
        elif by == "netns_cookie":
            record, what = (
                self._manager.by_cookie(request.netns_cookie),
                f"in namespace {request.netns_cookie}",
            )
        else:
            raise errors.InvalidArgument(
                "the request names no endpoint",
                field="by",
                fix="set one of id, key, address, cgroup_id, netns_cookie",
            )
        if record is None:
            raise errors.NotFound(f"there is no endpoint {what}")
        return pb.GetEndpointResponse(endpoint=to_proto(record))

    async def ListEndpoints(
        self, request: pb.ListEndpointsRequest, context: object
    ) -> pb.ListEndpointsResponse:
        size = request.page.size or PAGE_DEFAULT
        if size > PAGE_MAX:
            raise errors.InvalidArgument(f"a page of {size} is larger than {PAGE_MAX}", field="page.size")
        after = _token(request.page.token)
        rest = [record for record in self._manager.list() if record.id > after]
        page = rest[:size]
        return pb.ListEndpointsResponse(
            endpoints=[to_proto(record) for record in page],
            next_token=str(page[-1].id) if len(rest) > size else "",
        )

    async def WatchEndpoints(
        self, request: pb.WatchEndpointsRequest, context: object
    ) -> AsyncIterator[pb.WatchEndpointsResponse]:
        async for change in self._manager.watch(request.after_revision):
            answer = pb.WatchEndpointsResponse(revision=change.revision)
            if change.item is None:
                answer.kind = types_pb2.WATCH_KIND_SYNCED
            elif change.kind == "delete":
                answer.kind = types_pb2.WATCH_KIND_DELETE
                answer.endpoint.CopyFrom(
                    pb.Endpoint(
                        id=change.item.id, container_id=change.item.container_id, ifname=change.item.ifname
                    )
                )
            else:
                answer.kind = types_pb2.WATCH_KIND_PUT
                answer.endpoint.CopyFrom(to_proto(change.item))
            yield answer

    async def CheckEndpoint(
        self, request: pb.CheckEndpointRequest, context: object
    ) -> pb.CheckEndpointResponse:
        return pb.CheckEndpointResponse(
            differences=await self._manager.check(request.key.container_id, request.key.ifname)
        )

    async def SetEndpointLabels(
        self, request: pb.SetEndpointLabelsRequest, context: object
    ) -> pb.SetEndpointLabelsResponse:
        record = await self._manager.relabel(
            request.key.container_id, request.key.ifname, dict(request.labels)
        )
        return pb.SetEndpointLabelsResponse(endpoint=to_proto(record))

    async def SetEndpointIdentities(
        self, request: pb.SetEndpointIdentitiesRequest, context: object
    ) -> pb.SetEndpointIdentitiesResponse:
        if len(request.identities) > IDENTITIES_MAX:
            raise errors.InvalidArgument(
                f"{len(request.identities)} identities, at most {IDENTITIES_MAX} are allowed",
                field="identities",
            )
        for index, each in enumerate(request.identities):
            if not each.identity:
                raise errors.InvalidArgument(
                    f"endpoint {each.id} cannot have identity 0", field=f"identities[{index}].identity"
                )
        wanted = ((each.id, each.container_id, each.identity) for each in request.identities)
        return pb.SetEndpointIdentitiesResponse(unknown=await self._manager.set_identities(wanted))


def to_proto(record: EndpointRecord) -> pb.Endpoint:
    return pb.Endpoint(
        id=record.id,
        container_id=record.container_id,
        ifname=record.ifname,
        netns=record.netns,
        netns_cookie=record.netns_cookie,
        cgroup_id=record.cgroup_id,
        pod=record.pod,
        labels=dict(record.labels),
        ipv4=record.ipv4,
        ipv6=record.ipv6,
        ipv4_gateway=record.ipv4_gateway,
        ipv6_gateway=record.ipv6_gateway,
        mac=record.mac,
        host_mac=record.host_mac,
        host_ifname=record.host_ifname,
        host_ifindex=record.host_ifindex,
        mtu=record.mtu,
        pool=record.pool,
        state=pb.EndpointState.ValueType(int(record.state)),
        message=record.message,
        created_unix_seconds=record.created_unix_seconds,
        identity=record.identity,
    )


def _address(text: str) -> str:
    try:
        return str(ipaddress.ip_address(text))
    except ValueError:
        raise errors.InvalidArgument(f"{text[:60]!r} is not an address", field="address") from None


def _token(text: str) -> int:
    if not text:
        return 0
    if not (text.isascii() and text.isdigit() and 0 < int(text) <= model.ID_MAX):
        raise errors.InvalidArgument("the page token is not one a list gave", field="page.token")
    return int(text)
