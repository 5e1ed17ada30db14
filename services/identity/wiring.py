"""The identity service put together. The only file that knows every object."""

from __future__ import annotations

import sqlite3
from collections.abc import Sequence

from services.common.etcd.client import EtcdClient
from services.common.instance import Instance
from services.common.service import ComponentStatus, HostContext
from services.identity.config import IdentityConfig
from services.identity.db import open_db


class IdentityService:
    """Identities, the ipcache, nodes and the ways between them, and workloads, of one node."""

    name = "identity"

    def __init__(self, instance: Instance, cfg: IdentityConfig) -> None:
        """Opens the node's database and connects to nothing. FailedPrecondition if the database is not
        usable.
        """
        self._instance = instance
        self._cfg = cfg
        self._db: sqlite3.Connection = open_db(instance.state_dir / "identity.db")
        self._etcd = EtcdClient(cfg.etcd.endpoints, tls=cfg.etcd.tls(), timeout_s=cfg.etcd.timeout_s)

    async def start(self, ctx: HostContext) -> None:
        """Adopt what there is; what can only be done later goes on in the background."""

    async def stop(self) -> None:
        """Let what is under way end; the data path and all that is recorded stay."""
        await self._etcd.close()
        self._db.close()

    def status(self) -> Sequence[ComponentStatus]:
        return []
