"""Any frame a pod may send: the programs decide as the model does, to the byte."""

from __future__ import annotations

import struct

import pytest
from hypothesis import HealthCheck, event, example, given, settings
from hypothesis import strategies as st

from services.common.pipeline import abi
from tests.datapath.harness import HOST_MAC, PODS, A, Datapath
from tests.datapath.model import decide

V4 = [pod.ipv4.packed for pod in PODS if pod.ipv4] + [bytes(map(int, text.split("."))) for text in (
    "10.1.0.99", "192.0.2.1", "255.255.255.255", "224.0.0.1", "127.0.0.1", "0.0.0.0", "169.254.1.1", "240.0.0.1")]
V6 = [pod.ipv6.packed for pod in PODS if pod.ipv6] + [bytes.fromhex(text) for text in (
    "fd000001" + "00" * 11 + "99", "20010db8" + "00" * 11 + "01", "ff02" + "00" * 13 + "01",
    "fe80" + "00" * 13 + "01", "00" * 16, "00" * 15 + "01", "00" * 10 + "ffff0a01000b")]
MACS = [bytes(A.pod_mac), bytes.fromhex(HOST_MAC.replace(":", "")), bytes(PODS[1].pod_mac), b"\xff" * 6,
        b"\x33\x33\0\0\0\1"]


def mostly(usual: bytes, others: list[bytes]) -> st.SearchStrategy[bytes]:
    """`usual` nine times in ten, so that most frames get past that check."""
    return st.integers(0, 9).flatmap(lambda n: st.just(usual) if n else st.sampled_from(others) | st.binary(
        min_size=len(usual), max_size=len(usual)))


transports = st.one_of(
    st.builds(lambda ports, doff, rest: (6, struct.pack(">IQBB6x", ports, 0, doff << 4, 0x18) + rest),
              st.integers(0, 2**32 - 1), st.sampled_from([5, 5, 5, 8, 15, 4, 0]), st.binary(max_size=40)),
    st.builds(lambda proto, rest: (proto, rest), st.sampled_from([1, 6, 17, 58, 132, 136, 47, 59, 255]),
              st.binary(max_size=64)),
    # Long enough to exceed an MTU.
    st.builds(lambda proto, size: (proto, bytes(size)), st.sampled_from([17, 50]), st.integers(1200, 1600)))

extensions = st.lists(st.one_of(
    st.builds(lambda kind, length: (kind, bytes([length]) + bytes(6 + length * 8)),
              st.sampled_from([0, 43, 60, 135]), st.integers(0, 3)),
    st.builds(lambda length: (51, bytes([length]) + bytes(2 + length * 4)), st.integers(1, 4)),
    st.builds(lambda field: (44, b"\0" + field.to_bytes(2, "big") + bytes(4)),
              st.sampled_from([0, 1, 8, 9, 0xFFF8])),
    st.builds(lambda kind, length: (kind, bytes([length]) + bytes(6)), st.sampled_from([0, 60]), st.integers(0, 255))),
    max_size=8)


@st.composite
def frames(draw: st.DrawFn) -> bytes:
    macs = draw(mostly(MACS[1], MACS)) + draw(mostly(MACS[0], MACS))
    proto, payload = draw(transports)
    ttl = draw(st.sampled_from([64, 255, 2, 1, 0]))
    if draw(st.booleans()):
        words = draw(st.sampled_from([5, 5, 5, 5, 6, 15, 4]))
        frag = draw(st.sampled_from([0, 0, 0, 0x4000, 0x2000, 0x2001, 1, 0x1FFF]))
        header = struct.pack(">BBHHHBBH", (4 << 4) | words, 0, 20 + len(payload), 7, frag, ttl, proto,
                             draw(st.integers(0, 0xFFFF)))
        packet = header + draw(mostly(V4[0], V4)) + draw(st.sampled_from(V4)) + bytes(max(0, words - 5) * 4) + payload
        frame, least = macs + b"\x08\x00" + packet, 34
    else:
        chain = b""
        for kind, body in reversed(draw(extensions)):
            chain, proto = bytes([proto]) + body + chain, kind
        header = struct.pack(">IHBB", 6 << 28, len(chain) + len(payload), proto, ttl)
        packet = header + draw(mostly(V6[0], V6)) + draw(st.sampled_from(V6)) + chain + payload
        frame, least = macs + b"\x86\xdd" + packet, 54
    damage = draw(st.integers(0, 19))
    if damage == 0:
        return frame[:draw(st.integers(least, len(frame)))]
    if damage == 1:
        where = draw(st.integers(12, least - 1))
        frame = frame[:where] + draw(st.binary(min_size=1, max_size=1)) + frame[where + 1:]
    return frame


# The one checksum that one hop less makes 0, and not the other zero.
ZERO_AFTER = MACS[1] + MACS[0] + b"\x08\x00" + struct.pack(
    ">BBHHHBBH", 0x45, 0, 28, 7, 0, 64, 17, 0xFEFF) + V4[0] + V4[1] + struct.pack(">HHHH", 1, 2, 8, 0)


@pytest.fixture(params=["near", "by-hash"])
def pipeline(dp: Datapath, request: pytest.FixtureRequest) -> Datapath:
    if request.param == "by-hash":
        dp.forget_near()
    return dp


@settings(max_examples=1500, deadline=None, suppress_health_check=list(HealthCheck))
@example(frame=ZERO_AFTER)
@given(frame=frames())
def test_programs_decide_as_the_model(pipeline: Datapath, frame: bytes) -> None:
    kernel_refuses = (frame[12:14] == b"\x86\xdd" and len(frame) < 54) or len(frame) < 34
    if kernel_refuses or frame[12:14] in (b"\x81\0", b"\x88\xa8", b"\x08\x06"):
        return
    pods = {address: pod for pod in PODS for address in (pod.ipv4, pod.ipv6) if address is not None}
    due = decide(frame, A, pods)
    event(f"{due.verdict.name} {due.reason.name}")
    got = pipeline.run(frame)
    assert (got.verdict, got.reason) == (due.verdict, due.reason)
    if due.verdict != abi.Verdict.DROPPED:
        assert due.parsed is not None
        assert got.data == due.data
        assert (got.event.src.ip(), got.event.dst.ip()) == (due.parsed.source, due.parsed.destination)
        assert (got.event.proto, abi.host16(got.event.sport), abi.host16(got.event.dport)) == (
            due.parsed.proto, due.parsed.sport, due.parsed.dport)
        assert (got.event.icmp_type, got.event.icmp_code) == due.parsed.icmp
