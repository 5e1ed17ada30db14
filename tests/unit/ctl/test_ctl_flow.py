"""What `fibril flow` asks for, and how flows look."""

from __future__ import annotations

import shlex
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest
from click.testing import CliRunner

from fibril.flow.v1 import flow_pb2 as pb
from fibril.types.v1 import reasons_pb2, types_pb2
from services.ctl.commands import flow
from services.ctl.context import Ctl
from services.ctl.main import cli
from services.ctl.render import to_record

FLOW = pb.Flow(
    time_unix_seconds=1.5, verdict=pb.FLOW_VERDICT_DROPPED, type=pb.FLOW_TYPE_DROP, direction=pb.FLOW_DIRECTION_INGRESS,
    protocol=6, drop_reason=reasons_pb2.DROP_REASON_NO_ENDPOINT, policy="Policy shop/api", rule="web", suppressed=3,
    source=pb.FlowEnd(address="fd00::1", port=40000), destination=pb.FlowEnd(address="10.0.0.2", port=80, pod="shop/api"),
)  # fmt: skip


class Asked:
    """A service that remembers one flow, and what it was asked for."""

    def __init__(self) -> None:
        self.request = pb.GetFlowsRequest()
        self.service = ""

    def GetFlows(
        self, request: pb.GetFlowsRequest, timeout: float | None = None
    ) -> AsyncIterator[pb.GetFlowsResponse]:
        self.request = request
        return self._answer()

    async def _answer(self) -> AsyncIterator[pb.GetFlowsResponse]:
        yield pb.GetFlowsResponse(kind=types_pb2.WATCH_KIND_PUT, flow=FLOW)
        yield pb.GetFlowsResponse(kind=types_pb2.WATCH_KIND_SYNCED)


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> Asked:
    made = Asked()

    def call(_: Ctl, use: Callable[[Any], Any], service: str = "ipam") -> Any:
        import asyncio

        made.service = service
        return asyncio.run(use(None))

    monkeypatch.setattr(flow, "stub", lambda _: made)
    monkeypatch.setattr(Ctl, "call", call)
    return made


def row(message: pb.Flow) -> list[str]:
    return [column.text(to_record(message)) for column in flow.FLOWS[1:]]


def test_a_refusal_shows_who_whom_and_why() -> None:
    assert row(FLOW) == [
        "dropped",
        "drop",
        "ingress",
        "tcp",
        "[fd00::1]:40000",
        "shop/api:80",
        "no-endpoint; Policy shop/api, web; 3 like it before",
    ]


def test_what_has_no_ports_shows_its_kind() -> None:
    ends: dict[str, Any] = {
        "source": pb.FlowEnd(address="10.0.0.1"),
        "destination": pb.FlowEnd(address="fd00::2"),
    }
    shown = row(
        pb.Flow(verdict=pb.FLOW_VERDICT_FORWARDED, type=pb.FLOW_TYPE_NEW, protocol=58, icmp_type=128, **ends)
    )
    assert shown[3:] == ["icmpv6/128", "10.0.0.1", "fd00::2", "-"]
    assert row(pb.Flow(protocol=47, **ends))[3] == "47"


def test_options_become_one_filter(asked: Asked) -> None:
    words = shlex.split(
        "flow ls --pod shop/* --from-pod a --to-pod b --ip 10.0.0.0/8 --port 80 --proto udp --verdict audited --type revoked "
        "--identity 7 --label x=y=z --label e= --policy api --since 5m --last 9"
    )
    assert CliRunner().invoke(cli, words, catch_exceptions=False).exit_code == 0
    assert asked.service == "policy"
    assert abs(asked.request.since_unix_seconds - time.time() + 300) < 60
    asked.request.since_unix_seconds = 0
    wanted = pb.FlowFilter(
        pod="shop/*", source_pod="a", destination_pod="b", address="10.0.0.0/8", port=80, protocol=17,
        verdict=pb.FLOW_VERDICT_AUDITED, type=pb.FLOW_TYPE_REVOKED, identity=7, labels={"x": "y=z", "e": ""}, policy="api",
    )  # fmt: skip
    assert asked.request == pb.GetFlowsRequest(allow=[wanted], last=9)


def test_without_options_the_last_hundred_are_listed(asked: Asked) -> None:
    result = CliRunner().invoke(cli, ["flow", "ls"], catch_exceptions=False)
    assert asked.request == pb.GetFlowsRequest(last=100)
    assert [line.split()[1] for line in result.output.splitlines()] == ["VERDICT", "dropped"]


@pytest.mark.parametrize(
    ("words", "last", "back"), [((), 0, 0), (("--since", "2h"), 0, 7200), (("--last", "3"), 3, None)]
)
def test_following_begins_now_unless_more_is_wanted(
    asked: Asked, words: tuple[str, ...], last: int, back: float | None
) -> None:
    result = CliRunner().invoke(cli, ["-o", "json", "flow", "follow", *words], catch_exceptions=False)
    assert len(result.output.splitlines()) == 1 and '"policy": "Policy shop/api"' in result.output
    assert asked.request.follow and asked.request.last == last
    since = asked.request.since_unix_seconds
    assert since == 0 if back is None else abs(since - time.time() + back) < 60


@pytest.mark.parametrize(
    "words",
    [
        ("--since", "5"),
        ("--since", "x"),
        ("--port", "65536"),
        ("--label", "app"),
        ("--proto", "x"),
        ("--last", "-1"),
    ],
)
def test_wishes_that_make_no_sense_are_refused(words: tuple[str, ...]) -> None:
    assert CliRunner().invoke(cli, ["flow", "ls", *words]).exit_code == 2
