"""Policy for clients outside, who come to pods and to the host through services."""

from __future__ import annotations

from typing import Any

import pytest
from scapy.layers.inet import ICMP, TCP, UDP
from scapy.layers.inet6 import ICMPv6DestUnreach
from scapy.layers.l2 import Ether

from services.common.pipeline.reasons import Reason
from services.policy import abi
from tests.datapath import policykit as kit
from tests.datapath.harness import REDIRECT, SHOT, A
from tests.datapath.lbkit import CLIENT, PROTO, VIP, Uplink, answer, arriving, exact, outside, own
from tests.datapath.packets import ether
from tests.datapath.policykit import NONE, REJECT, Rig, only, refuse
from tests.datapath.test_lb_related import error

BOTH = pytest.mark.parametrize("family", [4, 6])
EACH = pytest.mark.parametrize("layer", [TCP, UDP])


@BOTH
@EACH
def test_a_client_outside_and_a_pod(rig: Rig, uplink: Uplink, family: int, layer: Any) -> None:
    """The pod may open nothing, and its answers pass; then it is revoked."""
    uplink.lab.serve(family, [(own(A, family), 8080)], layer)
    rig.policy(A, only((PROTO[layer], 8080, 8080)), NONE)
    there = uplink.sends(outside(family) / layer(sport=7, dport=80))
    for _ in range(2):
        result = uplink.from_pod(ether() / answer(bytes(there), layer))
        assert result.action == REDIRECT and exact(result.data) == result.data
        got: Any = Ether(result.data)
        assert (got[1].src, got[1].dst) == (VIP[family], CLIENT[family])
        uplink.sends(outside(family) / layer(sport=7, dport=80))
    entry, _ = rig.entry()
    assert (entry.client, entry.server) == (2, A.identity)
    rig.policy(A, NONE, NONE)
    assert uplink.drops(outside(family) / layer(sport=7, dport=80)) is Reason.POLICY_REVOKED
    result = uplink.from_pod(ether() / answer(bytes(there), layer))
    assert (result.action, result.reason) == (SHOT, Reason.POLICY_REVOKED)


@BOTH
@EACH
def test_a_client_outside_is_told_by_the_service(rig: Rig, uplink: Uplink, family: int, layer: Any) -> None:
    uplink.lab.serve(family, [(own(A, family), 8080)], layer)
    rig.policy(A, refuse(kit.DENY | REJECT), NONE)
    action, data = uplink.run(arriving(outside(family) / layer(sport=7, dport=80)))
    assert action == REDIRECT and exact(data) == data
    got: Any = Ether(data)
    assert (got[1].src, got[1].dst) == (VIP[family], CLIENT[family])
    if layer is TCP:
        assert (got[TCP].sport, got[TCP].dport, str(got[TCP].flags)) == (80, 7, "RA")
    else:
        said = got[ICMP] if family == 4 else got[ICMPv6DestUnreach]
        assert (said.type, said.code) == ((3, 13) if family == 4 else (1, 1))
        quoted = kit.header(CLIENT[family], VIP[family]).__class__(bytes(said)[8:])
        assert (quoted.dst, quoted[UDP].dport) == (VIP[family], 80)


@BOTH
@EACH
def test_errors_about_what_a_pod_answers(rig: Rig, uplink: Uplink, family: int, layer: Any) -> None:
    """Of a client outside about an answer: they quote the service, and get to the pod."""
    uplink.lab.serve(family, [(own(A, family), 8080)], layer)
    rig.policy(A, only((PROTO[layer], 8080, 8080)), NONE)
    there = uplink.sends(outside(family) / layer(sport=7, dport=80))
    said: Any = Ether(uplink.from_pod(ether() / answer(bytes(there), layer)).data)
    related = rig.stat(abi.Stat.RELATED)
    action, data = uplink.run(arriving(error(said[1], CLIENT[family], "mtu")))
    assert rig.stat(abi.Stat.RELATED) == related + 1, (action, data)
