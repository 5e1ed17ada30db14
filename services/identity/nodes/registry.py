"""This node's own record and sign of life in etcd.

The record says how others reach the node and stays when it dies; it is written when something in it has changed, so a
node that gets another address just goes on. The sign of life hangs on the node's lease.
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from fibril.node.v1 import node_pb2 as pb
from services.common import errors
from services.common.etcd.client import EtcdClient
from services.common.instance import Instance
from services.common.network import NetworkConfig
from services.common.underlay import Underlay
from services.common.version import version
from services.identity.lease import NodeLease
from services.identity.nodes.directory import ALIVE, NODES, Directory, root_of
from services.identity.nodes.model import NodeState
from services.identity.nodes.roster import NUMBERS

log = logging.getLogger(__name__)

RETRY_S: Final = 1.0
RESYNC_S: Final = 60.0


class Registry:
    """Used from one event loop; the underlay must have been started. `problem`: one sentence, empty when all is well."""

    def __init__(
        self,
        etcd: EtcdClient,
        cluster: str,
        name: str,
        instance: Instance,
        cfg: NetworkConfig,
        underlay: Underlay,
        lease: NodeLease,
        directory: Directory,
    ) -> None:
        self._etcd = etcd
        self._name = name
        self._cfg = cfg
        self._underlay = underlay
        self._lease = lease
        self._directory = directory
        self._record_key = root_of(cluster) + NODES + name
        self._alive_key = root_of(cluster) + ALIVE + name
        self._token = _token(instance)
        self._wake = asyncio.Event()
        self._tasks: list[asyncio.Task[None]] = []
        self._trouble = "not registered yet"
        self._taken = ""
        self._signed = 0  # revision of the sign of life under the lease in use

    async def start(self) -> None:
        """Register, and keep the record as the underlay is."""
        # Whoever else uses the lease goes by the node's name, which must be its own.
        self._lease.first(self._granted)
        self._underlay.on_change(self._wake.set)
        self._directory.on_change(self._told_of)
        self._tasks.append(asyncio.create_task(self._run(), name="nodes.registry"))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()

    def tasks(self) -> Iterable[asyncio.Task[None]]:
        """Endless; one that ends is a failure."""
        return tuple(self._tasks)

    @property
    def problem(self) -> str:
        return self._taken or self._trouble or self._same_address()

    def record(self) -> pb.StoredNode:
        """What the others shall know."""
        facts = self._underlay.facts
        return pb.StoredNode(
            name=self._name,
            ipv4=str(facts.ipv4 or ""),
            ipv6=str(facts.ipv6 or ""),
            mode=pb.NetworkMode.ValueType(NUMBERS[self._cfg.mode]),
            overlay_port=self._cfg.overlay_port,
            version=version(),
            probe_port=self._cfg.probe_port,
            uplink_mtu=facts.mtu,
            underlay_networks=sorted(map(str, facts.networks)),
        )

    async def _run(self) -> None:
        while True:
            self._wake.clear()
            pause = RESYNC_S
            try:
                # Without one, the name may be another machine's; the lease tells what is wrong then.
                if lease := self._lease.lease:
                    await self._sign(lease)
                    await self._register()
                    self._trouble = ""
            except errors.FibrilError as error:
                self._trouble = str(error)
                pause = RETRY_S
            try:
                async with asyncio.timeout(pause):
                    await self._wake.wait()
            except TimeoutError:
                continue

    async def _register(self) -> None:
        wanted = self.record().SerializeToString(deterministic=True)
        present = await self._etcd.get(self._record_key)
        if present is not None and present.value == wanted:
            return
        # Not if the lease has ended and another has the name since.
        expect = {self._alive_key: self._signed, self._record_key: present.mod_revision if present else 0}
        if await self._etcd.transact(expect, put={self._record_key: wanted}) is None:
            raise errors.Aborted(f"the record of node {self._name} was changed by somebody else meanwhile")
        log.info("registered", extra={"node": self._name, "addresses": self._addresses()})

    def _addresses(self) -> str:
        facts = self._underlay.facts
        return ", ".join(str(address) for address in (facts.ipv4, facts.ipv6) if address)

    async def _granted(self, lease: int) -> None:
        """FailedPrecondition when another machine lives under this name: then nobody uses the lease."""
        self._signed = 0
        await self._sign(lease)
        self._wake.set()

    async def _sign(self, lease: int) -> None:
        """Make sure that the sign of life is ours."""
        value = pb.StoredAlive(token=self._token).SerializeToString()
        present = await self._etcd.get(self._alive_key)
        foreign = present is not None and present.value != value and present.lease
        # Under our lease and not by this process: the machine has booted since, unless it was ours already. Then it is that of
        # a copy of this machine.
        if foreign and (foreign != lease or self._signed):
            self._taken = f"another node is registered as {self._name!r} and alive"
            if self._signed:
                self._lease.replace()
            raise errors.FailedPrecondition(
                self._taken, fix="give one of them another name (etcd.node), or wait until it is gone"
            )
        if present is not None and present.value == value and present.lease == lease:
            self._signed = present.mod_revision
        else:
            revision = present.mod_revision if present is not None else 0
            signed = await self._etcd.cas(self._alive_key, revision, value, lease=lease)
            if signed is None:
                raise errors.Aborted("the sign of life was written by somebody else meanwhile")
            self._signed = signed
        self._taken = ""

    def _told_of(self, name: str) -> None:
        """Somebody may have changed the record, or lost all that etcd had."""
        if name == self._name:
            self._wake.set()

    def _same_address(self) -> str:
        facts = self._underlay.facts
        for node in self._directory.nodes().values():
            if node.local or node.state is not NodeState.ALIVE:
                continue
            for mine, other in ((facts.ipv4, node.ipv4), (facts.ipv6, node.ipv6)):
                if mine is not None and mine == other:
                    return f"node {node.name} is registered with this node's address {mine}; give one of them another"
        return ""


def _token(instance: Instance) -> str:
    """The running machine and the instance on it. The database may be lost and others' state have the same path: machines
    made of containers share a kernel, but no network namespace.
    """
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    return f"{boot}/{os.stat('/proc/thread-self/ns/net').st_ino}/{instance.state_dir}"
