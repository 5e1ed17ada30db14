"""A node by `fibril up` in a namespace of its own, asked through gRPC, etcd and maps rather than the command: tests here ask
often.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import os
import shutil
import signal
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grpc

from fibril.endpoint.v1 import endpoint_pb2 as ep
from fibril.endpoint.v1.endpoint_pb2_grpc import EndpointServiceStub
from fibril.identity.v1 import identity_pb2 as idpb
from fibril.identity.v1.identity_pb2_grpc import IdentityServiceStub
from fibril.ipcache.v1 import ipcache_pb2
from fibril.ipcache.v1.ipcache_pb2_grpc import IpcacheServiceStub
from fibril.status.v1 import status_pb2
from fibril.status.v1.status_pb2_grpc import StatusServiceStub
from fibril.types.v1 import types_pb2
from services.common.etcd.client import EtcdClient, KeyValue
from services.common.kernel import netns
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi
from services.ctl.children import embedded_etcd
from tests.e2e.ctl.ctlnode import Node, wait_for

ROOT = "/fibril/v1/default/"
INIT = 5
# A killed service is back within this time, and then in step.
BACK_S = 20.0


class IdentityNode(Node):
    """See ctlnode.Node."""

    def __init__(self) -> None:
        super().__init__(Path(tempfile.mkdtemp(prefix="fibril-")))
        self.etcd = embedded_etcd(self.instance).endpoint
        self._channels: list[grpc.Channel] = []
        self._spaces: list[Path] = []
        netns.add(self.netns)
        self.run("ip", "link", "set", "lo", "up")

    def disconnect(self) -> None:
        """An idle client may hold a draining service up for its grace time."""
        for channel in self._channels:
            channel.close()
        self._channels.clear()

    def close(self) -> None:
        self.disconnect()
        self.fibril("down", code=None)
        self.kill_all()
        for space in (*self._spaces, self.netns):
            netns.remove(space)
        shutil.rmtree(self.root, ignore_errors=True)

    def up(self, *words: str) -> None:
        self.disconnect()
        self.fibril("up", "--services", "ipam,identity", *words)
        self.endpoints = EndpointServiceStub(self._channel("ipam"))
        self.identities = IdentityServiceStub(self._channel("identity"))
        self.ipcache = IpcacheServiceStub(self._channel("identity"))

    def _channel(self, service: str) -> grpc.Channel:
        options = [("grpc.initial_reconnect_backoff_ms", 20), ("grpc.max_reconnect_backoff_ms", 100)]
        made = grpc.insecure_channel(f"unix:{self.instance.socket(service)}", options=options)
        self._channels.append(made)
        return made

    def kill(self, name: str) -> None:
        """SIGKILL one process, and wait until it has been started again and all is well."""
        old = self.processes()[name]
        os.kill(old, signal.SIGKILL)
        wait_for(lambda: self.processes().get(name, old) != old, f"a new {name}", BACK_S)
        wait_for(lambda: self.fibril("status", code=None).returncode == 0, "health", BACK_S)

    def components(self, service: str) -> dict[str, status_pb2.Component]:
        """Parts of a service by name."""
        answer = StatusServiceStub(self._channel(service)).GetStatus(
            status_pb2.GetStatusRequest(), timeout=10, wait_for_ready=True
        )
        return {component.name: component for component in answer.components}

    def is_well(self, part: str) -> bool:
        """Whether a part of the identity service is."""
        return self.components("identity")[part].health == types_pb2.HEALTH_OK

    # ---- pods
    def pod(self, name: str, labels: Mapping[str, str] | None = None) -> ep.Endpoint:
        """An endpoint in a namespace of its own."""
        space = Path(f"/run/netns/{self.name}-{name}")
        if space not in self._spaces:
            netns.add(space)
            self._spaces.append(space)
        request = ep.CreateEndpointRequest(
            container_id=name, netns=str(space), pod=f"test/{name}", labels=dict(labels or {})
        )
        return self.endpoints.CreateEndpoint(request, timeout=30, wait_for_ready=True).endpoint

    def relabel(self, name: str, labels: Mapping[str, str]) -> None:
        request = ep.SetEndpointLabelsRequest(key=ep.EndpointKey(container_id=name), labels=dict(labels))
        self.endpoints.SetEndpointLabels(request, timeout=30, wait_for_ready=True)

    def remove(self, name: str) -> None:
        self.endpoints.DeleteEndpoint(
            ep.DeleteEndpointRequest(container_id=name), timeout=30, wait_for_ready=True
        )

    def all(self) -> dict[str, ep.Endpoint]:
        """Asked again of who was killed with the question before him."""

        def ask() -> ep.ListEndpointsResponse | None:
            try:
                return self.endpoints.ListEndpoints(ep.ListEndpointsRequest(), timeout=10, wait_for_ready=True)
            except grpc.RpcError as error:
                if error.code() is not grpc.StatusCode.UNAVAILABLE:
                    raise
                return None

        answer = wait_for(ask, "an answer")
        return {endpoint.container_id: endpoint for endpoint in answer.endpoints}

    # ---- identities
    def in_maps(self) -> dict[int, set[int]]:
        """Endpoint number -> identities that programs see for it."""
        found: dict[int, set[int]] = {}
        for name, key in (("ep_iface", ctypes.c_uint32), ("ep_addr", abi.FibAddr)):
            with BpfMap.open(self.instance.pin_dir / abi.MAPS[name], key, abi.Endpoint) as opened:
                for _, value in opened.items():
                    found.setdefault(value.id, set()).add(value.identity)
        return found

    def resolve(self, labels: Mapping[str, str]) -> int:
        """The identity of labels, 0: none."""
        request = idpb.ResolveIdentityRequest(labels=dict(labels))
        with contextlib.suppress(grpc.RpcError):
            return int(
                self.identities.ResolveIdentity(request, timeout=10, wait_for_ready=True).identity.number
            )
        return 0

    def looked_up(self, address: str) -> int:
        """The identity of an address, 0: none."""
        request = ipcache_pb2.GetEntryRequest(address=address)
        with contextlib.suppress(grpc.RpcError):
            return int(self.ipcache.GetEntry(request, timeout=10, wait_for_ready=True).entry.identity)
        return 0

    def keys(self, prefix: str) -> dict[str, KeyValue]:
        """What etcd has below a prefix of the cluster's, by the rest of the key."""

        async def read() -> Any:
            async with EtcdClient([self.etcd]) as etcd:
                return await etcd.get_prefix(ROOT + prefix)

        return {kv.key.removeprefix(ROOT + prefix): kv for kv in asyncio.run(read()).kvs}

    def published(self) -> dict[str, int]:
        """Address -> identity, as other nodes learn it."""
        return {
            address: ipcache_pb2.StoredAddress.FromString(kv.value).identity
            for address, kv in self.keys("ip/").items()
        }

    def settled(self) -> bool:
        """Whether labels, endpoints, programs, etcd and the ipcache agree."""
        endpoints = self.all()
        want = {e.container_id: self.resolve(e.labels) if e.labels else INIT for e in endpoints.values()}
        addresses = {a: want[e.container_id] for e in endpoints.values() for a in (e.ipv4, e.ipv6) if a}
        return (
            0 not in want.values()
            and {name: e.identity for name, e in endpoints.items()} == want
            and self.in_maps() == {e.id: {want[name]} for name, e in endpoints.items()}
            and self.published() == addresses
            and {a: self.looked_up(a) for a in addresses} == addresses
        )

    def settle(self, seconds: float = 15.0) -> dict[str, int]:
        """Wait for that; identities by container."""
        try:
            wait_for(self.settled, "agreement", seconds)
        except AssertionError as error:
            state = {
                "endpoints": {n: (e.id, e.identity, dict(e.labels)) for n, e in self.all().items()},
                "maps": self.in_maps(), "etcd": self.published(),
            }  # fmt: skip
            raise AssertionError(f"{error}: {state}{self.logs()}") from None
        return {name: endpoint.identity for name, endpoint in self.all().items()}
