"""The table of connections under growth, floods and old age."""

from __future__ import annotations

from ipaddress import ip_address

import pytest
from scapy.layers.inet import TCP
from scapy.layers.l2 import Ether

from services.lb import abi
from tests.datapath.xdpkit import TX, VIP, XdpRig, backend_address, frame, ip


@pytest.fixture
def rig(xdp_rig: XdpRig) -> XdpRig:
    return xdp_rig


def serve(rig: XdpRig) -> int:
    """Five backends, chosen at random: what is not remembered shows."""
    index, ids = rig.tables.service([(VIP[4], 80)], [(backend_address(4, n), 8080) for n in range(5)],
                                    flags=abi.ServiceFlag.DSR)
    for number, ident in enumerate(ids):
        rig.direct(ident, number)
    return index


def backend(rig: XdpRig, sport: int, flags: str, source: str = "192.0.2.1", port: int = 80) -> str:
    action, data = rig.run(frame(ip(4, src=source) / TCP(sport=sport, dport=port, flags=flags)))
    assert action == TX
    return str(Ether(data)[1].dst)


def test_growth_loses_no_flow(rig: XdpRig) -> None:
    with rig.fresh(flows=256) as tables:
        serve(rig)
        before = {sport: backend(rig, sport, "A") for sport in range(1, 120)}
        tables.grow_flows(1024)
        assert tables.flows() == []
        assert {sport: backend(rig, sport, "A") for sport in before} == before
        # They have moved.
        assert len(tables.flows()) == len(before)
        tables.write_config(before_mask=0)
        assert {sport: backend(rig, sport, "A") for sport in before} == before


def test_a_flood_of_syns_displaces_only_itself(rig: XdpRig) -> None:
    with rig.fresh(flows=16) as tables:
        serve(rig)
        for sport in range(1, 31):
            backend(rig, sport, "A")
        # A line that four confirmed ones fill has no place but theirs.
        kept = {flow.sig for flow in tables.flows() if crowd(tables.flows(), flow.sig) < 4}
        before = tables.stats()[abi.Stat.EVICTED]
        for sport in range(1000, 1400):
            backend(rig, sport, "S", source="192.0.2.99")
        assert tables.stats()[abi.Stat.EVICTED] > before
        assert len(kept) > 10 and {flow.sig for flow in tables.flows()} >= kept


def crowd(flows: list[abi.Flow], sig: int) -> int:
    """How many confirmed flows share the line of a flow."""
    return sum(flow.sig & 15 == sig & 15 and bool(flow.stamp & abi.FlowFlag.CONFIRMED) for flow in flows)


def test_halves_of_two_flows_are_none(rig: XdpRig) -> None:
    """As two CPUs leave them that write to the same place at once: nobody gets another service's backend."""
    with rig.fresh(flows=1) as tables:
        serve(rig)
        _, (other,) = tables.service([(VIP[4], 81)], [(backend_address(4, 9), 8080)], flags=abi.ServiceFlag.DSR)
        rig.direct(other, 9)
        assert backend(rig, 1, "A") != backend_address(4, 9)
        assert backend(rig, 2, "A", port=81) == backend_address(4, 9)
        mine = abi.flow_hash(tables.config.seed, ip_address("192.0.2.1"), 1, ip_address(VIP[4]), 80, 6)
        line = [abi.Flow.from_buffer(tables.memory(abi.Table.FLOWS), at * 16) for at in range(4)]
        (first,), (second,) = ([f for f in line if f.sig == mine], [f for f in line if f.sig not in (0, mine)])
        first.sig, second.sig = 0, mine
        assert backend(rig, 1, "A") != backend_address(4, 9)


def test_what_is_over_goes_before_what_lives(rig: XdpRig) -> None:
    with rig.fresh(flows=1) as tables:
        serve(rig)
        for sport in (1, 2, 3):
            backend(rig, sport, "A")
        backend(rig, 4, "A")
        backend(rig, 4, "FA")
        tables.age_flows(units=4)  # 16 s: over for what closes, not for the others
        backend(rig, 5, "S")
        flows = tables.flows()
        assert len(flows) == 4 and not any(flow.stamp & abi.FlowFlag.CLOSING for flow in flows)


def test_a_flow_that_is_over_is_a_new_one(rig: XdpRig) -> None:
    with rig.fresh() as tables:
        index = serve(rig)
        line = tables.line(abi.Table.SERVICES, index, abi.Service)
        backend(rig, 1, "A")
        tables.age_flows(units=2)
        backend(rig, 1, "A")
        assert line.connections == 1
        tables.age_flows(units=21600 // 4 + 2)
        backend(rig, 1, "A")
        assert line.connections == 2 and len(tables.flows()) == 1


def test_a_service_takes_a_vip_over_for_new_connections(rig: XdpRig) -> None:
    with rig.fresh() as tables:
        serve(rig)
        old = backend(rig, 1, "A")
        tables.service([(VIP[4], 80)], [(backend_address(4, 9), 8080)], flags=abi.ServiceFlag.DSR)
        assert backend(rig, 1, "A") == old
        assert backend(rig, 1, "S") == backend_address(4, 9)
        assert backend(rig, 2, "A") == backend_address(4, 9)


def test_a_frontend_that_changes_is_not_remembered(rig: XdpRig) -> None:
    with rig.fresh() as tables:
        index, ids = tables.service([(VIP[4], 80)], [(backend_address(4, n), 8080) for n in range(2)],
                                    flags=abi.ServiceFlag.DSR)
        for number, ident in enumerate(ids):
            rig.direct(ident, number)
        backend(rig, 1, "S")
        with tables.fronts() as fronts:
            fronts.delete(abi.FrontKey.of(ip_address(VIP[4]), 80, 6))
        tables.fronts_changed()
        rig.passes(ip(4) / TCP(sport=2, dport=80, flags="S"))
        assert tables.line(abi.Table.SERVICES, index, abi.Service).connections == 1
