"""StatusService: what every Fibril process says about itself, gathered from the services it hosts."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Sequence

from fibril.status.v1 import status_pb2, status_pb2_grpc
from fibril.types.v1 import types_pb2
from services.common.instance import Instance
from services.common.service import ComponentStatus, Service, State
from services.common.version import version

log = logging.getLogger(__name__)

_HEALTH: dict[State, types_pb2.Health.ValueType] = {
    "ok": types_pb2.HEALTH_OK,
    "degraded": types_pb2.HEALTH_DEGRADED,
    "failed": types_pb2.HEALTH_FAILED,
}


class StatusServicer(status_pb2_grpc.StatusServiceServicer):
    """Answers GetStatus from memory."""

    def __init__(self, instance: Instance, services: Sequence[Service]) -> None:
        self._instance = instance
        self._services = services
        self._ready = 0.0
        # Name of a component -> its last state and since when: for components that do not keep that
        # themselves.
        self._seen: dict[str, tuple[State, float]] = {}

    def set_ready(self) -> None:
        """From now on the process counts as started."""
        self._ready = time.time()

    async def GetStatus(
        self, request: status_pb2.GetStatusRequest, context: object
    ) -> status_pb2.GetStatusResponse:
        """See status.proto."""
        components = self.components()
        return status_pb2.GetStatusResponse(
            version=version(),
            instance=self._instance.name,
            pid=os.getpid(),
            services=[service.name for service in self._services],
            ready_unix_seconds=self._ready,
            # The enum's order is from good to bad.
            health=max([_HEALTH[part.state] for part in components] or [types_pb2.HEALTH_OK]),
            components=[
                status_pb2.Component(
                    name=part.name,
                    health=_HEALTH[part.state],
                    message=part.message,
                    since_unix_seconds=part.since,
                    used=part.used,
                    capacity=part.capacity,
                )
                for part in components
            ],
        )

    def components(self) -> list[ComponentStatus]:
        """All parts by name, `since` filled in. Where a process hosts several services, a part's name begins with
        its service's. A service that cannot say how it is counts as failed.
        """
        found: list[ComponentStatus] = []
        for service in self._services:
            prefix = f"{service.name}." if len(self._services) > 1 else ""
            try:
                parts = list(service.status())
            except Exception as error:
                log.error("status failed", extra={"service": service.name}, exc_info=error)
                message = f"its status cannot be read ({type(error).__name__}); see the log"
                parts = [ComponentStatus("status", "failed", message)]
            found += (dataclasses.replace(part, name=prefix + part.name) for part in parts)
        now = time.time()
        seen, self._seen = self._seen, {}
        for index, part in enumerate(found):
            state, since = seen.get(part.name, ("", 0.0))
            since = part.since or (since if state == part.state else now)
            self._seen[part.name] = (part.state, since)
            found[index] = dataclasses.replace(part, since=since)
        return sorted(found, key=lambda part: part.name)
