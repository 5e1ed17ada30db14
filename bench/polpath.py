"""Nanoseconds a packet of policy, by BPF_PROG_TEST_RUN, next to the yardstick of bench/calibration.c.

pod_to_pod_policy is a packet of an established connection between two pods of the node, from the sender's veth to the redirect
into the receiver, both of whose policies select both of them; policy_ingress is slot POLICY_INGRESS alone, up to the
redirect. "_32768" takes as many connections in turn, "_16000" has as many ranges of ports in the policies instead of ten.
Connections are put into the table as established: a test run has no answers. What restores the packet between repetitions is
measured too and taken off.
"""

from __future__ import annotations

import asyncio
import contextlib
import sys
from collections.abc import Callable
from functools import partial
from ipaddress import ip_address

from bench import calibration
from bench.common import Bench, cpus, interleave, log, median, pinned, quick
from bench.datapath import A4, A6, B4, B6, HOST_MAC, LOOPBACK, MTU, tcp_ack, temporary_instance
from services.common.instance import Instance
from services.common.kernel import loader, progs
from services.common.kernel.beats import beat, beat_shift
from services.common.pipeline import abi as pipeline
from services.common.pipeline import install as ipam
from services.common.pipeline.endpoints import AddrTable, IfaceTable
from services.identity.numbers import make
from services.policy import abi, install
from services.policy.contents import Endpoint
from services.policy.enforcer import Enforcer
from services.policy.kernel.connections import key_of
from services.policy.kernel.tables import Tables
from services.policy.kernel.writer import Writer
from services.policy.model import (
    TCP,
    Action,
    Direction,
    EndpointPeer,
    Kind,
    Policy,
    PolicyKey,
    Port,
    Rule,
    Selector,
)
from services.policy.resolve.numbers import RuleNumbers
from services.policy.resolve.world import World

FLOWS = 32_768
ENTRIES = (10, 16_000)
IDENTITY = {"a": make(1, 1), "b": make(1, 2)}
FIRST_PORT, SPORT, DPORT = 1024, 40_000, 80


def pods(instance: Instance) -> None:
    """Two that talk, behind the loopback device."""
    found = {
        name: pipeline.Endpoint.of(
            id=number, ifindex=LOOPBACK, mac=f"02:00:00:00:00:{number:02x}", host_mac=HOST_MAC, mtu=MTU, ipv4=v4, ipv6=v6,
            identity=IDENTITY[name],
        )
        for number, (name, v4, v6) in enumerate((("a", A4, A6), ("b", B4, B6)), 1)
    }  # fmt: skip
    with contextlib.closing(IfaceTable(instance)) as ifaces, contextlib.closing(AddrTable(instance)) as addrs:
        ifaces.update(LOOPBACK, found["a"])
        for name, address in (("a", A4), ("a", A6), ("b", B4), ("b", B6)):
            addrs.update(pipeline.FibAddr.of(address), found[name])


def policy(entries: int) -> Policy:
    """Selects both pods in both directions; each rule has some of the ports, of which every second is allowed."""
    ports = [Port(TCP, DPORT, DPORT), *(Port(TCP, port, port) for port in range(101, 101 + 2 * entries, 2))][:entries]
    parts = [tuple(ports[at : at + 4000]) for at in range(0, len(ports), 4000)]
    rules = tuple(
        Rule(Selector(), direction, Action.ALLOW, (EndpointPeer(Selector()),), part, default_deny=True)
        for direction in Direction
        for part in parts
    )
    return Policy(PolicyKey(Kind.FIBRIL, "", "bench"), rules)


class Rig:
    """The tables, and what writes them."""

    def __init__(self, instance: Instance) -> None:
        self.tables = Tables(instance, 4 * FLOWS)
        self._writer = Writer(self.tables)
        self._enforcer = Enforcer(World(), RuleNumbers(), {})
        for number, name in enumerate("ab", 1):
            self._enforcer.add_identity(IDENTITY[name], {"pod": name})
            self._enforcer.set_endpoint(Endpoint(number, LOOPBACK, {"pod": name}, IDENTITY[name]))
        self._enforcer.use(self._writer)
        self._enforcer.set_ready()
        config = self.tables.config
        config.beat_shift, config.flags = beat_shift(), int(abi.ConfigFlag.FLOWS)
        config.syn_s = config.close_s = config.tcp_s = config.any_s = 86_400

    def enforce(self, entries: int) -> None:
        """Have policies with so many ranges, and all connections established under them."""
        wanted = policy(entries)
        self._enforcer.set_policy(wanted.key, wanted)
        asyncio.run(self._enforcer.flush(self._writer))
        now = beat(self.tables.config.beat_shift) & 0xFFFFFFFF
        keys, values = [], []
        for a, b in ((A4, B4), (A6, B6)):
            for sport in (SPORT, *range(FIRST_PORT, FIRST_PORT + FLOWS)):
                low, key = key_of(ip_address(a), ip_address(b), TCP, sport, DPORT)
                flags = abi.CtFlag.ANSWERED | abi.CtFlag.ALLOWED_INGRESS | abi.CtFlag.ALLOWED_EGRESS
                entry = abi.CtEntry(
                    client=IDENTITY["a"], server=IDENTITY["b"], seen=now,
                    flags=int(flags | (abi.CtFlag.CLIENT_LOW if low else abi.CtFlag(0))),
                )  # fmt: skip
                entry.revision[0], entry.revision[1] = self.tables.ep(2).revision, self.tables.ep(1).revision
                keys.append(bytes(key))
                values.append(bytes(entry))
        self.tables.flows.update_packed(b"".join(keys), b"".join(values))


def run(bench: Bench, instance: Instance) -> None:
    """Measure and print. RuntimeError if a program does not do what it is measured for."""
    pins, rig = instance.pin_dir, Rig(instance)
    repeat, rounds = quick(200_000, 1_000_000), quick(7, 21)
    slots = pins / pipeline.MAPS[pipeline.SLOTS_MAP]
    with contextlib.ExitStack() as opened:
        opened.callback(rig.tables.close)
        entry = opened.enter_context(progs.opened(pins / "prog" / ipam.SERVICE / ipam.FROM_POD))
        own = {slot: opened.enter_context(progs.opened(pins / "prog" / install.SERVICE / name))
               for slot, name in install.SLOTS.items()}  # fmt: skip
        ends = {name: opened.enter_context(progs.opened(pins / "prog" / calibration.SERVICE / name))
                for name in calibration.PROGRAMS}  # fmt: skip

        def measure(packet: bytes, fd: int, filled: dict[pipeline.Slot, int], spread: bool, expected: int) -> float:
            for slot in install.SLOTS:
                if slot in filled:
                    progs.set_slot(slots, int(slot), filled[slot])
                else:
                    progs.clear_slot(slots, int(slot))
            progs.set_slot(pins / calibration.NEXT, 0, ends[calibration.PORTS] if spread else fd)
            progs.set_slot(pins / calibration.NEXT, 1, fd)
            if spread:
                progs.test_run(ends[calibration.RESET], packet, FLOWS)
            result = progs.test_run(ends[calibration.RESET], packet, repeat)
            if result.retval != expected:
                raise RuntimeError(f"gave {result.retval}, not {expected}: this measures something else")
            return float(result.ns)

        _egress, ingress = pipeline.Slot.POLICY_EGRESS, pipeline.Slot.POLICY_INGRESS
        nothing, ok, redirect = ends[calibration.NOTHING], 0, 7
        kinds: dict[str, tuple[int, dict[pipeline.Slot, int], int]] = {
            "restored": (nothing, {}, ok),
            "cut": (entry, {ingress: nothing}, ok),
            "ingress": (entry, {ingress: own[ingress]}, redirect),
            "both": (entry, own, redirect),
        }
        costs: dict[tuple[int, str], float] = {}
        with pinned(cpus()[-1]):
            for entries in ENTRIES:
                rig.enforce(entries)
                subjects: dict[str, Callable[[], float]] = {
                    "yardstick": lambda: float(progs.test_run(ends[calibration.YARDSTICK], calibration.packet(), repeat).ns),
                    "nothing": lambda: float(progs.test_run(nothing, calibration.packet(), repeat).ns),
                }
                for family, a, b in ((4, A4, B4), (6, A6, B6)):
                    for kind, (fd, filled, expected) in kinds.items():
                        for spread in (False, True):
                            name = f"v{family} {kind}{' many' if spread else ''}"
                            subjects[name] = partial(measure, tcp_ack(a, b), fd, filled, spread, expected)
                for name, values in interleave(subjects, rounds).items():
                    costs[entries, name] = median(values)
    for (entries, name), value in costs.items():
        log(f"{entries:6} {name:18} {value:6.1f} ns  {value / costs[entries, 'yardstick']:5.2f} Y")
    for entries in ENTRIES:
        ns = {name: value for (count, name), value in costs.items() if count == entries}
        emit = partial(bench.emit, unit="ns/packet", baseline="yardstick", baseline_value=ns["yardstick"])
        for family, suffix in ((4, ""), (6, "_v6")):
            for many, label in (("", ""), (" many", f"_{FLOWS}")):
                tail = f"{label}{'' if entries == ENTRIES[0] else f'_{entries}'}{suffix}"
                around = ns[f"v{family} restored{many}"] - ns["nothing"]
                emit(f"pod_to_pod_policy{tail}", value=ns[f"v{family} both{many}"] - around)
                emit(f"policy_ingress{tail}", value=ns[f"v{family} ingress{many}"] - ns[f"v{family} cut{many}"] + ns["nothing"])


def main() -> int:
    with Bench("datapath") as bench, temporary_instance() as instance:
        asyncio.run(install.install_tables(instance))
        asyncio.run(loader.load([ipam.spec(), install.programs(), calibration.spec()], instance.pin_dir))
        pods(instance)
        run(bench, instance)
    return 0


if __name__ == "__main__":
    sys.exit(main())
