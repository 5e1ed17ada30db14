"""Run the installed programs on made-up packets (BPF_PROG_TEST_RUN) and learn what they decided.

Test runs happen on the loopback device, so pod A, whose packets are under test, is "behind" interface index 1. What was
decided is read from the event the programs report, so every test also covers the event's contents.
"""

from __future__ import annotations

import contextlib
import ctypes as ct
import struct
from dataclasses import dataclass
from pathlib import Path

from services.common.instance import Instance
from services.common.kernel import progs
from services.common.kernel.maps import BpfMap
from services.common.kernel.ringbuf import RingBuffer
from services.common.pipeline import abi, install
from services.common.pipeline.endpoints import AddrTable, IfaceTable
from services.common.pipeline.reasons import Reason

LOOPBACK = 1
OK, SHOT, REDIRECT, UNSPEC = 0, 2, 7, 0xFFFFFFFF
ACTION = {abi.Verdict.DROPPED: {SHOT, REDIRECT},  # the sender may be told
          abi.Verdict.DELIVERED: {REDIRECT, UNSPEC}, abi.Verdict.TO_STACK: {UNSPEC, REDIRECT},
          abi.Verdict.TO_OVERLAY: {REDIRECT}, abi.Verdict.TO_NODE: {REDIRECT}}
HOST_MAC = "02:00:00:00:00:01"


def make_pod(number: int, ifindex: int, *, mtu: int = 1500, flags: int = 0, v4: bool = True,
             v6: bool = True) -> abi.Endpoint:
    """Pod number n has 10.1.0.n and fd00:1::n, MAC 02:00:00:00:01:n and identity 1000 + n."""
    return abi.Endpoint.of(
        id=number, ifindex=ifindex, mac=f"02:00:00:00:01:{number:02x}", host_mac=HOST_MAC, mtu=mtu, flags=flags,
        ipv4=f"10.1.0.{number}" if v4 else "", ipv6=f"fd00:1::{number:x}" if v6 else "", identity=1000 + number)


A = make_pod(10, LOOPBACK)
B = make_pod(11, 1011)
SMALL = make_pod(12, 1012, mtu=1300)
SHAPED = make_pod(13, 1013, flags=abi.EndpointFlag.SHAPED_IN)
PODS = (A, B, SMALL, SHAPED)


@dataclass(frozen=True)
class Result:
    """What became of a packet."""

    action: int
    verdict: abi.Verdict
    reason: Reason
    data: bytes
    event: abi.Event


class Datapath:
    """An instance's programs and maps."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self._exit = contextlib.ExitStack()
        self.programs = {name: self._exit.enter_context(progs.opened(install.program_path(instance, name)))
                         for name in install.PROGRAMS}
        self.ifaces = self._exit.enter_context(contextlib.closing(IfaceTable(instance)))
        self.addrs = self._exit.enter_context(contextlib.closing(AddrTable(instance)))
        self.near = self._exit.enter_context(
            BpfMap.open(self.path("ep_near"), ct.c_uint32, abi.Endpoint))
        self.config = self._exit.enter_context(
            BpfMap.open(self.path("pl_config"), ct.c_uint32, abi.NodeConfig))
        self.ring = self._exit.enter_context(RingBuffer.open(self.path("pl_events")))

    def close(self) -> None:
        self._exit.close()

    def path(self, name: str) -> Path:
        return install.map_path(self.instance, name)

    def put(self, pod: abi.Endpoint) -> None:
        self.ifaces.update(pod.ifindex, pod)
        for address in (pod.ipv4, pod.ipv6):
            if address is not None:
                self.addrs.update(abi.FibAddr.of(address), pod)

    def remove(self, pod: abi.Endpoint) -> None:
        self.ifaces.delete(pod.ifindex)
        for address in (pod.ipv4, pod.ipv6):
            if address is not None:
                self.addrs.delete(abi.FibAddr.of(address))

    def forget_near(self) -> None:
        """Empty ep_near and call it crowded, so that every lookup takes the hash."""
        for key, value in list(self.near.items()):
            if value.id:
                self.near.update(key, abi.Endpoint(flags=abi.EP_CROWDED))

    def watch(self, drops: int, forward: int) -> None:
        self.config.update(0, abi.NodeConfig(watch_drops=drops, watch_forward=forward))

    def run(self, packet: bytes, program: str = install.FROM_POD, *, gso_size: int = 0) -> Result:
        """Run one packet through a program. The kernel refuses frames that end within a fixed IP header."""
        ctx = struct.pack("=164xI8xI12x", 2 if gso_size else 0, gso_size)
        done = progs.test_run(self.programs[program], packet, ctx=ctx, out_size=65536)
        # A namespace of an earlier live test may still be on its way out, and say goodbye through these programs.
        events = [e for e in map(abi.Event.from_buffer_copy, self.ring.poll()) if e.ifindex == LOOPBACK]
        assert len(events) == 1, f"{len(events)} events for one packet"
        event = events[0]
        verdict = abi.Verdict(event.verdict)
        assert done.retval in ACTION[verdict], (done.retval, verdict)
        return Result(done.retval, verdict, Reason(event.reason), done.data, event)
