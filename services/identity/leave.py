"""Take what vanishes with a node out of etcd at once, and not only when its lease ends by itself: for `fibril down`."""

from __future__ import annotations

import contextlib

from services.common.etcd.client import EtcdClient
from services.common.instance import Instance
from services.identity.config import IdentityConfig
from services.identity.db import open_db
from services.identity.lease import NodeLease

TIMEOUT_S = 0.5


async def leave(instance: Instance, cfg: IdentityConfig) -> None:
    """End the node's lease. The service must not be running. Unavailable, FailedPrecondition: it ends by itself."""
    path = instance.state_dir / "identity.db"
    if not path.exists():
        return
    with contextlib.closing(open_db(path)) as db:
        async with EtcdClient(cfg.etcd.endpoints, tls=cfg.etcd.tls(), timeout_s=TIMEOUT_S) as etcd:
            await NodeLease(etcd, db, cfg.identities.lease_s, cfg.owner(instance)).revoke()
