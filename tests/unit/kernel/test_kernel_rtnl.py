"""Netlink messages: what is sent, and reading whatever may come back."""

import errno
import socket
import struct
from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common import errors
from services.common.kernel import events, netlink, rtnl


def message(kind: int, payload: bytes) -> bytes:
    return struct.pack("IHHII", 16 + len(payload), kind, 0, 1, 0) + payload


def attribute(number: int, data: bytes) -> bytes:
    return struct.pack("HH", 4 + len(data), number) + data + b"\0" * (-len(data) % 4)


@given(st.binary(max_size=200))
def test_no_bytes_upset_the_readers(data: bytes) -> None:
    rtnl.attributes(data)
    for kind, _, _, payload in rtnl.parse(data):
        rtnl.answer(kind, payload)


@given(st.dictionaries(st.integers(1, 0x3FFF), st.binary(max_size=40)))
def test_attributes_come_back_as_they_were_packed(attrs: dict[int, bytes]) -> None:
    assert rtnl.attributes(b"".join(attribute(n, d) for n, d in attrs.items())) == attrs


def test_a_route_request_carries_destination_device_and_source() -> None:
    request = netlink.route_put(ip_network("10.244.0.5/32"), 7, source=IPv4Address("10.244.0.1"))
    data = request.encode(9, rtnl.REQUEST | rtnl.ACK)
    [(kind, flags, sequence, payload)] = rtnl.parse(data)
    assert (kind, sequence) == (rtnl.NEWROUTE, 9)
    assert flags == rtnl.REQUEST | rtnl.ACK | rtnl.CREATE | rtnl.REPLACE
    got = rtnl.answer(kind, payload)
    family, length, _, _, table, proto, scope, route_type = struct.unpack_from("8B", got.fixed)
    assert (family, length, table) == (socket.AF_INET, 32, netlink.TABLE_MAIN)
    assert (proto, scope, route_type) == (netlink.PROTO_FIBRIL, netlink.SCOPE_LINK, netlink.UNICAST)
    assert got.attrs == {1: bytes([10, 244, 0, 5]), 4: struct.pack("I", 7), 7: bytes([10, 244, 0, 1])}


def test_an_ipv6_address_is_added_without_duplicate_detection() -> None:
    [(_, _, _, payload)] = rtnl.parse(netlink.address_add(3, IPv6Address("fd00::5")).encode(1, 0))
    family, prefix, flags, _, index = struct.unpack_from("BBBBI", payload)
    assert (family, prefix, index) == (socket.AF_INET6, 128, 3)
    assert flags & 0x02


def test_messages_are_padded_so_that_they_can_be_joined() -> None:
    for request in (
        netlink.veth_add("abc", "02:00:00:00:00:01", "defgh", "02:00:00:00:00:02", 1500),
        netlink.link_up(1),
        netlink.no_link_local(1),
    ):
        assert len(request.encode(1, 0)) % 4 == 0


@pytest.mark.parametrize(
    ("number", "kind"),
    [
        (errno.EEXIST, errors.AlreadyExists),
        (errno.ENODEV, errors.NotFound),
        (errno.ESRCH, errors.NotFound),
        (errno.EPERM, errors.PermissionDenied),
        (errno.ENOBUFS, errors.ResourceExhausted),
        (errno.EBUSY, errors.Unavailable),
        (errno.EINVAL, errors.FailedPrecondition),
    ],
)
def test_an_errno_becomes_its_error_and_names_the_operation(
    number: int, kind: type[errors.FibrilError]
) -> None:
    error = rtnl.typed_error(number, "set route to 10.0.0.1/32", "Invalid prefsrc address")
    assert type(error) is kind
    assert "set route to 10.0.0.1/32" in str(error)
    assert "Invalid prefsrc address" in str(error)


def test_link_events_are_decoded_and_bridge_ones_skipped() -> None:
    def link(family: int, name: bytes) -> bytes:
        return struct.pack("BxHiII", family, 1, 12, netlink.IFF_UP, 0) + attribute(3, name + b"\0")

    data = message(rtnl.NEWLINK, link(socket.AF_UNSPEC, b"fb1")) + message(rtnl.NEWLINK, link(7, b"fb2"))
    [event] = events.decode(data + message(rtnl.DELLINK, link(socket.AF_UNSPEC, b"fb3")))[:1]
    assert event.kind == "link"
    assert event.link is not None
    assert (event.link.name, event.link.ifindex, event.link.up) == ("fb1", 12, True)
    assert [e.kind for e in events.decode(data + message(rtnl.DELLINK, link(0, b"fb3")))] == [
        "link",
        "link-gone",
    ]
