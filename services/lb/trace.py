"""Explains a connection from what is in the kernel: the same decisions as the programs take, in words.

front.h finds the frontend, flow.h the connection that exists, choose.h the backend; the order here is theirs. Where programs
choose at random, all who may be chosen are named.
"""

from __future__ import annotations

import ctypes as ct
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from ipaddress import ip_address
from typing import Final

from fibril.lb.v1 import lb_pb2 as pb
from services.common import errors
from services.common.instance import Instance
from services.common.kernel.beats import beat
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi as pipeline
from services.common.pipeline.abi import FibAddr, IPAddress, addr_bytes
from services.lb import abi, convert, fields
from services.lb.kernel.tables import Tables
from services.lb.kernel.writer import Plane
from services.lb.model import BackendKey

WORLD: Final = 2
CANDIDATES_MAX: Final = 100
_FLOW: Final = struct.Struct("=QIHH")


@dataclass
class _Way:
    """A connection on its way through."""

    client: IPAddress
    cport: int
    address: IPAddress
    port: int
    proto: int
    steps: list[str] = field(default_factory=list)

    def say(self, text: str) -> None:
        self.steps.append(text)


class Tracer:
    """Used from one event loop. Reads, and changes nothing."""

    def __init__(
        self,
        instance: Instance,
        plane: Plane,
        local: Callable[[], frozenset[IPAddress]],
        sockets: Callable[[], bool],
    ) -> None:
        """local: addresses of this node and its pods. sockets: whether they are translated when they connect."""
        self._pins = instance.pin_dir
        self._plane, self._local, self._sockets = plane, local, sockets

    def trace(self, request: pb.TraceServiceRequest) -> pb.TraceServiceResponse:
        """InvalidArgument, Unavailable while the maps are not there."""
        way = _Way(
            fields.address(request.client, "client"),
            fields.number(request.client_port, 1, 65535, 0, "client_port"),
            fields.any_address(request.address, "address"),
            fields.port(request.port, "port"),
            convert.protocol(request.protocol, "protocol"),
        )
        tables = self._plane.tables
        if tables is None:
            raise errors.Unavailable("the kernel's tables are not there yet", fix="see: fibril status")
        answer = pb.TraceServiceResponse(translation="none")
        front = self._front(tables, way)
        if front is None:
            way.say(f"{way.address} port {way.port} is no frontend of this node: the packet goes on as it is")
        else:
            self._serve(tables, way, front, answer)
        answer.steps.extend(way.steps)
        return answer

    # ---- which frontend -------------------------------------------------------------------------------------
    def _front(self, tables: Tables, way: _Way) -> abi.Front | None:
        hint = tables.hints.mem[abi.hint_of(way.address)]
        if not hint & (abi.Hint.VIP | abi.Hint.NODE):
            return None
        front = self._exact(tables, way.address, way.port, way.proto)
        if front is not None:
            way.say(f"{way.address} port {way.port} is a frontend")
            return front
        if hint & abi.Hint.RANGE and (front := self._range(tables, way.address, way)) is not None:
            return front
        mark = self._exact(tables, way.address, 0, 0) if hint & abi.Hint.NODE else None
        if mark is None or not mark.flags & abi.FrontFlag.NODE:
            return None
        anywhere = ip_address("0.0.0.0" if way.address.version == 4 else "::")
        front = self._exact(tables, anywhere, way.port, way.proto)
        if front is not None:
            way.say(f"{way.address} is this node's, and port {way.port} a port of every node")
            return front
        return self._range(tables, anywhere, way)

    @staticmethod
    def _exact(tables: Tables, address: IPAddress, port: int, proto: int) -> abi.Front | None:
        return tables.fronts.lookup(abi.FrontKey.of(address, port, proto))

    @staticmethod
    def _range(tables: Tables, address: IPAddress, way: _Way) -> abi.Front | None:
        front = tables.ranges.table.lookup(abi.RangeKey.of(address, way.proto, way.port, 16))
        if front is not None:
            way.say(f"port {way.port} is in a range that begins with {front.first}")
        return front

    # ---- which backend --------------------------------------------------------------------------------------
    def _serve(self, tables: Tables, way: _Way, front: abi.Front, answer: pb.TraceServiceResponse) -> None:
        line = tables.services.at(front.service, abi.Service)
        flags = abi.ServiceFlag(line.flags)
        answer.service = self._plane.name_of(front.service)
        answer.frontend.CopyFrom(self._frontend(answer.service, way))
        here = way.client in self._local()
        inside = here or self._known(way.client)
        answer.client_inside = inside
        outside = not inside and bool(front.flags & abi.FrontFlag.OUTSIDE)
        way.say(f"it belongs to service {answer.service}")
        way.say(
            f"{way.client} is {'of this node' if here else 'in the cluster' if inside else 'outside the cluster'}"
        )
        if (
            outside
            and flags & abi.ServiceFlag.SOURCES
            and not self._admitted(tables, front.service, way.client)
        ):
            way.say("its address is in none of the service's source ranges: dropped")
            answer.translation = "drop"
            return
        at_socket = here and self._sockets() and way.proto in (6, 17)
        stretch = line.outside if outside else line.inside
        ids = struct.unpack_from(f"={stretch.count}I", tables.slots.mem, stretch.first * 4)
        ident, port = self._choose(tables, way, front, flags, ids, at_socket)
        if not ids and not ident:
            answer.translation = "drop" if flags & abi.ServiceFlag.DROP else "reject"
            way.say(
                f"no backend serves such clients: {'nothing is said' if flags & abi.ServiceFlag.DROP else 'refused'}"
            )
            return
        possible = [ident] if ident else list(dict.fromkeys(ids))
        shown = [
            found
            for each in possible[:CANDIDATES_MAX]
            if (found := self._backend(tables, each, answer.service))
        ]
        if ident:
            answer.backend.CopyFrom(shown[0])
            way.say(f"backend: {shown[0].address} port {shown[0].port + way.port - front.first}")
        else:
            answer.candidates.extend(shown)
        answer.snat_port = port
        self._translation(tables, way, answer, flags, possible, outside, at_socket)

    def _choose(
        self,
        tables: Tables,
        way: _Way,
        front: abi.Front,
        flags: abi.ServiceFlag,
        ids: tuple[int, ...],
        at_socket: bool,
    ) -> tuple[int, int]:
        """The backend's id, 0 if chance decides; and the node's port towards it, if the connection exists."""
        config = tables.config
        if at_socket:
            way.say("its socket is translated when it connects, among all who serve such clients at random"
                    + (", or as lately (affinity)" if flags & abi.ServiceFlag.AFFINITY else ""))  # fmt: skip
            return 0, 0
        hashed = abi.flow_hash(config.seed, way.client, way.cport, way.address, way.port, way.proto)
        if way.cport and (flow := self._flow(tables, hashed)) is not None:
            ident, port = flow
            backend = tables.backends.at(ident & abi.BACKEND_INDEX, abi.Backend)
            if backend.id == ident and backend.service == front.service:
                way.say("the connection exists, and goes on with its backend")
                return ident, port
        if flags & abi.ServiceFlag.AFFINITY:
            if ident := self._sticky(tables, way.client, front.service):
                way.say("the client has been with a backend lately (affinity)")
                return ident, 0
            hashed = abi.flow_hash(config.seed, way.client, 0, way.address, way.port, way.proto)
        if not ids:
            return 0, 0
        if not flags & abi.ServiceFlag.MAGLEV:
            way.say(f"one of {len(set(ids))} backends is chosen at random")
            return 0, 0
        if not way.cport and not flags & abi.ServiceFlag.AFFINITY:
            way.say(
                f"one of {len(set(ids))} backends is chosen by a hash, which the client's port is part of"
            )
            return 0, 0
        slot = (hashed >> 32) * len(ids) >> 32
        way.say(f"the hash chooses slot {slot} of {len(ids)}")
        return ids[slot], 0

    def _flow(self, tables: Tables, sig: int) -> tuple[int, int] | None:
        flows = self._plane.flows
        if flows is None:
            return None
        mem, now = flows.lines.mem, beat(tables.config.beat_shift) >> 2 & abi.STAMP
        start = (sig & flows.lines.size - 1) * abi.LINE
        for found, ident, port, stamp in _FLOW.iter_unpack(mem[start : start + abi.LINE]):
            if found == sig and (now - stamp & abi.STAMP) <= flows.limit(stamp):
                return ident ^ sig >> 32, socket.ntohs(port)
        return None

    def _sticky(self, tables: Tables, client: IPAddress, service: int) -> int:
        with BpfMap.open(self._pins / abi.MAPS["lb_affinity"], abi.Client, abi.Sticky) as table:
            found = table.lookup(abi.Client(addr=FibAddr.of(client), service=service))
        if found is None:
            return 0
        line = tables.services.at(service, abi.Service)
        backend = tables.backends.at(found.backend & abi.BACKEND_INDEX, abi.Backend)
        recent = (beat(tables.config.beat_shift) - found.beat) & 0xFFFFFFFF <= line.affinity_s
        alive = backend.id == found.backend and backend.state == abi.BackendState.ACTIVE
        return int(found.backend) if recent and alive and backend.service == service else 0

    # ---- what is known of addresses -------------------------------------------------------------------------
    def _known(self, client: IPAddress) -> bool:
        """A pod's or node's of the cluster, by the ipcache. Without one nobody is known."""
        key = pipeline.IpcachePrefix(bits=128, addr=(ct.c_uint8 * 16)(*addr_bytes(client)))
        try:
            with BpfMap.open(
                self._pins / pipeline.MAPS["ipc_addr"], FibAddr, pipeline.IpcacheEntry
            ) as single:
                entry = single.lookup(FibAddr.of(client))
            if entry is None:
                prefixes = self._pins / pipeline.MAPS["ipc_prefix"]
                with BpfMap.open(prefixes, pipeline.IpcachePrefix, pipeline.IpcacheEntry) as table:
                    entry = table.lookup(key)
        except errors.FibrilError:
            return False
        return entry is not None and bool(entry.node)

    def _admitted(self, tables: Tables, service: int, client: IPAddress) -> bool:
        raw = addr_bytes(client)
        key = abi.SourceKey(bits=160, service=socket.htonl(service), addr=(ct.c_uint8 * 16)(*raw))
        return tables.sources.table.lookup(key) is not None

    def _frontend(self, service: str, way: _Way) -> pb.Frontend:
        for plan in self._plane.plans.get(service, {}).values():
            for front in plan.fronts:
                here = front.address == way.address or front.address.is_unspecified
                if here and front.proto == way.proto and front.port <= way.port <= front.port_last:
                    return convert.frontend_to_proto(front)
        return pb.Frontend(address=str(way.address), port=way.port, protocol=convert.NUMBERS[way.proto])

    def _backend(self, tables: Tables, ident: int, service: str) -> pb.Backend | None:
        line = tables.backends.at(ident & abi.BACKEND_INDEX, abi.Backend)
        address = line.addr.ip()
        if line.id != ident or address is None:
            return None
        key = BackendKey(address, socket.ntohs(line.port))
        state = self._plane.effective_state(service, key)
        return pb.Backend(
            address=str(address),
            port=key.port,
            effective_state=pb.BackendState.ValueType(int(line.state) if state is None else state),
        )

    def _translation(
        self,
        tables: Tables,
        way: _Way,
        answer: pb.TraceServiceResponse,
        flags: abi.ServiceFlag,
        ids: list[int],
        outside: bool,
        at_socket: bool,
    ) -> None:
        if at_socket:
            answer.translation = "socket"
            way.say("no packet is translated: the socket itself speaks to the backend")
            return
        lines = [tables.backends.at(ident & abi.BACKEND_INDEX, abi.Backend) for ident in ids]
        local = self._local()
        here = [line.addr.ip() in local for line in lines]
        if len(lines) == 1 and lines[0].addr.ip() == way.client:
            answer.translation = "hairpin"
            way.say("client and backend are the same: it sees an address of the node's own")
        elif answer.client_inside or all(here):
            answer.translation = "dnat"
            way.say("the destination becomes the backend's; the client's address stays")
        elif (
            flags & (abi.ServiceFlag.DSR if way.proto == 6 else abi.ServiceFlag.DSR_UDP)
            and not answer.snat_port
        ):
            answer.translation = "dsr"
            way.say("the packet travels in another to a backend elsewhere, which answers the client directly")
        else:
            answer.translation = "snat"
            way.say("a backend elsewhere sees this node's address, and answers by this node")
