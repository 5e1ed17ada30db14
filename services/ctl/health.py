"""How a node is: its processes as the supervisor and /proc know them, and every part as the services tell."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from services.common.instance import Instance
from services.ctl import procs
from services.ctl.supervisor import state_file

OK, DEGRADED, FAILED = "HEALTH_OK", "HEALTH_DEGRADED", "HEALTH_FAILED"
_WORSE = {OK: 0, DEGRADED: 1, FAILED: 2, "HEALTH_UNSPECIFIED": 2}


@dataclass(frozen=True)
class Part:
    """One line of `fibril status`; the fields of fibril.status.v1.Component, and who tells it."""

    source: str
    name: str
    health: str
    message: str = ""
    since_unix_seconds: float = 0.0
    used: int = 0
    capacity: int = 0


@dataclass
class NodeHealth:
    """A whole node. `running` is whether any of its processes lives."""

    instance: str
    running: bool = False
    ready: bool = False
    parts: list[Part] = field(default_factory=list)

    @property
    def health(self) -> str:
        """The worst of all parts."""
        return max((p.health for p in self.parts), key=lambda h: _WORSE.get(h, 2), default=FAILED)

    @property
    def ok(self) -> bool:
        """Everything answers and is well."""
        return self.ready and self.health == OK

    def record(self) -> dict[str, Any]:
        """As a dict, for JSON and YAML."""
        return {
            "instance": self.instance,
            "running": self.running,
            "health": self.health,
            "parts": [asdict(p) for p in self.parts],
        }

    def trouble(self) -> str:
        """What is not well, in one sentence; "" when all is."""
        bad = [p for p in self.parts if p.health != OK]
        return "; ".join(
            f"{p.source} {p.name}: {p.message}" if p.message else f"{p.source} {p.name}" for p in bad
        )


def supervisor_state(instance: Instance) -> dict[str, Any] | None:
    """What the supervisor last wrote; None when there is no supervisor (any more)."""
    try:
        state: dict[str, Any] = json.loads(state_file(instance).read_text())
    except (FileNotFoundError, ValueError):
        return None
    now = procs.stat(state["pid"])
    alive = now is not None and now.start_ticks == state["start_ticks"] and now.state not in "ZX"
    return state if alive else None


def ask(instance: Instance, services: Sequence[str], wait: float = 2.0) -> NodeHealth:
    """Look at everything; never fails, what cannot be asked is a part that failed."""
    node = NodeHealth(instance.name)
    state = supervisor_state(instance)
    node.parts += _processes(instance, state)
    node.running = any(p.health == OK for p in node.parts)
    if state is not None:
        services = list(state["services"])
    answers = asyncio.run(_ask_all(instance, services, wait))
    node.ready = all(ready for ready, _ in answers)
    for _, parts in answers:
        node.parts += parts
    return node


def _processes(instance: Instance, state: dict[str, Any] | None) -> list[Part]:
    if state is None:
        alive: dict[str, int] = {}
        for process in procs.find(instance.run_dir):
            alive.setdefault(process.name, process.pid)
            process.close()
        parts = [
            Part(
                "process",
                "supervisor",
                DEGRADED if alive else FAILED,
                f"not running; start it with: fibril --instance {instance.name} up",
            )
        ]
        return parts + [
            Part("process", name, OK, f"pid {pid}, unsupervised")
            for name, pid in sorted(alive.items())
            if name != "supervisor"
        ]
    parts = [Part("process", "supervisor", OK, f"pid {state['pid']}")]
    for child in state["children"]:
        restarts = f", restarted {child['restarts']} times" if child["restarts"] else ""
        if child["state"] == "running":
            parts.append(Part("process", child["name"], OK, f"pid {child['pid']}{restarts}"))
        else:
            log = instance.run_dir / "log" / f"{child['name']}.log"
            parts.append(
                Part(
                    "process",
                    child["name"],
                    FAILED,
                    f"{child['last_exit'] or 'not started yet'}{restarts}; its log: {log}",
                )
            )
    return parts


async def _ask_all(instance: Instance, services: Sequence[str], wait: float) -> list[tuple[bool, list[Part]]]:
    return await asyncio.gather(*(_ask(instance, s, wait) for s in services))


async def _ask(instance: Instance, service: str, wait: float) -> tuple[bool, list[Part]]:
    """Whether one service is ready, and its parts."""
    socket = instance.socket(service)
    if not socket.exists():
        return False, [Part(service, "api", FAILED, f"there is no {socket}")]
    import grpc

    from fibril.status.v1 import status_pb2, status_pb2_grpc
    from services.common.rpc.client import channel
    from services.common.rpc.status import from_rpc_error
    from services.ctl.render import to_record

    async with channel(f"unix:{socket}") as to_service:
        try:
            answer = await status_pb2_grpc.StatusServiceStub(to_service).GetStatus(
                status_pb2.GetStatusRequest(), timeout=wait
            )
        except grpc.aio.AioRpcError as error:
            return False, [Part(service, "api", FAILED, str(from_rpc_error(error)))]
    parts = [
        Part(
            service,
            "api",
            OK,
            f"version {answer.version}, pid {answer.pid}",
            since_unix_seconds=answer.ready_unix_seconds,
        )
    ]
    # A process with several services tells of all of them on each socket.
    prefix = f"{service}." if len(answer.services) > 1 else ""
    for component in answer.components:
        if component.name.startswith(prefix):
            record = to_record(component)
            parts.append(Part(service, **{**record, "name": component.name.removeprefix(prefix)}))
    return bool(answer.ready_unix_seconds), parts
