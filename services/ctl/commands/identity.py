"""`fibril identity`: which numbers stand for which labels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import click

from services.ctl.context import Ctl, completed, pages, pass_ctl
from services.ctl.render import columns, short, to_record

SERVICE = "identity"
SCOPES = ("reserved", "cluster", "local")


def _labels(record: Mapping[str, Any]) -> object:
    return record.get("labels", {})


IDENTITIES = columns("number", ("SCOPE", lambda r: short(r["scope"], "IDENTITY_SCOPE_")), ("LABELS", _labels))
CHANGES = columns(
    ("CHANGE", lambda r: short(r["kind"], "WATCH_KIND_")),
    ("NUMBER", "identity.number"),
    ("SCOPE", lambda r: short(r.get("identity", {}).get("scope", ""), "IDENTITY_SCOPE_")),
    ("LABELS", lambda r: _labels(r.get("identity", {}))),
    "revision",
)


def stub(channel: Any) -> Any:
    """A stub of IdentityService."""
    from fibril.identity.v1 import identity_pb2_grpc

    return identity_pb2_grpc.IdentityServiceStub(channel)


def _ask(ctl: Ctl, method: str, request: Any) -> Any:
    return ctl.call(lambda ch: getattr(stub(ch), method)(request, timeout=ctl.seconds), SERVICE)


def list_all(ctl: Ctl, labels: Mapping[str, str] | None = None, scope: str = "") -> list[dict[str, Any]]:
    """Every identity with these labels, sorted by number."""
    from fibril.identity.v1 import identity_pb2

    wanted = identity_pb2.IdentityScope.Value(f"IDENTITY_SCOPE_{(scope or 'unspecified').upper()}")

    async def use(channel: Any) -> list[Any]:
        return await pages(
            lambda page: stub(channel).ListIdentities(
                identity_pb2.ListIdentitiesRequest(page=page, labels=labels, scope=wanted),
                timeout=ctl.seconds,
            ),
            "identities",
        )

    return [to_record(i) for i in ctl.call(use, SERVICE)]


def _complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Numbers of the identities there are."""
    return completed(ctx, incomplete, lambda ctl: [str(i["number"]) for i in list_all(ctl)])


@click.group(short_help="Numbers that stand for labels.")
def command() -> None:
    """Identities: the numbers that stand for label sets, the same on every node."""


@command.command("ls")
@click.option(
    "--label", "labels", multiple=True, metavar="KEY=VALUE", help="Only with this label; again for more."
)
@click.option("--scope", type=click.Choice(SCOPES), help="Only those known everywhere, in the cluster, here.")
@pass_ctl
def ls(ctl: Ctl, labels: Sequence[str], scope: str | None) -> None:
    """List identities."""
    from services.ctl import pods

    ctl.show(list_all(ctl, pods.labels(labels), scope or ""), IDENTITIES, "no identities")


@command.command("get")
@click.argument("number", type=click.IntRange(0, 0xFFFF_FFFF), shell_complete=_complete)
@pass_ctl
def get(ctl: Ctl, number: int) -> None:
    """Show what a number stands for."""
    from fibril.identity.v1 import identity_pb2

    answer = _ask(ctl, "GetIdentity", identity_pb2.GetIdentityRequest(number=number))
    ctl.describe(to_record(answer.identity))


@command.command("resolve")
@click.argument("labels", nargs=-1, required=True, metavar="KEY=VALUE…")
@pass_ctl
def resolve(ctl: Ctl, labels: Sequence[str]) -> None:
    """Show the number of a label set; none is made."""
    from fibril.identity.v1 import identity_pb2
    from services.ctl import pods

    answer = _ask(ctl, "ResolveIdentity", identity_pb2.ResolveIdentityRequest(labels=pods.labels(labels)))
    ctl.describe(to_record(answer.identity))


@command.command("watch")
@pass_ctl
def watch(ctl: Ctl) -> None:
    """Show identities as they come, change and go, until interrupted."""
    from fibril.identity.v1 import identity_pb2

    live = ctl.live(CHANGES, (8, 10, 8, 40, 0))
    ctl.stream(
        lambda ch: stub(ch).WatchIdentities(identity_pb2.WatchIdentitiesRequest()),
        lambda message: live.put(to_record(message)),
        SERVICE,
    )


@command.command("usage")
@pass_ctl
def usage(ctl: Ctl) -> None:
    """Show how much of the cluster's numbers is used."""
    from fibril.identity.v1 import identity_pb2

    ctl.describe(to_record(_ask(ctl, "GetUsage", identity_pb2.GetUsageRequest())))
