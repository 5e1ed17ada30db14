"""Whom the prefilter always allows."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import IPv4Address, ip_address
from typing import Any

import pytest

from services.common import errors
from services.common.instance import Instance
from services.common.kernel.maps import BpfMap
from services.common.pipeline.abi import IPAddress, NodeEntry, NodeMode, be32
from services.lb.prefilter import part as module
from services.lb.prefilter.part import PrefilterPart


class State:
    declared = True
    cluster = ()

    def __init__(self) -> None:
        self.own: dict[str, object] = {}
        self.limits: dict[str, object] = {}
        self.protected: list[frozenset[IPAddress]] = []
        self.kept: list[bool] = []

        self.failure: Exception | None = None

    def protect(self, addresses: frozenset[IPAddress], keep: bool = False) -> None:
        self.protected.append(addresses)
        self.kept.append(keep)

    def mend(self) -> None:
        """Nothing is wrong."""

    def expire(self) -> float:
        if self.failure is not None:
            raise self.failure
        return 0


def test_nodes_that_cannot_be_read_stay_protected(monkeypatch: pytest.MonkeyPatch) -> None:
    own, other = ip_address("192.0.2.1"), IPv4Address("192.0.2.2")
    failure: list[Exception] = []

    class Nodes:
        def items(self) -> Iterator[tuple[int, NodeEntry]]:
            yield 1, NodeEntry(mode=NodeMode.OVERLAY, v4=be32(other))

    @contextmanager
    def opened(*_: object) -> Iterator[Nodes]:
        for error in failure:
            raise error
        yield Nodes()

    monkeypatch.setattr(BpfMap, "open", opened)
    part = PrefilterPart(Instance.from_env("t-peers"), lambda: [])
    state: Any = State()
    part._state = state
    part.protect([own])
    part._protect()
    assert state.protected == [{own, other}]
    for error in (errors.FailedPrecondition("Cannot allocate memory"), OSError(24, "Too many open files")):
        failure[:] = [error]
        part._protect()
        # This node's own are known all the same.
        assert (state.protected.pop(), state.kept.pop()) == ({own}, True)
    # There is no identity service.
    failure[:] = [errors.NotFound("no map")]
    part._protect()
    assert state.protected[1:] == [{own}] and state.kept == [False, False]


async def test_what_cannot_be_kept_up_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "RETRY_S", 0.01)
    monkeypatch.setattr(module, "_BUNCH_S", 0.01)
    part = PrefilterPart(Instance.from_env("t-peers"), lambda: ["eth0"])
    state: Any = State()
    part._state, part._problem = state, ""
    keeping = asyncio.create_task(part._keep())

    async def until(state_of: str) -> None:
        async with asyncio.timeout(20):
            while part.status()[0].state != state_of:  # noqa: ASYNC110
                await asyncio.sleep(0.01)

    try:
        await until("ok")
        state.failure = errors.ResourceExhausted("the disk is full")
        await until("degraded")
        assert "the disk is full" in part.status()[0].message
        state.failure = None
        await until("ok")
    finally:
        keeping.cancel()
        await asyncio.gather(keeping, return_exceptions=True)
