"""GetStatus: the worst part decides, times of change are remembered, a broken service does not hide the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest

from fibril.status.v1.status_pb2 import GetStatusRequest, GetStatusResponse
from fibril.types.v1.types_pb2 import HEALTH_DEGRADED, HEALTH_FAILED, HEALTH_OK
from services.common import status
from services.common.instance import Instance
from services.common.service import ComponentStatus, HostContext
from services.common.status import StatusServicer


@dataclass
class Fake:
    name: str = "ipam"
    parts: list[ComponentStatus] = field(default_factory=list)
    failure: Exception | None = None

    async def start(self, ctx: HostContext) -> None: ...

    async def stop(self) -> None: ...

    def status(self) -> Sequence[ComponentStatus]:
        if self.failure:
            raise self.failure
        return self.parts


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [1000.0]
    monkeypatch.setattr(status.time, "time", lambda: now[0])
    return now


async def get(servicer: StatusServicer) -> GetStatusResponse:
    return await servicer.GetStatus(GetStatusRequest(), None)


async def test_the_worst_part_is_the_process_health() -> None:
    fake = Fake(parts=[ComponentStatus("etcd"), ComponentStatus("book", "degraded", "no etcd")])
    servicer = StatusServicer(Instance("n"), [fake])
    answer = await get(servicer)
    assert answer.health == HEALTH_DEGRADED
    assert [part.name for part in answer.components] == ["book", "etcd"]
    assert (answer.instance, list(answer.services)) == ("n", ["ipam"])
    fake.parts.append(ComponentStatus("x", "failed"))
    assert (await get(servicer)).health == HEALTH_FAILED
    fake.parts.clear()
    assert (await get(servicer)).health == HEALTH_OK


async def test_since_moves_only_when_the_state_does(clock: list[float]) -> None:
    fake = Fake(parts=[ComponentStatus("etcd")])
    servicer = StatusServicer(Instance(), [fake])

    async def since() -> Any:
        return (await get(servicer)).components[0].since_unix_seconds

    assert await since() == 1000
    clock[0] = 1010
    fake.parts = [ComponentStatus("etcd", message="another message, same state")]
    assert await since() == 1000
    fake.parts = [ComponentStatus("etcd", "failed")]
    assert await since() == 1010
    fake.parts = [ComponentStatus("etcd", "failed", since=5)]
    assert await since() == 5


async def test_ready_is_zero_until_the_start_is_over(clock: list[float]) -> None:
    servicer = StatusServicer(Instance(), [])
    assert (await get(servicer)).ready_unix_seconds == 0
    servicer.set_ready()
    assert (await get(servicer)).ready_unix_seconds == 1000


async def test_a_service_whose_status_raises_is_failed_and_alone() -> None:
    broken = Fake("lb", failure=ValueError("secret"))
    answer = await get(StatusServicer(Instance(), [broken, Fake("ipam", [ComponentStatus("etcd")])]))
    assert [(part.name, part.health) for part in answer.components] == [
        ("ipam.etcd", HEALTH_OK),
        ("lb.status", HEALTH_FAILED),
    ]
    assert "secret" not in answer.components[1].message


async def test_bounded_parts_say_how_full_they_are() -> None:
    fake = Fake(parts=[ComponentStatus("map.ep_addr", used=3, capacity=10)])
    part = (await get(StatusServicer(Instance(), [fake]))).components[0]
    assert (part.used, part.capacity) == (3, 10)
