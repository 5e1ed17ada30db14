"""`fibril endpoint`: the pod interfaces of a node."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from services.ctl.context import Ctl, completed, pages, pass_ctl
from services.ctl.render import age, columns, short, to_record

ENDPOINTS = columns(
    "id",
    ("POD", lambda r: r["pod"] or r["container_id"][:13]),
    "ifname",
    "ipv4",
    "ipv6",
    "host_ifname",
    "identity",
    ("STATE", lambda r: short(r["state"], "ENDPOINT_STATE_")),
    ("AGE", lambda r: age(r["created_unix_seconds"])),
    "message",
)
CHANGES = columns(
    ("CHANGE", lambda r: short(r["kind"], "WATCH_KIND_")),
    ("ID", "endpoint.id"),
    ("POD", lambda r: _name(r.get("endpoint", {}))),
    ("IPV4", "endpoint.ipv4"),
    ("IPV6", "endpoint.ipv6"),
    ("STATE", lambda r: short(r.get("endpoint", {}).get("state", ""), "ENDPOINT_STATE_")),
    "revision",
)
DIFFERENCES = columns("endpoint", "difference")


def _name(record: Mapping[str, Any]) -> str:
    return str(record.get("pod") or record.get("container_id", ""))


def stub(channel: Any) -> Any:
    """A stub of EndpointService."""
    from fibril.endpoint.v1 import endpoint_pb2_grpc

    return endpoint_pb2_grpc.EndpointServiceStub(channel)


def list_all(ctl: Ctl) -> list[dict[str, Any]]:
    """Every endpoint of the node, sorted by id."""

    async def use(channel: Any) -> list[Any]:
        from fibril.endpoint.v1 import endpoint_pb2

        return await pages(
            lambda page: stub(channel).ListEndpoints(
                endpoint_pb2.ListEndpointsRequest(page=page), timeout=ctl.seconds
            ),
            "endpoints",
        )

    return [to_record(e) for e in ctl.call(use)]


def find(ctl: Ctl, what: str) -> dict[str, Any]:
    """The endpoint called `what`: its number, address, pod name, container id or container id/interface.

    Raises NotFound."""
    import ipaddress

    from fibril.endpoint.v1 import endpoint_pb2
    from services.common.errors import NotFound

    request = endpoint_pb2.GetEndpointRequest()
    if what.isdigit():
        request.id = int(what)
    else:
        try:
            request.address = str(ipaddress.ip_address(what))
        except ValueError:
            container, _, ifname = what.partition("/")
            named = [
                e
                for e in list_all(ctl)
                if what in (e["pod"], e["container_id"])
                or (container == e["container_id"] and ifname == e["ifname"])
            ]
            if not named:
                raise NotFound(f"there is no endpoint {what!r}", fix="see: fibril endpoint ls") from None
            return named[0]
    return to_record(ctl.call(lambda ch: stub(ch).GetEndpoint(request, timeout=ctl.seconds)).endpoint)


def complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Pods, or containers that are none."""
    return completed(ctx, incomplete, lambda ctl: [_name(e) for e in list_all(ctl)])


@click.group(short_help="Pod interfaces of the node.")
def command() -> None:
    """Pod interfaces of the node."""


@command.command("ls")
@pass_ctl
def ls(ctl: Ctl) -> None:
    """List the endpoints."""
    ctl.show(list_all(ctl), ENDPOINTS, "no endpoints")


@command.command("get")
@click.argument("what", shell_complete=complete)
@pass_ctl
def get(ctl: Ctl, what: str) -> None:
    """Show one endpoint, by number, address, pod, container id or container id/interface."""
    ctl.describe(find(ctl, what))


@command.command("label")
@click.argument("what", shell_complete=complete)
@click.argument("changes", nargs=-1, required=True, metavar="KEY=VALUE… KEY-…")
@pass_ctl
def label(ctl: Ctl, what: str, changes: Sequence[str]) -> None:
    """Set labels of an endpoint (KEY=VALUE) or take them away (KEY-); the others stay. Its identity follows."""
    from fibril.endpoint.v1 import endpoint_pb2

    found = find(ctl, what)
    request = endpoint_pb2.SetEndpointLabelsRequest(
        key=endpoint_pb2.EndpointKey(container_id=found["container_id"], ifname=found["ifname"]),
        labels=merged(found["labels"], changes),
    )
    answer = ctl.call(lambda ch: stub(ch).SetEndpointLabels(request, timeout=ctl.seconds))
    ctl.describe(to_record(answer.endpoint))


def merged(labels: Mapping[str, str], changes: Sequence[str]) -> dict[str, str]:
    """Labels after some changes: "key=value" sets one, "key-" takes one away. Raises InvalidArgument."""
    from services.common.errors import InvalidArgument

    result = dict(labels)
    for change in changes:
        key, equals, value = change.partition("=")
        if equals and key:
            result[key] = value
        elif not equals and change.endswith("-") and change != "-":
            result.pop(change[:-1], None)
        else:
            raise InvalidArgument(f"{change!r} is neither KEY=VALUE nor KEY-", field="changes")
    return result


@command.command("check")
@click.argument("what", required=False, shell_complete=complete)
@pass_ctl
def check(ctl: Ctl, what: str | None) -> int:
    """Compare an endpoint (by default all) with the kernel; exit code 1 when something differs."""
    from fibril.endpoint.v1 import endpoint_pb2

    found = [find(ctl, what)] if what else list_all(ctl)

    async def use(channel: Any) -> list[dict[str, str]]:
        rows = []
        for endpoint in found:
            key = endpoint_pb2.EndpointKey(container_id=endpoint["container_id"], ifname=endpoint["ifname"])
            answer = await stub(channel).CheckEndpoint(
                endpoint_pb2.CheckEndpointRequest(key=key), timeout=ctl.seconds
            )
            rows += [{"endpoint": _name(endpoint), "difference": text} for text in answer.differences]
        return rows

    differences = ctl.call(use)
    ctl.show(differences, DIFFERENCES, f"{len(found)} checked, no difference")
    return int(bool(differences))


@command.command("watch")
@pass_ctl
def watch(ctl: Ctl) -> None:
    """Show endpoints as they come, change and go, until interrupted."""
    from fibril.endpoint.v1 import endpoint_pb2

    live = ctl.live(CHANGES, (8, 6, 24, 15, 26, 10, 0))
    ctl.stream(
        lambda ch: stub(ch).WatchEndpoints(endpoint_pb2.WatchEndpointsRequest()),
        lambda message: live.put(to_record(message)),
    )
