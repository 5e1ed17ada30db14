"""Keys of addresses and prefixes."""

from __future__ import annotations

from ipaddress import IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.common.pipeline import abi
from services.identity.ipcache import model
from services.identity.ipcache.model import Entry, Source

MAPPED = ip_network("::ffff:0:0/96")


def networks() -> st.SearchStrategy[IPv4Network | IPv6Network]:
    v4 = st.tuples(st.ip_addresses(v=4), st.integers(0, 32))
    v6 = st.tuples(st.ip_addresses(v=6), st.integers(0, 128))
    made = st.one_of(v4, v6).map(lambda pair: ip_network(f"{pair[0]}/{pair[1]}", strict=False))
    return made.filter(lambda n: n.version == 4 or not n.subnet_of(MAPPED))


@given(networks())
def test_a_key_is_what_the_kernel_has_and_leads_back(network: IPv4Network | IPv6Network) -> None:
    key = model.prefix_key(network)
    if network.prefixlen == network.max_prefixlen:
        assert key == bytes(abi.FibAddr.of(network.network_address))
        assert model.text_key(str(network.network_address)) == key
    else:
        assert key == bytes(abi.IpcachePrefix.of(network))
    assert model.network_of(key) == network
    assert Entry.of(network, 1, "", Source.LOCAL).prefix == network


@given(st.lists(networks(), max_size=20))
def test_keys_sort_by_family_address_and_length(found: list[IPv4Network | IPv6Network]) -> None:
    keys = sorted((model.prefix_key(n) for n in found), key=model.sort_key)
    wanted = sorted(found, key=lambda n: (n.version, n.network_address.packed, n.prefixlen))
    assert [model.network_of(key) for key in keys] == wanted


@given(st.ip_addresses(), st.integers(0, 127))
def test_a_shorter_prefix_holds_the_address(address: IPv6Address, bits: int) -> None:
    raw = model.address_key(address)
    assert model.shorter(raw, bits) == bytes(abi.IpcachePrefix.of(IPv6Network((raw, bits), strict=False)))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "10.0.0",
        "010.0.0.1",
        "10.0.0.1/32",
        "::ffff:10.0.0.1",
        "::ffff:a00:1",
        "FD00::1",
        "fd00:0::1",
        "fd00::01",
        "fe80::1%eth0",
        " 10.0.0.1",
        "a.b",
    ],
)
def test_an_address_has_one_spelling(text: str) -> None:
    with pytest.raises(ValueError):
        model.text_key(text)


@given(st.ip_addresses(v=6))
def test_the_usual_spelling_of_ipv6_is_understood(address: IPv6Address) -> None:
    if address.ipv4_mapped is None:
        assert model.text_key(str(address)) == address.packed


@pytest.mark.parametrize("text", ["::ffff:10.0.0.0/104", "::ffff:10.0.0.1/128"])
def test_ipv4_dressed_up_as_ipv6_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="stands for an IPv4"):
        model.prefix_key(ip_network(text))


@given(networks())
def test_what_spans_ipv4_is_found_for_ipv4_addresses(network: IPv4Network | IPv6Network) -> None:
    spans = network.version == 6 and MAPPED.subnet_of(network)
    assert model.spans_ipv4(model.prefix_key(network)) is spans


def test_all_of_ipv6_spans_ipv4() -> None:
    assert model.spans_ipv4(model.prefix_key(ip_network("::/0")))
    assert not model.spans_ipv4(model.ALL_IPV4)
    assert model.address_of(model.ALL_IPV4) == ip_address("0.0.0.0")
