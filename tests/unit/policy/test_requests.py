"""Requests that make no sense are refused by field, and none of them is a failure of the service."""

from __future__ import annotations

import asyncio
from typing import Any, cast

import grpc
import pytest

from fibril.policy.v1 import policy_pb2 as pb
from fibril.types.v1 import types_pb2
from services.common.errors import FailedPrecondition, InvalidArgument, ResourceExhausted
from services.common.instance import Instance
from services.policy import store
from services.policy.answers import Answers
from services.policy.api import PolicyApi
from services.policy.enforcer import Enforcer
from services.policy.explain import Explainer
from services.policy.kernel.connections import Connections
from services.policy.resolve.numbers import RuleNumbers
from services.policy.resolve.world import World
from tests.policy.tables import FakeWriter, as_writer

CONTEXT: Any = cast(grpc.ServicerContext, None)
POLICY = "apiVersion: networking.k8s.io/v1\nkind: NetworkPolicy\nmetadata: {name: %s}\nspec: {podSelector: {}%s}\n"


@pytest.fixture
def api() -> PolicyApi:
    nothing: Any = None
    enforcer = Enforcer(World(), RuleNumbers(), {})
    kept = store.Store(nothing, "c", enforcer.set_policy, enforcer.note)
    kept.synced.set()
    connections = Connections(lambda: nothing, 1)
    answers = Answers(Instance("t"), enforcer, Explainer(enforcer, True), connections, lambda: nothing)
    return PolicyApi(kept, enforcer, nothing, nothing, answers, nothing, connections, lambda: nothing, nothing)


@pytest.mark.parametrize("token", ["x", "\0", "²", "9" * 6000, "-1", "1/2", "²/a/b", "9/a/b", "%ff", "1" * 5000 + "/a/b"])
def test_tokens_of_no_page(api: PolicyApi, token: str) -> None:
    page = types_pb2.PageRequest(token=token)
    for asked in (
        api.ListPolicies(pb.ListPoliciesRequest(page=page), CONTEXT),
        api.ListEndpointPolicies(pb.ListEndpointPoliciesRequest(page=page), CONTEXT),
    ):
        with pytest.raises(InvalidArgument) as refused:
            asyncio.run(asked)
        assert refused.value.field == "page.token"


def trace(**fields: Any) -> pb.TraceRequest:
    request = pb.TraceRequest(**{"to": pb.Party(address="192.0.2.1"), "port": 80, **fields})
    getattr(request, "from").CopyFrom(pb.Party(address="192.0.2.2"))
    return request


@pytest.mark.parametrize(
    ("request_", "field"),
    [
        (trace(port=70000), "port"),
        (trace(protocol=300), "protocol"),
        (trace(protocol=1, port=256), "port"),
        (trace(to=pb.Party(address="fe80::1%lo")), "to.address"),
        (pb.WhyRequest(source="192.0.2.1", destination="192.0.2.2", destination_port=70000), "destination_port"),
        (pb.WhyRequest(source="192.0.2.1", destination="192.0.2.2", source_port=70000), "source_port"),
        (pb.WhyRequest(source="192.0.2.1", destination="192.0.2.2", protocol=1, destination_port=256), "destination_port"),
        (pb.WhyRequest(source="192.0.2.1", destination="192.0.2.2", protocol=1 << 31), "protocol"),
        (pb.WhyRequest(source="192.0.2.1", destination="fd00::1"), "destination"),
    ],
)
def test_questions_that_make_no_sense(api: PolicyApi, request_: Any, field: str) -> None:
    ask = api.Trace if isinstance(request_, pb.TraceRequest) else api.Why
    with pytest.raises(InvalidArgument) as refused:
        asyncio.run(ask(request_, CONTEXT))
    assert refused.value.field == field


def test_ipv4_in_disguise_is_ipv4(api: PolicyApi) -> None:
    with pytest.raises(InvalidArgument) as refused:
        asyncio.run(api.Why(pb.WhyRequest(source="::ffff:192.0.2.1", destination="fd00::1"), CONTEXT))
    assert refused.value.field == "destination"


def test_what_cannot_be_recorded_is_refused_before_anything_is(api: PolicyApi, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where only a later document is too large, and where nothing is to be recorded."""
    monkeypatch.setattr(store, "BYTES_MAX", 2000)
    peers = ", ".join(f"{{ipBlock: {{cidr: 10.{at >> 8}.{at & 255}.0/24}}}}" for at in range(300))
    text = POLICY % ("small", "") + "---\n" + POLICY % ("large", f", ingress: [{{from: [{peers}]}}]")
    for dry_run in (False, True):
        request = pb.ApplyDocumentsRequest(text=text, dry_run=dry_run)
        with pytest.raises(ResourceExhausted, match="NetworkPolicy default/large takes"):
            asyncio.run(api.ApplyDocuments(request, CONTEXT))


async def test_in_force_is_nothing_that_nobody_asks(api: PolicyApi) -> None:
    enforcer, writer = api._enforcer, as_writer(FakeWriter())
    enforcer.use(writer)
    enforcer.set_ready()
    await enforcer.flush(writer)

    async def broken() -> None:
        raise FailedPrecondition("no programs")

    api._asked = broken
    with pytest.raises(FailedPrecondition, match="no programs"):
        await api.WaitEnforced(pb.WaitEnforcedRequest(), CONTEXT)
