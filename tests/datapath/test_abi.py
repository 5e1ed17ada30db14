"""The ctypes mirror against the layouts and numbers the compiler sees."""

from __future__ import annotations

import ctypes as ct
import re
from pathlib import Path
from typing import Any

import pytest

from services.common.kernel import loader
from services.common.pipeline import abi
from services.identity.numbers import Reserved
from tests.datapath.abikit import compile_layouts, require_same

STRUCTS = {"fib_addr": abi.FibAddr, "endpoint": abi.Endpoint, "pkt_ctx": abi.PktCtx, "node_config": abi.NodeConfig,
           "pl_counter": abi.PlCounter, "event": abi.Event, "ipcache_entry": abi.IpcacheEntry,
           "ipcache_prefix": abi.IpcachePrefix, "ipcache_near": abi.IpcacheNear, "node_entry": abi.NodeEntry,
           "network_config": abi.NetworkDevices}

@pytest.fixture(scope="module")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    headers = ("abi/endpoint.h", "abi/pipeline.h", "abi/ipcache.h", "abi/node.h")
    return compile_layouts(headers, STRUCTS, tmp_path_factory.mktemp("abi"))


@pytest.mark.parametrize("name", STRUCTS)
def test_layout_is_the_compilers(compiled: dict[str, Any], name: str) -> None:
    if name == "fib_addr":  # a union in C
        assert ct.sizeof(STRUCTS[name]) == compiled[name]["size"]
        return
    require_same(STRUCTS[name], compiled[name])


def numbers(header: str, pattern: str) -> dict[str, int]:
    text = (loader.bpf_root() / "abi" / header).read_text()
    return {name: int(value, 0) for name, value in re.findall(pattern, text, re.MULTILINE)}


def test_enumerations_are_the_headers() -> None:
    slots = numbers("pipeline.h", r"^\tSLOT_(\w+) = (\d+),")
    assert slots.pop("COUNT") == abi.SLOT_COUNT
    assert slots == {slot.name: slot.value for slot in abi.Slot}
    directions = numbers("pipeline.h", r"^\tDIR_(\w+) = (\d+),")
    assert directions.pop("COUNT") == abi.DIR_COUNT
    assert directions == {direction.name: direction.value for direction in abi.Direction}
    assert numbers("event.h", r"^\tVERDICT_(\w+) = (\d+),") == {v.name: v.value for v in abi.Verdict}
    assert numbers("pipeline.h", r"^#define PKT_(\w+) (0x\w+)") == {f.name: f.value for f in abi.PacketFlag}
    assert numbers("endpoint.h", r"^#define EP_(SHAPED_\w+) (0x\w+)") == {f.name: f.value for f in abi.EndpointFlag}
    assert numbers("endpoint.h", r"^#define EP_(NEAR_SLOTS|MAX|CROWDED) (\w+)") == {
        "NEAR_SLOTS": abi.EP_NEAR_SLOTS, "MAX": abi.EP_MAX, "CROWDED": abi.EP_CROWDED}
    assert numbers("ipcache.h", r"^#define IPC_(SINGLE) (0x\w+)") == {f.name: f.value for f in abi.IpcacheFlag}
    assert numbers("ipcache.h", r"^#define IPC_(ADDR_MAX|PREFIX_MAX|NEAR_SLOTS) (\d+)") == {
        "ADDR_MAX": abi.IPC_ADDR_MAX, "PREFIX_MAX": abi.IPC_PREFIX_MAX, "NEAR_SLOTS": abi.IPC_NEAR_SLOTS}
    assert numbers("ipcache.h", r"^#define IDENTITY_(\w+) (\d+)$") == {
        name: Reserved[name].value for name in ("HOST", "WORLD", "INIT", "REMOTE_NODE")}
    assert numbers("node.h", r"^\tNODE_(\w+) = (\d+),") == {mode.name: mode.value for mode in abi.NodeMode}
    assert numbers("node.h", r"^#define NODE_(\w+) (0x\w+)") == {f.name: f.value for f in abi.NodeFlag}
    assert numbers("node.h", r"^#define (ND_MAX) (\d+)") == {"ND_MAX": abi.ND_MAX}


def test_addresses_of_both_families_survive_the_round_trip() -> None:
    for text in ("10.1.2.3", "255.255.255.255", "fd00::1", "2001:db8:1:2:3:4:5:6"):
        assert str(abi.FibAddr.of(text).ip()) == text
    assert bytes(abi.FibAddr.of("10.1.2.3")) == bytes(10) + b"\xff\xff\x0a\x01\x02\x03"
    assert abi.FibAddr().ip() is None


def test_endpoint_takes_text_and_gives_addresses() -> None:
    made = abi.Endpoint.of(id=7, ifindex=9, mac="02:00:00:00:00:0a", host_mac="02:00:00:00:00:0b", mtu=1400,
                           ipv4="10.1.2.3")
    assert (str(made.ipv4), made.ipv6, bytes(made.pod_mac).hex()) == ("10.1.2.3", None, "02000000000a")
    with pytest.raises(ValueError):
        abi.Endpoint.of(id=7, ifindex=9, mac="02:00", host_mac="02:00:00:00:00:0b", mtu=1400)


def test_map_names_fit_the_kernel() -> None:
    for name, path in abi.MAPS.items():
        assert len(name) <= 15 and Path(path).name == name
