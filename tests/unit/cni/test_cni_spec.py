"""The CNI specification in pure functions: versions, results, errors, and input nobody sane would send."""

from __future__ import annotations

import ipaddress
import json
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from services.ipam.cni import spec

MADE = spec.Interface(
    host_ifname="fb12ab1",
    host_mac="02:00:00:00:00:01",
    ifname="eth0",
    mac="02:00:00:00:00:02",
    netns="/run/netns/x",
    mtu=1500,
    ipv4="10.244.0.5",
    ipv6="fd00::5",
    gateway4="10.244.0.1",
    gateway6="fd00::1",
)
ADD_ENV = {"CNI_COMMAND": "ADD", "CNI_CONTAINERID": "c1", "CNI_NETNS": "/run/netns/x", "CNI_IFNAME": "eth0"}


def environment(**changes: str) -> spec.Environment:
    return spec.parse_environment({**ADD_ENV, **changes})


def conf(command: str = "ADD", **fields: Any) -> spec.NetConf:
    body = {"cniVersion": "1.1.0", "name": "net", "type": "fibril-cni", **fields}
    return spec.parse_config(body, environment(CNI_COMMAND=command))


def result(**fields: Any) -> dict[str, Any]:
    answer: dict[str, Any] = json.loads(spec.render_result(conf(**fields), MADE))
    return answer


def code(raises: pytest.ExceptionInfo[spec.CniError]) -> int:
    return raises.value.code


# ---- results, version by version ----


@pytest.mark.parametrize("version", ["0.1.0", "0.2.0", None])
def test_oldest_results_have_one_object_a_family(version: str | None) -> None:
    answer = result(cniVersion=version)
    assert answer == {
        "cniVersion": version or "0.1.0",
        "ip4": {
            "ip": "10.244.0.5/32",
            "gateway": "10.244.0.1",
            "routes": [{"dst": "0.0.0.0/0", "gw": "10.244.0.1"}],
        },
        "ip6": {"ip": "fd00::5/128", "gateway": "fd00::1", "routes": [{"dst": "::/0", "gw": "fd00::1"}]},
        "dns": {},
    }


@pytest.mark.parametrize("version", ["0.3.0", "0.3.1", "0.4.0"])
def test_middle_results_name_the_family_of_an_address(version: str) -> None:
    answer = result(cniVersion=version)
    assert [ip["version"] for ip in answer["ips"]] == ["4", "6"]
    assert "mtu" not in answer["interfaces"][1]


def test_1_0_results_do_not_name_the_family() -> None:
    answer = result(cniVersion="1.0.0")
    assert answer["ips"] == [
        {"address": "10.244.0.5/32", "gateway": "10.244.0.1", "interface": 1},
        {"address": "fd00::5/128", "gateway": "fd00::1", "interface": 1},
    ]
    assert answer["interfaces"] == [
        {"name": "fb12ab1", "mac": "02:00:00:00:00:01"},
        {"name": "eth0", "mac": "02:00:00:00:00:02", "sandbox": "/run/netns/x"},
    ]


def test_1_1_results_give_the_mtu() -> None:
    answer = result(cniVersion="1.1.0")
    assert [interface["mtu"] for interface in answer["interfaces"]] == [1500, 1500]


@pytest.mark.parametrize("version", spec.VERSIONS)
def test_a_family_that_is_absent_leaves_no_trace(version: str) -> None:
    made = spec.Interface(**{**MADE.__dict__, "ipv4": "", "gateway4": ""})
    answer = spec.render_result(conf(cniVersion=version), made).decode()
    assert "10.244" not in answer and "0.0.0.0" not in answer and "fd00::5/128" in answer


def test_a_previous_result_is_kept_and_added_to() -> None:
    previous = {
        "cniVersion": "1.0.0",
        "interfaces": [{"name": "lo", "sandbox": "/run/netns/x"}],
        "ips": [{"address": "127.0.0.1/8", "interface": 0}],
        "dns": {"nameservers": ["10.0.0.53"]},
    }
    answer = result(cniVersion="1.0.0", prevResult=previous)
    assert [interface["name"] for interface in answer["interfaces"]] == ["lo", "fb12ab1", "eth0"]
    assert [ip["interface"] for ip in answer["ips"]] == [0, 2, 2]
    assert answer["dns"] == {"nameservers": ["10.0.0.53"]}


def test_dns_of_the_configuration_is_handed_on() -> None:
    assert result(dns={"nameservers": ["10.0.0.10"]})["dns"] == {"nameservers": ["10.0.0.10"]}


# ---- versions ----


@pytest.mark.parametrize(
    "command, version, allowed",
    [
        ("CHECK", "0.3.1", False),
        ("CHECK", "0.4.0", True),
        ("STATUS", "1.0.0", False),
        ("STATUS", "1.1.0", True),
        ("GC", "1.0.0", False),
        ("ADD", "0.1.0", True),
        ("DEL", "0.1.0", True),
        ("ADD", "2.0.0", False),
        ("ADD", "1.1", False),
        ("ADD", "", True),
    ],
)
def test_commands_exist_from_their_version_on(command: str, version: str, allowed: bool) -> None:
    if allowed:
        assert conf(command, cniVersion=version).version == (version or "0.1.0")
    else:
        with pytest.raises(spec.CniError) as raised:
            conf(command, cniVersion=version)
        assert code(raised) == spec.INCOMPATIBLE_VERSION


def test_a_version_that_is_no_string_is_a_decoding_failure() -> None:
    with pytest.raises(spec.CniError) as raised:
        conf(cniVersion=1)
    assert code(raised) == spec.DECODING_FAILURE


# ---- environment ----


@pytest.mark.parametrize(
    "command, missing",
    [
        ("ADD", "CNI_CONTAINERID"),
        ("ADD", "CNI_NETNS"),
        ("ADD", "CNI_IFNAME"),
        ("CHECK", "CNI_NETNS"),
        ("DEL", "CNI_CONTAINERID"),
        ("DEL", "CNI_IFNAME"),
    ],
)
def test_a_missing_variable_is_named(command: str, missing: str) -> None:
    with pytest.raises(spec.CniError, match=missing) as raised:
        environment(CNI_COMMAND=command, **{missing: ""})
    assert code(raised) == spec.INVALID_ENVIRONMENT


def test_del_needs_no_namespace() -> None:
    assert environment(CNI_COMMAND="DEL", CNI_NETNS="").netns == ""


@pytest.mark.parametrize(
    "changes",
    [
        {"CNI_COMMAND": "FROB"},
        {"CNI_COMMAND": ""},
        {"CNI_CONTAINERID": "../etc"},
        {"CNI_CONTAINERID": "x" * 129},
        {"CNI_IFNAME": "a/b"},
        {"CNI_IFNAME": "sixteen-letters-"},
        {"CNI_IFNAME": ".."},
        {"CNI_IFNAME": "a b"},
        {"CNI_ARGS": "novalue"},
        {"CNI_ARGS": "=x"},
    ],
)
def test_malformed_variables_are_refused(changes: dict[str, str]) -> None:
    with pytest.raises(spec.CniError) as raised:
        environment(**changes)
    assert code(raised) == spec.INVALID_ENVIRONMENT


@pytest.mark.parametrize(
    "args, pod",
    [
        ("K8S_POD_NAMESPACE=shop;K8S_POD_NAME=cart-0;IgnoreUnknown=1", "shop/cart-0"),
        ("K8S_POD_NAME=cart", "cart"),
        ("", ""),
    ],
)
def test_the_pod_is_named_by_cni_args(args: str, pod: str) -> None:
    assert spec.pod_name(environment(CNI_ARGS=args).args) == pod


# ---- configuration ----


@pytest.mark.parametrize(
    "fields",
    [
        {"runtimeConfig": {"ips": ["10.1.1.1/24", "fd01::1"]}},
        {"args": {"cni": {"ips": ["10.1.1.1", "fd01::1/64"]}}},
    ],
)
def test_addresses_can_be_asked_for(fields: dict[str, Any]) -> None:
    parsed = conf(**fields)
    assert (parsed.ipv4, parsed.ipv6) == ("10.1.1.1", "fd01::1")


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({}, False),
        ({"runtimeConfig": {"bandwidth": {"ingressRate": 1000}}}, False),
        ({"runtimeConfig": {"bandwidth": {"egressRate": 1000}}}, True),
        ({"ingressQdisc": True}, True),
    ],
)
def test_room_is_made_for_a_shaping_plugin(fields: dict[str, Any], expected: bool) -> None:
    assert conf(**fields).ingress_qdisc is expected


def test_cgroup_labels_pool_and_mtu_are_read() -> None:
    parsed = conf(
        runtimeConfig={"cgroupPath": "/pods/x"},
        pool="blue",
        mtu=9000,
        args={"cni": {"labels": [{"key": "app", "value": "web"}]}},
    )
    assert (parsed.cgroup_path, parsed.pool, parsed.mtu, parsed.labels) == (
        "/pods/x",
        "blue",
        9000,
        {"app": "web"},
    )


@pytest.mark.parametrize(
    "fields, expected",
    [
        ({"bridge": "br0"}, spec.UNSUPPORTED_FIELD),
        ({"ipam": {"type": "host-local"}}, spec.UNSUPPORTED_FIELD),
        ({"ipMasq": False}, spec.UNSUPPORTED_FIELD),
        ({"name": ""}, spec.INVALID_CONFIG),
        ({"name": "a/b"}, spec.INVALID_CONFIG),
        ({"name": 7}, spec.INVALID_CONFIG),
        ({"mtu": 100}, spec.INVALID_CONFIG),
        ({"mtu": True}, spec.INVALID_CONFIG),
        ({"mtu": "1500"}, spec.INVALID_CONFIG),
        ({"runtimeConfig": []}, spec.INVALID_CONFIG),
        ({"runtimeConfig": {"ips": ["10.0.0.300"]}}, spec.INVALID_CONFIG),
        ({"runtimeConfig": {"ips": ["10.0.0.1", "10.0.0.2"]}}, spec.INVALID_CONFIG),
        ({"runtimeConfig": {"ips": [1]}}, spec.INVALID_CONFIG),
        ({"runtimeConfig": {"mac": "zz"}}, spec.INVALID_CONFIG),
        ({"args": {"cni": {"labels": ["x"]}}}, spec.INVALID_CONFIG),
        ({"prevResult": []}, spec.INVALID_CONFIG),
    ],
)
def test_bad_configuration_is_refused(fields: dict[str, Any], expected: int) -> None:
    with pytest.raises(spec.CniError) as raised:
        conf(**fields)
    assert code(raised) == expected


def test_namespaced_fields_belong_to_others() -> None:
    assert conf(**{"example.com/x": 1}).network == "net"


def test_cleaning_up_ignores_what_it_does_not_need() -> None:
    assert conf("DEL", bridge="br0", mtu="x", prevResult=3).network == "net"


@pytest.mark.parametrize(
    "listed", [None, {}, [1], [{"containerID": "c"}], [{"containerID": 1, "ifname": "eth0"}]]
)
def test_gc_without_a_proper_list_deletes_nothing(listed: Any) -> None:
    with pytest.raises(spec.CniError) as raised:
        conf("GC", **{"cni.dev/valid-attachments": listed})
    assert code(raised) == spec.INVALID_CONFIG


def test_gc_reads_its_attachments() -> None:
    parsed = conf("GC", **{"cni.dev/valid-attachments": [{"containerID": "c", "ifname": "eth0"}]})
    assert parsed.valid_attachments == {spec.Attachment("c", "eth0")}


# ---- CHECK ----


def checked(previous: dict[str, Any]) -> list[str]:
    return spec.differences(conf("CHECK", prevResult=previous), environment(CNI_COMMAND="CHECK"), MADE)


@pytest.mark.parametrize("version", ["0.4.0", "1.0.0", "1.1.0"])
def test_check_accepts_the_result_of_add(version: str) -> None:
    assert checked(result(cniVersion=version)) == []


def test_check_needs_a_previous_result() -> None:
    with pytest.raises(spec.CniError) as raised:
        spec.differences(conf("CHECK"), environment(CNI_COMMAND="CHECK"), MADE)
    assert code(raised) == spec.INVALID_CONFIG


def test_check_names_every_difference() -> None:
    previous = result()
    previous["interfaces"][1]["mac"] = "02:ff:ff:ff:ff:ff"
    previous["ips"][0]["address"] = "10.244.0.6/32"
    found = " ".join(checked(previous))
    assert "02:ff:ff:ff:ff:ff" in found and "10.244.0.6" in found and "10.244.0.5" in found
    assert checked({"interfaces": []}) == ["prevResult has no interface eth0 in a sandbox"]


def test_addresses_of_other_interfaces_are_not_ours_to_check() -> None:
    previous = result()
    previous["interfaces"].append({"name": "eth1", "sandbox": "/run/netns/x"})
    previous["ips"].append({"address": "192.0.2.1/24", "interface": 2})
    assert checked(previous) == []


# ---- anything at all ----

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=5,
)
field_names = st.sampled_from(
    [
        "cniVersion",
        "name",
        "type",
        "args",
        "runtimeConfig",
        "prevResult",
        "dns",
        "mtu",
        "pool",
        "ipam",
        "cni.dev/valid-attachments",
        "interfaces",
        "ips",
        "cni",
        "mac",
    ]
)
likely = st.dictionaries(
    field_names,
    json_values
    | st.sampled_from(["1.1.0", "0.4.0", "net"])
    | st.dictionaries(
        st.sampled_from(["ips", "mac", "cni", "interfaces", "cgroupPath", "labels", "dns"]),
        json_values,
        max_size=4,
    ),
    max_size=6,
)


@given(config=st.binary(max_size=200))
def test_any_bytes_are_decoded_or_refused(config: bytes) -> None:
    try:
        assert isinstance(spec.decode(config), dict)
    except spec.CniError as error:
        assert error.code == spec.DECODING_FAILURE
        assert json.loads(error.render(spec.NEWEST))["code"] == spec.DECODING_FAILURE


@given(command=st.sampled_from(spec.COMMANDS), config=likely, default=st.booleans())
def test_any_configuration_is_answered_or_refused(
    command: str, config: dict[str, Any], default: bool
) -> None:
    if default:
        config = {"cniVersion": "1.1.0", "name": "net", **config}
    try:
        parsed = spec.parse_config(config, environment(CNI_COMMAND=command))
        if command == "ADD":
            answer = json.loads(spec.render_result(parsed, MADE))
            assert answer["cniVersion"] == parsed.version
        if command == "CHECK":
            spec.differences(parsed, environment(CNI_COMMAND=command), MADE)
        for address in filter(None, (parsed.ipv4, parsed.ipv6)):
            ipaddress.ip_address(address)
    except spec.CniError as error:
        assert error.code in (1, 2, 6, 7)


@given(
    variables=st.dictionaries(
        st.sampled_from(
            ["CNI_COMMAND", "CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME", "CNI_ARGS", "CNI_PATH"]
        ),
        st.text(max_size=20) | st.sampled_from(["ADD", "DEL", "c1", "eth0", "/run/netns/x", "A=B;C=D"]),
    )
)
def test_any_environment_is_accepted_whole_or_refused(variables: dict[str, str]) -> None:
    try:
        parsed = spec.parse_environment(variables)
    except spec.CniError as error:
        assert error.code == spec.INVALID_ENVIRONMENT
    else:
        assert parsed.command in spec.COMMANDS
        if parsed.command in ("ADD", "DEL", "CHECK"):
            assert parsed.container_id and 0 < len(parsed.ifname.encode()) <= 15
