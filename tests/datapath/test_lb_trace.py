"""What is explained is what the programs do."""

from __future__ import annotations

import random
import socket
from ipaddress import ip_address, ip_network

import pytest

from fibril.lb.v1 import lb_pb2 as pb
from services.common.errors import InvalidArgument
from services.common.instance import Instance
from services.common.kernel import progs
from services.common.pipeline.abi import FibAddr, IPAddress
from services.lb import abi
from services.lb.model import TCP, UDP, Algorithm, FrontendType, NoBackend, Spec
from services.lb.trace import Tracer
from tests.datapath.planekit import HERE, Declared, backend, begin, front, web

NO_FRONT, REFUSED = 0xFFFFFFFF, 0xFFFFFFFE


def ask(
    prog: int, client: IPAddress, cport: int, vip: IPAddress, port: int, proto: int, outside: bool
) -> int:
    raw = bytes(16) + bytes(FibAddr.of(client)) + bytes(FibAddr.of(vip))
    raw += cport.to_bytes(2, "big") + port.to_bytes(2, "big") + bytes((proto, outside)) + bytes(8)
    return progs.test_run(prog, raw).retval


async def test_trace_and_program_agree(lb_maps: Instance) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    rand = random.Random(seed)
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(lb_maps, declared)
    fronts = [
        front("10.96.0.1:80", FrontendType.EXTERNAL_IP), front("[fd00:96::1]:80", FrontendType.LOAD_BALANCER),
        front("10.96.0.2:5000", FrontendType.EXTERNAL_IP, UDP, last=5999), front("0.0.0.0:30080", FrontendType.NODE_PORT),
    ]  # fmt: skip
    members = [backend(f"10.0.0.{i}", weight=rand.choice((1, 3))) for i in range(1, 20)]
    members += [backend(f"fd00::{i}") for i in range(1, 8)]
    declared.put(web(*fronts, algorithm=Algorithm.MAGLEV, maglev_size=509), *members)
    declared.put(
        Spec("few", (front("10.96.0.3:80", FrontendType.EXTERNAL_IP),), Algorithm.MAGLEV,
             sources=(ip_network("198.51.100.0/24"),)), backend("10.0.1.1"), backend("10.0.1.2"))  # fmt: skip
    declared.put(Spec("sticky", (front("10.96.0.4:80"),), Algorithm.MAGLEV, affinity_s=60), *members[:5])
    declared.put(Spec("none", (front("10.96.0.5:80"),)))
    declared.put(Spec("silent", (front("10.96.0.6:80"),), no_backend=NoBackend.DROP))
    await plane.settled()
    tracer = Tracer(lb_maps, plane, lambda: HERE.addresses, lambda: False)
    places = [("10.96.0.1", 80, TCP), ("fd00:96::1", 80, TCP), ("10.96.0.2", 5123, UDP), ("192.168.0.1", 30080, TCP),
              ("10.96.0.3", 80, TCP), ("10.96.0.4", 80, TCP), ("10.96.0.5", 80, TCP), ("10.96.0.6", 80, TCP),
              ("10.96.0.1", 81, TCP), ("10.96.0.2", 6000, UDP), ("192.0.2.200", 30080, TCP)]  # fmt: skip
    seen = set()
    with progs.opened(lb_maps.pin_dir / "prog/lbmaps/lb_maps") as prog:
        for _ in range(1500):
            address, port, proto = rand.choice(places)
            vip = ip_address(address)
            if vip.version == 4:
                client: IPAddress = ip_address(
                    f"{rand.choice(('198.51.100', '203.0.113'))}.{rand.randrange(1, 255)}"
                )
            else:
                client = ip_address(f"2001:db8::{rand.randrange(1, 9999):x}")
            cport = rand.randrange(1, 65536)
            answer = tracer.trace(
                pb.TraceServiceRequest(
                    client=str(client), client_port=cport, address=address, port=port,
                    protocol=pb.PROTOCOL_TCP if proto == TCP else pb.PROTOCOL_UDP,
                )
            )  # fmt: skip
            got = ask(prog, client, cport, vip, port, proto, not answer.client_inside)
            seen.add(answer.translation)
            assert answer.steps
            if not answer.service:
                assert got == NO_FRONT
            elif answer.translation == "drop" and answer.service == "few":
                assert got == REFUSED
            elif answer.translation in ("drop", "reject"):
                assert got == 0
            else:
                assert plane.tables is not None
                line = plane.tables.backends.at(got & abi.BACKEND_INDEX, abi.Backend)
                assert (str(line.addr.ip()), socket.ntohs(line.port)) == (
                    answer.backend.address,
                    answer.backend.port,
                )
    assert seen == {"none", "drop", "reject", "snat"}
    await plane.stop()


async def test_what_chance_decides_is_said(lb_maps: Instance) -> None:
    declared = Declared()
    declared.synced.set()
    plane, _ = await begin(lb_maps, declared)
    declared.put(web(front("10.97.0.1:80"), name="r"), backend("10.0.0.1"), backend("192.168.0.1"))
    await plane.settled()
    tracer = Tracer(lb_maps, plane, lambda: HERE.addresses, lambda: True)
    answer = tracer.trace(pb.TraceServiceRequest(client="192.168.0.1", address="10.97.0.1", port=80))
    assert (answer.service, answer.translation, answer.client_inside) == ("r", "socket", True)
    assert {each.address for each in answer.candidates} == {"10.0.0.1", "192.168.0.1"}
    for wrong in (
        pb.TraceServiceRequest(client="x", address="10.97.0.1", port=80),
        pb.TraceServiceRequest(client="10.0.0.1", address="10.97.0.1"),
    ):
        with pytest.raises(InvalidArgument):
            tracer.trace(wrong)
    await plane.stop()
