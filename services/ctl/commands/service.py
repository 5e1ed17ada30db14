"""`fibril service`: what is reached under which address."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import click

from services.ctl import balancing, parties
from services.ctl.commands import endpoint
from services.ctl.commands.backend import BACKENDS
from services.ctl.context import Ctl, pass_ctl
from services.ctl.render import columns, short, to_record

if TYPE_CHECKING:
    from fibril.lb.v1 import lb_pb2 as pb
    from services.common.errors import FibrilError

AT_ONCE = 64
"""Services that `apply` writes at a time."""


def _frontends(record: Mapping[str, Any]) -> str:
    return ",".join(
        f"{balancing.shown_endpoint(f['address'], f['port'], f['port_last'])}/{short(f['protocol'], 'PROTOCOL_')}"
        for f in record.get("frontends", ())
    )


def _summary(record: Mapping[str, Any]) -> dict[str, Any]:
    """What is said of the service itself, without what is not set."""
    shown = {field: value for field, value in record.items() if field not in ("frontends", "backends", "status")}
    for field, prefix in ENUMS.items():
        shown[field] = "" if shown[field].endswith("_UNSPECIFIED") else short(shown[field], prefix)
    status = record["status"]
    shown |= {"status": _status(record)} | {each: status[each] for each in ("inside", "outside", "connections")}
    return {field: value for field, value in shown.items() if value or field in ("inside", "outside", "connections")}


def _status(record: Mapping[str, Any]) -> str:
    status = record.get("status") or {}
    return "ok" if status.get("programmed") else str(status.get("problem") or "pending")


ENUMS = {
    "algorithm": "ALGORITHM_",
    "internal_traffic_policy": "TRAFFIC_POLICY_",
    "external_traffic_policy": "TRAFFIC_POLICY_",
    "topology": "TOPOLOGY_",
    "forwarding": "FORWARDING_",
    "no_backend": "NO_BACKEND_",
}
SERVICES = columns(
    "name",
    ("FRONTENDS", _frontends),
    ("ALGORITHM", lambda r: short(r["algorithm"], "ALGORITHM_")),
    ("INSIDE", "status.inside"),
    ("OUTSIDE", "status.outside"),
    ("CONNECTIONS", "status.connections"),
    ("STATUS", _status),
)
FRONTENDS = columns(
    (
        "FRONTEND",
        lambda r: f"{balancing.shown_endpoint(r['address'], r['port'], r['port_last'])}/{short(r['protocol'], 'PROTOCOL_')}",
    ),
    ("TYPE", lambda r: short(r["type"], "FRONTEND_TYPE_")),
    "node",
)
APPLIED = columns("name", "result", "backends")
CHANGES = columns(
    ("CHANGE", lambda r: short(r["kind"], "WATCH_KIND_")),
    ("NAME", "service.name"),
    ("FRONTENDS", lambda r: _frontends(r.get("service", {}))),
    ("INSIDE", "service.status.inside"),
    ("STATUS", lambda r: _status(r.get("service", {}))),
    "revision",
)


@click.group(short_help="Services: one address for many backends.")
def command() -> None:
    """Services: addresses and ports behind which backends share the connections."""


@command.command("apply")
@click.option(
    "-f",
    "--file",
    "files",
    multiple=True,
    required=True,
    metavar="FILE",
    help="YAML or JSON; - reads standard input.",
)
@click.option("--dry-run", is_flag=True, help="Only say what would change.")
@pass_ctl
def apply(ctl: Ctl, files: Sequence[str], dry_run: bool) -> None:
    """Have the services of a file: Kubernetes' Service, EndpointSlice and Endpoints, or Fibril's own form.

    Backends come from EndpointSlices. A slice applied alone replaces its own backends and no others; ports that a Service
    has no more are removed. What is wrong in the file is refused before anything is changed.
    """
    from services.lb import kubernetes

    parsed = kubernetes.parse(balancing.read(files))
    for note in parsed.notes:
        click.echo(f"left out: {note}", err=True)
    refused: dict[str, FibrilError] = {}

    async def use(channel: Any) -> list[dict[str, Any]]:
        stored = await _stored(ctl, channel, parsed)
        wanted = kubernetes.merge(parsed, stored)
        _check(wanted)
        done = {name: await _remove(ctl, channel, name, dry_run) for name in kubernetes.gone(parsed, stored)}
        left = sorted(wanted)
        while left:
            written = [wanted[name] for name in left]
            for record in await _write(ctl, channel, written, stored, dry_run, refused):
                done[record["name"]] = record
            # One that has given an address up may have been in another's way.
            again = [name for name in left if name in refused]
            left = again if len(again) < len(left) else []
        return [done[name] for name in sorted(done)]

    ctl.show(ctl.call(use, balancing.SERVICE), APPLIED, "nothing to apply")
    if refused:
        name, error = min(refused.items())
        more = f", and {len(refused) - 1} more were refused" if len(refused) > 1 else ""
        raise type(error)(f"{name}: {error.message}{more}", field=error.field, fix=error.fix)


def _check(wanted: Mapping[str, pb.Service]) -> None:
    """InvalidArgument that names the service and the field."""
    from services.common.errors import InvalidArgument
    from services.lb import convert

    for name, service in wanted.items():
        try:
            convert.service(service)
        except InvalidArgument as error:
            raise InvalidArgument(
                f"{name[:253]}: {error.message}", field=error.field, fix=error.fix
            ) from None


async def _stored(ctl: Ctl, channel: Any, parsed: Any) -> dict[str, pb.Service]:
    """What there is of all that a file may concern."""
    import asyncio

    prefixes = {f"{name}:" for name in (*parsed.objects, *(each.service for each in parsed.slices))} | set(
        parsed.own
    )
    if len(prefixes) > AT_ONCE:
        found = await balancing.fetch(ctl, channel)
    else:
        lists = await asyncio.gather(*(balancing.fetch(ctl, channel, prefix) for prefix in prefixes))
        found = [each for several in lists for each in several]
    return {each.name: each for each in found}


async def _remove(ctl: Ctl, channel: Any, name: str, dry_run: bool) -> dict[str, Any]:
    import grpc

    from fibril.lb.v1 import lb_pb2

    if not dry_run:
        try:
            await balancing.stub(channel).DeleteService(
                lb_pb2.DeleteServiceRequest(name=name), timeout=ctl.seconds
            )
        except grpc.aio.AioRpcError as error:
            if error.code() is not grpc.StatusCode.NOT_FOUND:
                raise
    return {"name": name, "result": "would be removed" if dry_run else "removed", "backends": 0}


async def _write(
    ctl: Ctl,
    channel: Any,
    services: Sequence[pb.Service],
    stored: Mapping[str, pb.Service],
    dry_run: bool,
    refused: dict[str, FibrilError],
) -> list[dict[str, Any]]:
    """Upsert these; `refused` is what of them another service is in the way of."""
    import asyncio

    import grpc

    from fibril.lb.v1 import lb_pb2
    from services.common.errors import AlreadyExists
    from services.common.rpc.status import from_rpc_error

    room = asyncio.Semaphore(AT_ONCE)

    async def one(service: pb.Service) -> str:
        before = stored.get(service.name)
        if dry_run:
            return "would be created" if before is None else "would be written"
        refused.pop(service.name, None)
        try:
            async with room:
                answer = await balancing.stub(channel).UpsertService(
                    lb_pb2.UpsertServiceRequest(service=service), timeout=ctl.seconds
                )
        except grpc.aio.AioRpcError as failure:
            error = from_rpc_error(failure)
            if not isinstance(error, AlreadyExists):
                raise
            refused[service.name] = error
            return "refused"
        same = before is not None and answer.service.revision == before.revision
        return "created" if answer.created else "unchanged" if same else "changed"

    results = await asyncio.gather(*map(one, services))
    return [
        {"name": service.name, "result": result, "backends": len(service.backends)}
        for service, result in zip(services, results, strict=True)
    ]


@command.command("add")
@click.argument("name")
@click.option(
    "--vip",
    "vips",
    multiple=True,
    metavar="ADDRESS:PORT[/PROTOCOL]",
    help="Address in the cluster; again for more.",
)
@click.option(
    "--external",
    "externals",
    multiple=True,
    metavar="ADDRESS:PORT[/PROTOCOL]",
    help="Address that others route to the nodes.",
)
@click.option(
    "--node-port", "node_ports", multiple=True, metavar="PORT[/PROTOCOL]", help="Port of every node."
)
@click.option(
    "--backend",
    "backends",
    multiple=True,
    metavar="ADDRESS:PORT[=WEIGHT]",
    help="Who serves; again for more.",
)
@click.option(
    "--algorithm", type=click.Choice(("random", "maglev")), help="By default maglev if reached from outside."
)
@click.option(
    "--affinity", type=click.IntRange(1, 86400), metavar="SECONDS", help="A client stays with its backend."
)
@click.option(
    "--local",
    "local",
    is_flag=True,
    help="From outside: only backends of the node, which see the client's address.",
)
@click.option(
    "--forwarding",
    type=click.Choice(("snat", "dsr", "hybrid")),
    help="From outside to other nodes' backends.",
)
@click.option(
    "--source",
    "sources",
    multiple=True,
    metavar="PREFIX",
    help="Clients outside must come from it; again for more.",
)
@pass_ctl
def add(
    ctl: Ctl,
    name: str,
    vips: Sequence[str],
    externals: Sequence[str],
    node_ports: Sequence[str],
    backends: Sequence[str],
    algorithm: str | None,
    affinity: int | None,
    local: bool,
    forwarding: str | None,
    sources: Sequence[str],
) -> None:
    """Declare a service, or replace the one of that name. `apply -f` knows more options."""
    from fibril.lb.v1 import lb_pb2

    service = lb_pb2.Service(name=name, affinity_timeout_s=affinity or 0, source_ranges=sources)
    for texts, kind in (
        (vips, lb_pb2.FRONTEND_TYPE_CLUSTER_IP),
        (externals, lb_pb2.FRONTEND_TYPE_EXTERNAL_IP),
    ):
        for text in texts:
            where, protocol = balancing.with_protocol(text, "vip")
            address, port = balancing.endpoint(where, "vip")
            service.frontends.add(
                type=kind, address=address, port=port, protocol=lb_pb2.Protocol.ValueType(protocol)
            )
    for text in node_ports:
        number, protocol = balancing.with_protocol(text, "node-port")
        if not balancing.is_number(number):
            raise click.BadParameter(f"{number!r} is no port", param_hint="--node-port")
        service.frontends.add(
            type=lb_pb2.FRONTEND_TYPE_NODE_PORT,
            port=int(number),
            protocol=lb_pb2.Protocol.ValueType(protocol),
        )
    for text in backends:
        service.backends.append(balancing.backend(text))
    if algorithm:
        service.algorithm = lb_pb2.Algorithm.Value(f"ALGORITHM_{algorithm.upper()}")
    if forwarding:
        service.forwarding = lb_pb2.Forwarding.Value(f"FORWARDING_{forwarding.upper()}")
    if local:
        service.external_traffic_policy = lb_pb2.TRAFFIC_POLICY_LOCAL
    answer = balancing.ask(ctl, "UpsertService", lb_pb2.UpsertServiceRequest(service=service))
    result = "created" if answer.created else "declared"
    ctl.show([{"name": name, "result": result, "backends": len(answer.service.backends)}], APPLIED)


@command.command("ls")
@click.argument("prefix", default="", shell_complete=balancing.complete_service)
@pass_ctl
def ls(ctl: Ctl, prefix: str) -> None:
    """List services, or those whose names begin so."""
    found = balancing.services(ctl, prefix, backends=ctl.output != "table")
    ctl.show([to_record(each) for each in found], SERVICES, "no services")


@command.command("get")
@click.argument("name", shell_complete=balancing.complete_service)
@pass_ctl
def get(ctl: Ctl, name: str) -> None:
    """Show a service as declared and as this node serves it; all its fields with -o yaml."""
    from fibril.lb.v1 import lb_pb2

    found = to_record(balancing.ask(ctl, "GetService", lb_pb2.GetServiceRequest(name=name)).service)
    if ctl.output != "table":
        ctl.describe(found)
        return
    ctl.describe(_summary(found))
    ctl.show(found["frontends"], FRONTENDS, "no frontends")
    ctl.show([{**backend, "service": name} for backend in found["backends"]], BACKENDS, "no backends")


@command.command("rm")
@click.argument("names", nargs=-1, required=True, shell_complete=balancing.complete_service)
@pass_ctl
def rm(ctl: Ctl, names: Sequence[str]) -> None:
    """Remove services. Their connections are closed."""
    from fibril.lb.v1 import lb_pb2

    for name in names:
        balancing.ask(ctl, "DeleteService", lb_pb2.DeleteServiceRequest(name=name))
        click.echo(f"removed {name}", err=True)


@command.command("watch")
@pass_ctl
def watch(ctl: Ctl) -> None:
    """Show services as they come, change and go, until interrupted."""
    from fibril.lb.v1 import lb_pb2

    live = ctl.live(CHANGES, (8, 24, 32, 6, 12, 0))
    ctl.stream(
        lambda ch: balancing.stub(ch).WatchServices(lb_pb2.WatchServicesRequest()),
        lambda message: live.put(to_record(message)),
        balancing.SERVICE,
    )


@command.command("trace")
@click.argument("client", metavar="CLIENT[:PORT]", shell_complete=endpoint.complete)
@click.argument("to", metavar="VIP:PORT[/PROTOCOL]")
@pass_ctl
def trace(ctl: Ctl, client: str, to: str) -> None:
    """Explain what this node does with a connection: which backend, by which rule, what is translated.

    CLIENT is an address, or a pod of this node.
    """
    from fibril.lb.v1 import lb_pb2

    where, protocol = balancing.with_protocol(to, "to")
    address, port = balancing.endpoint(where, "to")
    bare = (client.count(":") > 1 and not client.startswith("[")) or ":" not in client
    who, source_port = (client, 0) if bare else balancing.endpoint(client, "client")
    source = parties.address(ctl, who, 6 if ":" in address else 4, "client")
    answer = balancing.ask(
        ctl,
        "TraceService",
        lb_pb2.TraceServiceRequest(
            client=source,
            client_port=source_port,
            address=address,
            port=port,
            protocol=lb_pb2.Protocol.ValueType(protocol),
        ),
    )
    if ctl.output != "table":
        ctl.describe(to_record(answer))
        return
    for number, step in enumerate(answer.steps, 1):
        click.echo(f"{number:2}. {step}")
    for backend in answer.candidates:
        click.echo(f"    it may be {balancing.shown_endpoint(backend.address, backend.port)}")
