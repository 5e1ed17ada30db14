"""What a service is to the host: an object with a name, start, stop and a status. Also re-exported by
host.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol

from services.common.instance import Instance
from services.common.supervise import Tasks

if TYPE_CHECKING:
    from services.common.telemetry import Telemetry

State = Literal["ok", "degraded", "failed"]


@dataclass(frozen=True)
class ComponentStatus:
    """How one part of a process is: a connection, a reconciler, a map.

    name: stable and dotted ("etcd", "map.ep_addr"), unique in the process.
    message: one sentence for a person; names the remedy unless the state is ok.
    since: Unix time of the last change of state; 0 lets the host remember when it saw the change.
    used, capacity: entries of a bounded part; both 0 when it has no bound.
    """

    name: str
    state: State = "ok"
    message: str = ""
    since: float = 0.0
    used: int = 0
    capacity: int = 0


class Registrar(Protocol):
    """Where a service adds its gRPC servicers while it starts."""

    def add(self, adder: Callable[[Any, Any], None], servicer: object) -> None:
        """Register `servicer` with the generated function `add_<Service>Servicer_to_server`."""


@dataclass(frozen=True)
class HostContext:
    """What the host lends to a service from start to stop.

    tasks: background tasks; the first failure stops the process.
    telemetry: spans and metrics; costs nothing when off.
    rpc: the service's gRPC server, which begins to answer once `start` has returned.
    """

    instance: Instance
    tasks: Tasks
    telemetry: Telemetry
    rpc: Registrar


class Service(Protocol):
    """One service as the host runs it. The name is also that of its socket and pid file."""

    @property
    def name(self) -> str:
        """Lower-case letters only ("ipam")."""

    async def start(self, ctx: HostContext) -> None:
        """Adopt what exists, add servicers to `ctx.rpc`, spawn background work. Raising ends the start."""

    async def stop(self) -> None:
        """Release what `start` took, also after a start that raised. The data path stays as it is."""

    def status(self) -> Sequence[ComponentStatus]:
        """Every part's state, from memory: called on the event loop for each GetStatus."""
