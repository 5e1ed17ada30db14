"""Which addresses are this node's."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address

import pytest

from services.common import errors
from services.common.instance import Instance
from services.common.kernel.maps import BpfMap
from services.common.pipeline.abi import Endpoint, FibAddr, IPAddress
from services.lb.pods import LocalAddresses


def test_pods_that_cannot_be_read_stay(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    pods = [ip_address("10.1.0.1"), ip_address("fd00::1")]
    failure: list[Exception] = []

    class Table:
        def items(self) -> Iterator[tuple[FibAddr, Endpoint]]:
            for pod in pods:
                yield FibAddr.of(pod), Endpoint()
                if failure and not isinstance(failure[0], errors.NotFound):
                    raise failure[0]

    @contextmanager
    def opened(*_: object) -> Iterator[Table]:
        if failure and isinstance(failure[0], errors.NotFound):
            raise failure[0]
        yield Table()

    monkeypatch.setattr(BpfMap, "open", opened)
    told: list[frozenset[IPAddress]] = []
    local = LocalAddresses(Instance.from_env("t-pods"), told.append)
    local.look()
    assert local.all == set(pods) and told == [frozenset(pods)]
    for error in (errors.FailedPrecondition("Cannot allocate memory"), OSError(24, os.strerror(24))):
        failure[:] = [error]
        caplog.clear()
        for _ in range(3):
            local.look()
        assert local.all == set(pods) and len(told) == 1
        # With another version's map it is so for long: said once, not every 2 s.
        assert len(caplog.records) == 1
    # There is no ipam service any more.
    failure[:] = [errors.NotFound("no map")]
    local.look()
    assert not local.all and len(told) == 2
