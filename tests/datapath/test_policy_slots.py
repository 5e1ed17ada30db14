"""Policy slots: what they ask, what they remember, what they tell."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from scapy.layers.inet import ICMP, TCP, UDP

from services.common.instance import Instance
from services.common.pipeline.reasons import Reason
from services.policy import abi
from tests.datapath import policykit as kit
from tests.datapath.harness import Datapath
from tests.datapath.packets import delivered
from tests.datapath.policykit import ALL, ALLOW, NONE, RULE, WORLD, Rig, Space, only, refuse

BOTH = pytest.mark.parametrize("family", [4, 6])
EITHER = pytest.mark.parametrize("side", ["egress", "ingress"])


@pytest.fixture(scope="module")
def space(instance: Instance) -> Iterator[Space]:
    with kit.installed(instance):
        made = Space()
        yield made
        made.close()


@pytest.fixture
def rig(space: Space, dp: Datapath) -> Iterator[Rig]:
    made = Rig(dp, space)
    yield made
    made.close()


# ---- what policies say --------------------------------------------------------------------------------------
@BOTH
def test_an_endpoint_without_policy_is_denied_everything(rig: Rig, family: int) -> None:
    syn = TCP(sport=4000, dport=80)
    assert rig.packet(rig.a, rig.b, syn, family).reason is Reason.POLICY_UNKNOWN
    rig.open_all(rig.a)
    assert rig.packet(rig.a, rig.b, syn, family).reason is Reason.POLICY_UNKNOWN
    rig.open_all(rig.b)
    assert rig.packet(rig.a, rig.b, syn, family).passed
    assert rig.packet(rig.c, WORLD[family], syn, family, back=True).reason is Reason.POLICY_UNKNOWN


@BOTH
def test_what_is_allowed_is_delivered_as_it_came(rig: Rig, family: int) -> None:
    rig.open_all()
    packet = kit.header(kit.own(rig.a, family), kit.own(rig.b, family)) / TCP(sport=4000, dport=80) / b"data"
    from scapy.layers.l2 import Ether
    frame = Ether(src="02:00:00:00:01:14", dst="02:00:00:00:00:01") / packet
    assert rig.send(rig.a, packet).data == delivered(frame, rig.b)
