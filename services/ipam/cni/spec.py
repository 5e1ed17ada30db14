"""The CNI specification as pure functions: environment and configuration in, result or error out.

Knows every published version (0.1.0 to 1.1.0) and nothing about how an interface is made. A configuration
without cniVersion is 0.1.0, as in the reference library. What a runtime sends is untrusted: anything
malformed raises CniError with the code the specification assigns, never another exception.
"""

from __future__ import annotations

import ipaddress
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Version = tuple[int, int, int]

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")
NEWEST = VERSIONS[-1]
# First version in which a command exists.
SINCE: Mapping[str, Version] = {"CHECK": (0, 4, 0), "GC": (1, 1, 0), "STATUS": (1, 1, 0)}
COMMANDS = ("ADD", "DEL", "CHECK", "GC", "STATUS", "VERSION")

# Error codes of the specification.
INCOMPATIBLE_VERSION = 1
UNSUPPORTED_FIELD = 2
UNKNOWN_CONTAINER = 3
INVALID_ENVIRONMENT = 4
IO_FAILURE = 5
DECODING_FAILURE = 6
INVALID_CONFIG = 7
TRY_AGAIN_LATER = 11
NOT_AVAILABLE = 50
NOT_AVAILABLE_LIMITED = 51
# From 100 on they are a plugin's own.
INTERNAL = 100
EXHAUSTED = 101
ALREADY_EXISTS = 102
PRECONDITION = 103
DIFFERENT = 104

# The label that ties an endpoint to the CNI network it was made for; GC looks only at its own network's.
NETWORK_LABEL = "cni.fibril/network"

_NAME = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]{0,127}")
_MAC = re.compile(r"[0-9a-fA-F]{2}(:[0-9a-fA-F]{2}){5}")
# Everything a network configuration of type fibril-cni may hold. "disableCheck" and friends are the list's,
# which some runtimes copy down.
_KEYS = frozenset(
    (
        "cniVersion",
        "cniVersions",
        "name",
        "type",
        "args",
        "capabilities",
        "runtimeConfig",
        "prevResult",
        "dns",
        "ipMasq",
        "pool",
        "mtu",
        "ingressQdisc",
        "disableCheck",
        "disableGC",
        "loadOnlyInlinedPlugins",
    )
)


class CniError(Exception):
    """A failure as the specification words it."""

    def __init__(self, code: int, message: str, details: str = "") -> None:
        super().__init__(message)
        self.code = code
        self.message = message
        self.details = details

    def render(self, version: str) -> bytes:
        """The error object; `version` is the configuration's, or the newest when it could not be read."""
        body = {"cniVersion": version, "code": self.code, "msg": self.message}
        if self.details:
            body["details"] = self.details
        return _encode(body)


@dataclass(frozen=True)
class Attachment:
    """One interface of one container, the unit of CNI."""

    container_id: str
    ifname: str


@dataclass(frozen=True)
class Environment:
    """The CNI_ variables, checked for what the command requires."""

    command: str
    container_id: str = ""
    netns: str = ""
    ifname: str = ""
    args: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class NetConf:
    """The network configuration of one plugin, checked."""

    version: str
    network: str
    pool: str = ""
    mtu: int = 0
    ipv4: str = ""
    ipv6: str = ""
    mac: str = ""
    cgroup_path: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)
    dns: Mapping[str, Any] = field(default_factory=dict)
    # Another plugin of the chain will make an `ingress` qdisc on the host side, as `bandwidth` does.
    ingress_qdisc: bool = False
    previous: Mapping[str, Any] | None = None
    valid_attachments: frozenset[Attachment] | None = None


@dataclass(frozen=True)
class Interface:
    """What ADD made, in the result's terms."""

    host_ifname: str
    host_mac: str
    ifname: str
    mac: str
    netns: str
    mtu: int
    # Addresses without prefix length, empty if the family is absent.
    ipv4: str
    ipv6: str
    gateway4: str
    gateway6: str


def parse_version(text: str) -> Version:
    """CniError 1 for a version nobody published."""
    if text not in VERSIONS:
        raise CniError(
            INCOMPATIBLE_VERSION,
            f"CNI version {text[:40]!r} is not supported",
            f"supported: {', '.join(VERSIONS)}",
        )
    major, minor, patch = text.split(".")
    return int(major), int(minor), int(patch)


def decode(config: bytes) -> dict[str, Any]:
    """Standard input as an object; CniError 6 if it is not one."""
    try:
        value = json.loads(config)
    except (ValueError, RecursionError) as error:
        raise CniError(DECODING_FAILURE, "the network configuration is not JSON", str(error)[:200]) from None
    if not isinstance(value, dict):
        raise CniError(
            DECODING_FAILURE, "the network configuration is not a JSON object", type(value).__name__
        )
    return value


def version_of(config: Mapping[str, Any]) -> str:
    """The configuration's version, as text; it need not be one we support."""
    version = config.get("cniVersion") or "0.1.0"
    if not isinstance(version, str):
        raise CniError(DECODING_FAILURE, "cniVersion is not a string", type(version).__name__)
    return version


def parse_environment(variables: Mapping[str, str]) -> Environment:
    """CniError 4 names every variable that is missing or malformed."""
    command = variables.get("CNI_COMMAND", "")
    if command not in COMMANDS:
        raise CniError(
            INVALID_ENVIRONMENT, f"unknown CNI_COMMAND {command[:40]!r}", f"known: {', '.join(COMMANDS)}"
        )
    required = {
        "ADD": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
        "CHECK": ("CNI_CONTAINERID", "CNI_NETNS", "CNI_IFNAME"),
        "DEL": ("CNI_CONTAINERID", "CNI_IFNAME"),
    }.get(command, ())
    missing = [name for name in required if not variables.get(name)]
    if missing:
        raise CniError(INVALID_ENVIRONMENT, f"required env variables [{','.join(missing)}] missing")
    environment = Environment(
        command,
        variables.get("CNI_CONTAINERID", ""),
        variables.get("CNI_NETNS", ""),
        variables.get("CNI_IFNAME", ""),
        _parse_args(variables.get("CNI_ARGS", "")),
    )
    if required:
        if not _NAME.fullmatch(environment.container_id):
            raise CniError(
                INVALID_ENVIRONMENT,
                "CNI_CONTAINERID is malformed",
                "1 to 128 of [A-Za-z0-9_.-], beginning with a letter or digit",
            )
        name = environment.ifname
        if len(name.encode()) > 15 or name in (".", "..") or re.search(r"[/:\s\0]", name):
            raise CniError(
                INVALID_ENVIRONMENT, "CNI_IFNAME is malformed", "1 to 15 bytes without '/', ':' and blanks"
            )
        if "\0" in environment.netns:
            raise CniError(INVALID_ENVIRONMENT, "CNI_NETNS is malformed")
    return environment


def _parse_args(text: str) -> dict[str, str]:
    """CNI_ARGS, "K=V;K=V". Keys nobody here knows are somebody else's."""
    args: dict[str, str] = {}
    for pair in filter(None, text.split(";")):
        key, equals, value = pair.partition("=")
        if not key or not equals:
            raise CniError(INVALID_ENVIRONMENT, "CNI_ARGS is malformed", f"{pair[:60]!r} is not KEY=VALUE")
        args[key] = value
    return args


def parse_config(config: Mapping[str, Any], environment: Environment) -> NetConf:
    """Check a decoded configuration for a command; DEL and GC accept unknown fields, so that clean-up works.

    CniError 1: the version is not supported or lacks the command; 2: unknown field; 7: anything else.
    """
    version = version_of(config)
    number = parse_version(version)
    command = environment.command
    if command in SINCE and number < SINCE[command]:
        raise CniError(
            INCOMPATIBLE_VERSION,
            f"config version does not allow {command}",
            f"{version} < {'.'.join(map(str, SINCE[command]))}",
        )
    network = _typed(config, "name", str, "")
    if not network:
        raise CniError(INVALID_CONFIG, "missing network name")
    if not _NAME.fullmatch(network):
        raise CniError(INVALID_CONFIG, "the network name is malformed", repr(network[:140]))
    if command == "GC":
        return NetConf(version, network, valid_attachments=_valid_attachments(config))
    if command == "DEL":
        return NetConf(version, network)
    _refuse_unsupported(config)
    runtime = _typed(config, "runtimeConfig", dict, {})
    cni_args = _typed(_typed(config, "args", dict, {}), "cni", dict, {})
    ipv4, ipv6 = _addresses(
        [
            *_strings(runtime, "ips"),
            *_strings(cni_args, "ips"),
            *filter(None, [environment.args.get("IP", "")]),
        ]
    )
    mac = (
        _typed(runtime, "mac", str, "") or _typed(cni_args, "mac", str, "") or environment.args.get("MAC", "")
    )
    if mac and not _MAC.fullmatch(mac):
        raise CniError(INVALID_CONFIG, "the MAC address is malformed", repr(mac[:40]))
    mtu = _typed(config, "mtu", int, 0)
    if isinstance(mtu, bool) or (mtu and not 1280 <= mtu <= 65535):
        raise CniError(INVALID_CONFIG, "mtu is out of bounds", f"{mtu}: 1280 to 65535, or 0 for the uplink's")
    previous = config.get("prevResult")
    if previous is not None and not isinstance(previous, dict):
        raise CniError(INVALID_CONFIG, "prevResult is not an object", type(previous).__name__)
    shaped = _typed(runtime, "bandwidth", dict, {}).get("egressRate")
    return NetConf(
        version,
        network,
        pool=_typed(config, "pool", str, ""),
        mtu=mtu,
        ipv4=ipv4,
        ipv6=ipv6,
        mac=mac.lower(),
        cgroup_path=_typed(runtime, "cgroupPath", str, ""),
        labels=_labels(cni_args),
        dns=_typed(config, "dns", dict, {}),
        ingress_qdisc=bool(shaped) or _typed(config, "ingressQdisc", bool, False),
        previous=previous,
    )


def _refuse_unsupported(config: Mapping[str, Any]) -> None:
    for key, value in config.items():
        # Names with a slash are namespaced ("cni.dev/…"), as the specification reserves them for others.
        if key not in _KEYS and "/" not in key:
            hint = (
                'addresses come from Fibril\'s pools: set "pool"'
                if key == "ipam"
                else f"known: {', '.join(sorted(_KEYS))}"
            )
            raise CniError(
                UNSUPPORTED_FIELD, f"unsupported field {key[:60]!r} = {json.dumps(value)[:99]}", hint
            )
    if config.get("ipMasq") is False:
        raise CniError(
            UNSUPPORTED_FIELD,
            "unsupported field 'ipMasq' = false",
            "masquerading is configured for the node, not for a network",
        )


def _typed(config: Mapping[str, Any], key: str, kind: type[Any], default: Any) -> Any:
    value = config.get(key)
    if value is None:
        return default
    if not isinstance(value, kind):
        raise CniError(
            INVALID_CONFIG, f"{key} has the wrong type", f"{type(value).__name__}, not {kind.__name__}"
        )
    return value


def _strings(config: Mapping[str, Any], key: str) -> list[str]:
    values = _typed(config, key, list, [])
    if not all(isinstance(value, str) for value in values):
        raise CniError(INVALID_CONFIG, f"{key} is not a list of strings")
    return list(values)


def _addresses(wanted: Sequence[str]) -> tuple[str, str]:
    """At most one address a family; a prefix length is allowed and ignored. The same one twice is once."""
    found: dict[int, str] = {}
    for text in wanted:
        try:
            address = ipaddress.ip_interface(text).ip
        except ValueError:
            raise CniError(INVALID_CONFIG, "a requested address is malformed", repr(text[:60])) from None
        if found.setdefault(address.version, str(address)) != str(address):
            raise CniError(
                INVALID_CONFIG,
                f"more than one IPv{address.version} address is requested",
                f"{found[address.version]}, {address}",
            )
    return found.get(4, ""), found.get(6, "")


def _labels(cni_args: Mapping[str, Any]) -> dict[str, str]:
    """args.cni.labels: [{"key": …, "value": …}]."""
    labels: dict[str, str] = {}
    for entry in _typed(cni_args, "labels", list, []):
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("key"), str)
            or not isinstance(entry.get("value", ""), str)
        ):
            raise CniError(
                INVALID_CONFIG, "args.cni.labels is malformed", 'a list of {"key": "", "value": ""}'
            )
        labels[entry["key"]] = entry.get("value", "")
    return labels


def _valid_attachments(config: Mapping[str, Any]) -> frozenset[Attachment]:
    """cni.dev/valid-attachments; its absence is an error, since an empty list means "delete all"."""
    listed = config.get("cni.dev/valid-attachments", config.get("cni.dev/attachments"))
    if not isinstance(listed, list):
        raise CniError(INVALID_CONFIG, "cni.dev/valid-attachments is missing or not a list")
    valid = set()
    for entry in listed:
        if (
            not isinstance(entry, dict)
            or not isinstance(entry.get("containerID"), str)
            or not isinstance(entry.get("ifname"), str)
        ):
            raise CniError(
                INVALID_CONFIG,
                "cni.dev/valid-attachments is malformed",
                'a list of {"containerID": "", "ifname": ""}',
            )
        valid.add(Attachment(entry["containerID"], entry["ifname"]))
    return frozenset(valid)


def pod_name(args: Mapping[str, str]) -> str:
    """ "namespace/name" from CNI_ARGS, as far as given."""
    return "/".join(filter(None, (args.get("K8S_POD_NAMESPACE", ""), args.get("K8S_POD_NAME", ""))))


# ---- results --------------------------------------------------------------------------------------
def render_result(conf: NetConf, made: Interface) -> bytes:
    """ADD's result in the configuration's version, added to prevResult if there is one."""
    number = parse_version(conf.version)
    if number < (0, 3, 0):
        return _encode(_result_020(conf, made))
    return _encode(_result_030(conf, made, number))


def _result_020(conf: NetConf, made: Interface) -> dict[str, Any]:
    result: dict[str, Any] = {"cniVersion": conf.version}
    for key, address, gateway, length, default in _families(made):
        result["ip" + key] = {
            "ip": f"{address}/{length}",
            "gateway": gateway,
            "routes": [{"dst": default, "gw": gateway}],
        }
    result["dns"] = dict(conf.dns)
    return result


def _result_030(conf: NetConf, made: Interface, number: Version) -> dict[str, Any]:
    previous = conf.previous or {}
    interfaces = list(_typed(previous, "interfaces", list, []))
    host: dict[str, Any] = {"name": made.host_ifname, "mac": made.host_mac}
    pod: dict[str, Any] = {"name": made.ifname, "mac": made.mac, "sandbox": made.netns}
    if number >= (1, 1, 0):
        host["mtu"] = pod["mtu"] = made.mtu
    index = len(interfaces) + 1
    interfaces += [host, pod]
    ips = list(_typed(previous, "ips", list, []))
    routes = list(_typed(previous, "routes", list, []))
    for key, address, gateway, length, default in _families(made):
        entry: dict[str, Any] = {"address": f"{address}/{length}", "gateway": gateway, "interface": index}
        if number < (1, 0, 0):
            entry = {"version": key, **entry}
        ips.append(entry)
        routes.append({"dst": default, "gw": gateway})
    return {
        "cniVersion": conf.version,
        "interfaces": interfaces,
        "ips": ips,
        "routes": routes,
        "dns": dict(conf.dns) or _typed(previous, "dns", dict, {}),
    }


def _families(made: Interface) -> list[tuple[str, str, str, int, str]]:
    """(family, address, gateway, prefix length, default route) of each address there is."""
    both = (("4", made.ipv4, made.gateway4, 32, "0.0.0.0/0"), ("6", made.ipv6, made.gateway6, 128, "::/0"))
    return [entry for entry in both if entry[1]]


def differences(conf: NetConf, environment: Environment, made: Interface) -> list[str]:
    """CHECK: how prevResult differs from the interface there is, one sentence each. CniError 7 without it."""
    if conf.previous is None:
        raise CniError(INVALID_CONFIG, "required prevResult missing")
    interfaces = _typed(conf.previous, "interfaces", list, [])
    index, seen = next(
        (
            (number, entry)
            for number, entry in enumerate(interfaces)
            if isinstance(entry, dict) and entry.get("name") == environment.ifname and entry.get("sandbox")
        ),
        (-1, {}),
    )
    if index < 0:
        return [f"prevResult has no interface {environment.ifname} in a sandbox"]
    found = []
    if str(seen.get("mac", "")).lower() not in ("", made.mac.lower()):
        found.append(f"prevResult gives {environment.ifname} the MAC {seen['mac']}, it has {made.mac}")
    listed = set()
    for entry in _typed(conf.previous, "ips", list, []):
        if isinstance(entry, dict) and entry.get("interface") in (None, index):
            try:
                listed.add(str(ipaddress.ip_interface(str(entry.get("address"))).ip))
            except ValueError:
                raise CniError(
                    INVALID_CONFIG, "prevResult holds a malformed address", repr(entry.get("address"))[:80]
                ) from None
    have = {address for address in (made.ipv4, made.ipv6) if address}
    found += [f"{address} of prevResult is not on {environment.ifname}" for address in sorted(listed - have)]
    found += [f"{address} of {environment.ifname} is not in prevResult" for address in sorted(have - listed)]
    return found


def render_versions(version: str) -> bytes:
    """VERSION's answer."""
    return _encode({"cniVersion": version, "supportedVersions": list(VERSIONS)})


def _encode(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value).encode() + b"\n"
