"""NodeService: fibril.node.v1 to the directory and back. No decisions here."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Final

from fibril.node.v1 import node_pb2 as pb
from fibril.node.v1 import node_pb2_grpc
from fibril.types.v1 import types_pb2
from services.common import errors
from services.common.etcd.client import EtcdClient
from services.common.network import Mode
from services.identity.nodes import removal
from services.identity.nodes.directory import Directory
from services.identity.nodes.health import Health
from services.identity.nodes.model import Node
from services.identity.nodes.roster import NUMBERS

PAGE_DEFAULT: Final = 1000
PAGE_MAX: Final = 10_000


class NodeApi(node_pb2_grpc.NodeServiceServicer):
    """One servicer for all servers of the process."""

    def __init__(
        self,
        etcd: EtcdClient,
        cluster: str,
        own: str,
        directory: Directory,
        health: Health,
        mode_of: Callable[[str], tuple[Mode | None, int, str]],
    ) -> None:
        """mode_of: how a node is reached: mode (None: it is not), largest packet of a pod in bytes, what is wrong."""
        self._etcd = etcd
        self._cluster = cluster
        self._own = own
        self._directory = directory
        self._health = health
        self._mode_of = mode_of

    async def GetNode(self, request: pb.GetNodeRequest, context: object) -> pb.GetNodeResponse:
        self._require_synced()
        name = request.name or self._own
        node = self._directory.get(name)
        if node is None:
            raise errors.NotFound(f"there is no node {name[:60]!r}", field="name", fix="see: fibril node ls")
        return pb.GetNodeResponse(node=self._to_proto(node))

    async def ListNodes(self, request: pb.ListNodesRequest, context: object) -> pb.ListNodesResponse:
        size = request.page.size or PAGE_DEFAULT
        if size > PAGE_MAX:
            raise errors.InvalidArgument(f"a page of {size} is larger than {PAGE_MAX}", field="page.size")
        self._require_synced()
        nodes = self._directory.nodes()
        names = sorted(name for name in nodes if name > request.page.token)
        return pb.ListNodesResponse(
            nodes=[self._to_proto(nodes[name]) for name in names[:size]],
            next_token=names[size - 1] if len(names) > size else "",
        )

    async def WatchNodes(
        self, request: pb.WatchNodesRequest, context: object
    ) -> AsyncIterator[pb.WatchNodesResponse]:
        await self._directory.synced.wait()
        async for change in self._directory.feed.watch(request.after_revision):
            answer = pb.WatchNodesResponse(revision=change.revision)
            if change.item is None:
                answer.kind = types_pb2.WATCH_KIND_SYNCED
            elif change.kind == "delete":
                answer.kind = types_pb2.WATCH_KIND_DELETE
                answer.node.name = change.item.name
            else:
                answer.kind = types_pb2.WATCH_KIND_PUT
                answer.node.CopyFrom(self._to_proto(change.item))
            yield answer

    async def DeleteNode(self, request: pb.DeleteNodeRequest, context: object) -> pb.DeleteNodeResponse:
        if not request.name:
            raise errors.InvalidArgument("the request names no node", field="name")
        return pb.DeleteNodeResponse(blocks=await removal.remove(self._etcd, self._cluster, request.name))

    def _require_synced(self) -> None:
        if not self._directory.synced.is_set():
            raise errors.Unavailable(
                "the nodes have not been read from etcd yet", fix="check etcd and ask again"
            )

    def _to_proto(self, node: Node) -> pb.Node:
        mode, mtu, problem = self._mode_of(node.name)
        return pb.Node(
            name=node.name,
            ipv4=str(node.ipv4 or ""),
            ipv6=str(node.ipv6 or ""),
            pod_cidrs=[str(block) for block in sorted(node.blocks, key=str)],
            gateways=[str(gateway) for gateway in sorted(node.gateways, key=str)],
            configured_mode=pb.NetworkMode.ValueType(NUMBERS[node.configured_mode]),
            overlay_port=node.overlay_port,
            state=pb.NodeState.ValueType(node.state.value),
            mode=pb.NETWORK_MODE_UNSPECIFIED
            if mode is None or node.local
            else pb.NetworkMode.ValueType(NUMBERS[mode]),
            mtu=mtu,
            local=node.local,
            problem=problem,
            version=node.version,
            reachability=[
                pb.Reachability(
                    prober=prober,
                    underlay=view.underlay,
                    pod_network=view.pod_network,
                    rtt_us=view.rtt_us,
                    since_unix_seconds=view.since,
                )
                for prober, view in sorted(self._health.of(node.name).items())
            ],
        )
