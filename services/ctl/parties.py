"""Whom a word on the command line means: an address, a pod, somebody policy knows; and what is behind a frontend."""

from __future__ import annotations

import ipaddress
from typing import Any, Final

import click

from services.ctl import balancing
from services.ctl.commands import endpoint
from services.ctl.context import Ctl

ENTITIES: Final = (
    "world", "host", "remote-node", "init", "health", "kube-apiserver", "unmanaged",
)  # fmt: skip


def party(text: str, hint: str) -> Any:
    """Somebody, for policy: "endpoint:12", "identity:70000", "app=web,tier=db", an address, an entity, a pod's name."""
    from fibril.policy.v1 import policy_pb2 as pb

    what, _, number = text.partition(":")
    if what in ("endpoint", "identity") and number.isdecimal():
        return pb.Party(endpoint=int(number)) if what == "endpoint" else pb.Party(identity=int(number))
    if text in ENTITIES:
        return pb.Party(entity=pb.Entity.Value("ENTITY_" + text.upper().replace("-", "_")))
    if "=" in text:
        labels = dict(part.split("=", 1) for part in text.split(",") if "=" in part)
        return pb.Party(labels=pb.Labels(labels=labels))
    try:
        return pb.Party(address=str(ipaddress.ip_address(text)))
    except ValueError:
        if not text:
            raise click.BadParameter("nobody is named", param_hint=hint) from None
        return pb.Party(pod=text)


def addresses(ctl: Ctl, who: str) -> dict[int, str]:
    """By IP version: of an address, or of a pod of this node. NotFound."""
    try:
        address = ipaddress.ip_address(who)
    except ValueError:
        found = endpoint.find(ctl, who)
        return {version: found[f"ipv{version}"] for version in (4, 6) if found[f"ipv{version}"]}
    return {address.version: str(address)}


def address(ctl: Ctl, who: str, version: int, field: str) -> str:
    """Of that IP version. NotFound."""
    from services.common.errors import NotFound

    found = addresses(ctl, who)
    if version not in found:
        raise NotFound(f"{who} has no IPv{version} address", field=field)
    return found[version]


def pair(ctl: Ctl, source: str, target: str) -> tuple[str, str]:
    """Addresses of one IP version of two, IPv4 where both have it. NotFound."""
    from services.common.errors import NotFound

    ours, theirs = addresses(ctl, source), addresses(ctl, target)
    for version, one in ours.items():
        if version in theirs:
            return one, theirs[version]
    raise NotFound(f"{source} and {target} have no addresses of one IP version", field="destination")


def place(text: str, hint: str) -> tuple[str, int]:
    """ "10.0.0.1:80", "[fd00::1]:80", "pod:80", or without the port."""
    who, port = text, "0"
    if text.startswith("["):
        who, _, port = text[1:].partition("]")
        port = port.removeprefix(":") or "0"
    elif text.count(":") == 1:
        who, port = text.split(":")
    if not who or not balancing.is_number(port):
        raise click.BadParameter(
            f"{text!r} is no place; write 10.0.0.1:80, [fd00::1]:80 or POD:80", param_hint=hint
        )
    return who, int(port)


def behind(ctl: Ctl, where: str, port: int, protocol: str) -> str:
    """One sentence, if that is a service's frontend on this node: policy never sees it, but the backend. Else "".

    Also "" without the lb service: then nothing is known of frontends.
    """
    from fibril.lb.v1 import lb_pb2 as pb
    from services.common.errors import FibrilError

    number = dict(pb.Protocol.items()).get(f"PROTOCOL_{protocol.upper()}")
    if not port or number is None:
        return ""
    request = pb.TraceServiceRequest(client=where, address=where, port=port, protocol=number)
    try:
        answer = balancing.ask(ctl, "TraceService", request)
    except FibrilError:
        return ""
    if not answer.service:
        return ""
    backends = [answer.backend] if answer.HasField("backend") else list(answer.candidates)
    shown = [balancing.shown_endpoint(each.address, each.port) for each in backends[:3]]
    asked = f"its backends instead, such as {' and '.join(shown)}" if shown else "its backends instead"
    return f"{balancing.shown_endpoint(where, port)} is a frontend of {answer.service}: policy is asked about {asked}"
