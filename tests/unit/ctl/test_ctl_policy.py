"""What `fibril policy` makes of rules for people."""

from __future__ import annotations

from typing import Any

import pytest
from click.testing import CliRunner
from google.protobuf import text_format

from fibril.policy.v1 import policy_pb2 as pb
from services.ctl.commands import endpoint, policy
from services.ctl.commands.policy import PAIRS
from services.ctl.context import Ctl
from services.ctl.main import cli
from services.ctl.policyrules import RULES
from services.ctl.render import to_record


@pytest.mark.parametrize(
    ("text", "row"),
    [
        (
            """name: "web" direction: TRAFFIC_DIRECTION_INGRESS action: RULE_ACTION_ALLOW tier: TIER_NORMAL default_deny: true
            subject { match_labels { key: "app" value: "db" } match_labels { key: "prod" value: "" } }
            peers { endpoints { match_expressions { key: "a" operator: LABEL_OPERATOR_NOT_IN values: ["x", "y"] }
                                match_expressions { key: "b" operator: LABEL_OPERATOR_DOES_NOT_EXIST }
                                match_expressions { key: "c" operator: LABEL_OPERATOR_EXISTS } } }
            peers { entity: ENTITY_REMOTE_NODE } peers { cidr { cidr: "10.0.0.0/8" except: "10.1.0.0/16" } }
            ports { protocol: PORT_PROTOCOL_TCP first: 80 last: 90 } ports { name: "http" }
            ports { protocol: PORT_PROTOCOL_ICMP icmp_type: 0 } ports { protocol: PORT_PROTOCOL_UDP }""",
            ["web", "ingress", "allow", "normal", "app=db,prod",
             "a notin (x,y),!b,c; remote-node; 10.0.0.0/8 except 10.1.0.0/16",
             "tcp/80-90, any/http, icmp/0, udp", "default-deny"],
        ),
        (
            """name: "n" direction: TRAFFIC_DIRECTION_EGRESS action: RULE_ACTION_PASS tier: TIER_ADMIN priority: 7
            subject_is_node: true reject: true keep_established: true
            peers { service { name: "shop/db" } } peers { node { } }""",
            ["n", "egress", "pass", "admin 7", "node *", "service shop/db; node *", "all", "reject,keep-established"],
        ),
        (
            "direction: TRAFFIC_DIRECTION_EGRESS action: RULE_ACTION_ALLOW tier: TIER_NORMAL match_no_peer: true",
            ["-", "egress", "allow", "normal", "*", "nobody", "all", "-"],
        ),
        (
            "direction: TRAFFIC_DIRECTION_EGRESS action: RULE_ACTION_DENY tier: TIER_NORMAL",
            ["-", "egress", "deny", "normal", "*", "everybody", "all", "-"],
        ),
    ],
)  # fmt: skip
def test_a_rule_on_one_line(text: str, row: list[str]) -> None:
    record = to_record(text_format.Parse(text, pb.Rule()))
    assert [column.text(record) for column in RULES] == row


@pytest.mark.parametrize(
    ("ports", "shown"),
    [
        ([pb.DiffPort()], "-all"),
        ([pb.DiffPort(allowed_after=True)], "+all"),
        ([pb.DiffPort(), pb.DiffPort(protocol=6, first=80, last=80, allowed_after=True), pb.DiffPort()], "-other, +tcp/80"),
        ([pb.DiffPort(protocol=17, last=65535)], "-udp"),
    ],
)
def test_ports_that_change(ports: list[pb.DiffPort], shown: str) -> None:
    record = to_record(pb.DiffPair(ports=ports))
    assert PAIRS[-1].text(record) == shown


@pytest.mark.parametrize(("what", "number"), [("7", 7), ("host", 0), ("p9", 9)])
def test_an_endpoint_by_number_or_name(what: str, number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def ask(_: Ctl, method: str, request: Any) -> Any:
        asked.append((method, request))
        return pb.SetEndpointModeResponse()

    monkeypatch.setattr(policy, "_ask", ask)
    monkeypatch.setattr(endpoint, "find", lambda _, name: {"id": int(name.removeprefix("p"))})
    assert CliRunner().invoke(cli, ["policy", "set", what, "--audit"]).exit_code == 0
    assert asked == [("SetEndpointMode", pb.SetEndpointModeRequest(endpoint=number, audit=True))]
    assert CliRunner().invoke(cli, ["policy", "set", "65536", "--audit"]).exit_code == 2 and len(asked) == 1
