"""Configuration of the way to etcd; a section of every service that uses it."""

from __future__ import annotations

import re
import socket
from dataclasses import dataclass, field
from pathlib import Path

from services.common.errors import InvalidArgument
from services.common.etcd.client import EtcdTls
from services.common.instance import Instance


@dataclass(frozen=True)
class EtcdConfig:
    """Where etcd is, and which part of it is this cluster's."""

    endpoints: tuple[str, ...] = field(
        default=("http://127.0.0.1:2379",), metadata={"help": "URLs of the members, http(s):// or unix:"}
    )
    cluster: str = field(default="default", metadata={"help": "cluster name, part of every key"})
    cluster_id: int = field(
        default=1, metadata={"help": "the cluster's number, 1 to 4094; part of every identity"}
    )
    node: str = field(
        default="", metadata={"help": "this node's name in the cluster; empty: host name and instance"}
    )
    ca: str = field(
        default="", metadata={"help": "PEM file of the authority that signed the servers' certificates"}
    )
    cert: str = field(default="", metadata={"help": "PEM file of the client certificate"})
    key: str = field(default="", metadata={"help": "PEM file of its key"})
    timeout_s: float = field(default=3.0, metadata={"help": "seconds after which a call to etcd has failed"})

    def __post_init__(self) -> None:
        for name in ("cluster", "node"):
            value = getattr(self, name)
            if not re.fullmatch(r"[A-Za-z0-9]([A-Za-z0-9._-]{0,251}[A-Za-z0-9])?", value) and (
                value or name == "cluster"
            ):
                raise InvalidArgument(
                    f"{name} {value[:60]!r} is malformed",
                    field=name,
                    fix="use letters, digits, '.', '-' and '_'",
                )
        if not 1 <= self.cluster_id <= 4094:
            raise InvalidArgument(f"{self.cluster_id} is outside 1..4094", field="cluster_id")
        if not 0.1 <= self.timeout_s <= 60:
            raise InvalidArgument(f"{self.timeout_s:g} is outside 0.1..60", field="timeout_s")
        self.tls()

    def tls(self) -> EtcdTls | None:
        """The files for https endpoints; None when none is named."""

        def path(text: str) -> Path | None:
            return Path(text) if text else None

        if not (self.ca or self.cert or self.key):
            return None
        return EtcdTls(path(self.ca), path(self.cert), path(self.key))

    def node_name(self, instance: Instance) -> str:
        """What this node is called in the cluster; must not change while it holds anything there."""
        if self.node:
            return self.node
        host = re.sub(r"[^A-Za-z0-9.-]", "-", socket.gethostname()).strip("-.") or "host"
        return f"{host}_{instance.name}"
