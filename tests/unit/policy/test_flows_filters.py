"""Filters of flows against a plain reading of the contract, on messages instead of the kernel's records."""

from __future__ import annotations

import ipaddress
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fibril.flow.v1 import flow_pb2 as pb
from services.common.errors import InvalidArgument
from services.policy.flows.filters import FILTERS_MAX, selected
from services.policy.flows.store import named, parse
from tests.unit.policy.flowrig import Names, part, raw

NAMES = Names()
ADDRESSES = ("10.0.0.1", "10.0.1.1", "192.168.0.1", "0.0.0.1", "fd00::1", "fd00::1:1", "::1")
PREFIXES = ("10.0.0.1", "10.0.0.0/8", "10.0.0.7/23", "0.0.0.0/0", "::/0", "::/64", "fd00::/112", "fd00::1")
PODS = ("shop/p1", "shop/*", "shop/p", "*", "other/*", "shop/p9")


def naive(flow: pb.Flow, wanted: pb.FlowFilter) -> bool:
    ends = {
        "": (flow.source, flow.destination),
        "source_": (flow.source,),
        "destination_": (flow.destination,),
    }

    def inside(end: pb.FlowEnd, prefix: str) -> bool:
        return ipaddress.ip_address(end.address) in ipaddress.ip_network(prefix, strict=False)

    def named(end: pb.FlowEnd, name: str) -> bool:
        if not end.endpoint:
            return False
        return end.pod.startswith(name[:-1]) if name.endswith("*") else end.pod == name

    for side, found in ends.items():
        prefix, pod = getattr(wanted, f"{side}address"), getattr(wanted, f"{side}pod")
        if prefix and not any(inside(end, prefix) for end in found):
            return False
        if pod and not any(named(end, pod) for end in found):
            return False
    both = ends[""]
    for field in ("endpoint", "identity", "port"):
        value = getattr(wanted, field)
        if value and all(getattr(end, field) != value for end in both):
            return False
    for field in ("verdict", "type", "direction", "protocol", "drop_reason"):
        if getattr(wanted, field) and getattr(flow, field) != getattr(wanted, field):
            return False
    if wanted.labels and not any(
        all(end.labels.get(k) == v for k, v in wanted.labels.items()) for end in both
    ):
        return False
    return wanted.policy in flow.policy or wanted.policy in flow.rule


@st.composite
def records(draw: st.DrawFn) -> bytes:
    few = st.integers(0, 3)
    return raw(
        draw(st.sampled_from(ADDRESSES)), draw(st.sampled_from(ADDRESSES)), draw(few), draw(few),
        src_id=draw(st.sampled_from((0, 1, 9))), dst_id=draw(st.sampled_from((0, 1, 2))), src_identity=draw(few),
        dst_identity=draw(few), rule=draw(st.sampled_from((0, 1, 16, 17))), reason=draw(few), type=draw(st.integers(1, 4)),
        verdict=draw(st.integers(1, 3)), direction=draw(st.integers(0, 1)), proto=draw(st.sampled_from((1, 6, 17))),
    )  # fmt: skip


@st.composite
def filters(draw: st.DrawFn) -> pb.FlowFilter:
    few = st.integers(1, 3)
    fields: dict[str, Any] = {
        **dict.fromkeys(("address", "source_address", "destination_address"), st.sampled_from(PREFIXES)),
        **dict.fromkeys(("pod", "source_pod", "destination_pod"), st.sampled_from(PODS)),
        **dict.fromkeys(("endpoint", "identity", "verdict", "type", "port", "drop_reason"), few),
        "direction": st.integers(1, 2),
        "protocol": st.sampled_from((1, 6, 17)),
        "labels": st.sampled_from(({"app": "1"}, {"app": "1", "id": "1"}, {"id": "2"}, {"x": ""})),
        "policy": st.sampled_from(("shop", "rule16", "none")),
    }
    chosen = draw(st.lists(st.sampled_from(sorted(fields)), max_size=3, unique=True))
    return pb.FlowFilter(**{name: draw(fields[name]) for name in chosen})


@given(st.lists(records(), max_size=12), st.lists(filters(), max_size=3), st.lists(filters(), max_size=2))
def test_what_is_selected_is_what_the_contract_says(
    raws: list[bytes], allow: list[pb.FlowFilter], deny: list[pb.FlowFilter]
) -> None:
    made = part(16)
    matches = selected(allow, deny)
    for number, each in enumerate(raws):
        record = parse(number, each, named(NAMES, each))
        flow = made.message(record)
        wanted = (not allow or any(naive(flow, one) for one in allow)) and not any(
            naive(flow, one) for one in deny
        )
        assert matches(record) == wanted


@pytest.mark.parametrize(
    ("wanted", "field"),
    [
        ({"address": "10.0.0.0/33"}, "address"),
        ({"source_address": "pod"}, "source_address"),
        ({"destination_address": "fe80::1%eth0"}, "destination_address"),
        ({"port": 65536}, "port"),
        ({"protocol": 256}, "protocol"),
    ],
)
def test_nonsense_is_refused_by_name(wanted: dict[str, Any], field: str) -> None:
    for allow, deny, side in (([wanted], [], "allow"), ([], [wanted], "deny")):
        with pytest.raises(InvalidArgument) as caught:
            selected([pb.FlowFilter(**each) for each in allow], [pb.FlowFilter(**each) for each in deny])
        assert caught.value.field == f"{side}[0].{field}"


def test_so_many_filters_and_no_more() -> None:
    assert selected([pb.FlowFilter()] * FILTERS_MAX, [])(parse(1, raw(), named(NAMES, raw())))
    with pytest.raises(InvalidArgument):
        selected([pb.FlowFilter()] * FILTERS_MAX, [pb.FlowFilter()])
