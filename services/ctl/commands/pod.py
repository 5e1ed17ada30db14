"""`fibril pod`: pods made of a network namespace and a cgroup, without any container runtime."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click

from services.ctl.context import EXEC_SETTINGS, Ctl, pass_ctl, words
from services.ctl.render import age, columns, short

PODS = columns(
    "name",
    "ipv4",
    "ipv6",
    ("STATE", lambda r: short(r["state"], "ENDPOINT_STATE_")),
    "netns",
    ("AGE", lambda r: age(r["created_unix_seconds"])),
    "message",
)
DETACHED = {
    "ipv4": "",
    "ipv6": "",
    "state": "",
    "created_unix_seconds": 0.0,
    "message": "has no endpoint; remove it",
}


def _complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Names of the pods there are."""
    from services.ctl import pods

    ctl = ctx.find_object(Ctl)
    return [n for n in pods.names(ctl.instance) if n.startswith(incomplete)] if ctl is not None else []


@click.group(short_help="Pods without a container runtime.")
def command() -> None:
    """Pods without a container runtime: a network namespace and a cgroup each."""


@command.command("add")
@click.argument("name")
@click.option("--pool", default="", help='Address pool; by default "default".')
@click.option("--ip", "addresses", multiple=True, metavar="ADDRESS", help="This very address; once a family.")
@click.option("--mtu", type=click.IntRange(1280, 65535), help="MTU in bytes; by default the uplink's.")
@click.option(
    "--label", "labels", multiple=True, metavar="KEY=VALUE", help="A label; give it again for more."
)
@pass_ctl
def add(
    ctl: Ctl, name: str, pool: str, addresses: Sequence[str], mtu: int | None, labels: Sequence[str]
) -> None:
    """Make pod NAME and wire it; one that exists already is left as it is."""
    from fibril.endpoint.v1 import endpoint_pb2
    from services.ctl import pods
    from services.ctl.commands.endpoint import stub
    from services.ctl.render import to_record

    instance = ctl.instance
    new = pods.check_name(name) not in pods.names(instance)
    ipv4, ipv6 = _by_family(addresses)
    request = endpoint_pb2.CreateEndpointRequest(
        container_id=pods.container_id(name),
        ifname="eth0",
        netns=str(pods.netns_path(instance, name)),
        pool=pool,
        ipv4=ipv4,
        ipv6=ipv6,
        mtu=mtu or 0,
        pod=name,
        labels=pods.labels(labels),
        cgroup_path="/" + pods.cgroup(instance, name),
    )

    async def create(channel: Any) -> Any:
        # The channel is there, so the node runs: only now something is made that may have to be undone.
        try:
            pods.create(instance, name)
            return (await stub(channel).CreateEndpoint(request, timeout=ctl.seconds)).endpoint
        except BaseException:
            if new:
                await pods.remove(instance, name)
            raise

    endpoint = ctl.call(create)
    ctl.show(_row(name, to_record(endpoint)), PODS)


def _by_family(addresses: Sequence[str]) -> tuple[str, str]:
    import ipaddress

    from services.common.errors import InvalidArgument

    found = {4: "", 6: ""}
    for text in addresses:
        try:
            version = ipaddress.ip_address(text).version
        except ValueError:
            raise InvalidArgument(f"{text!r} is not an IP address", field="ip") from None
        if found[version]:
            raise InvalidArgument(
                f"two IPv{version} addresses are given: {found[version]} and {text}",
                field="ip",
                fix="give one of each family at most",
            )
        found[version] = text
    return found[4], found[6]


def _row(name: str, endpoint: dict[str, Any]) -> dict[str, Any]:
    return {"name": name, **endpoint}


@command.command("ls")
@pass_ctl
def ls(ctl: Ctl) -> None:
    """List the pods made by `fibril pod add`."""
    from services.ctl import pods
    from services.ctl.commands.endpoint import list_all

    by_name = {pods.pod_of(e["container_id"]): e for e in list_all(ctl)}
    names = sorted({*(n for n in by_name if n is not None), *pods.names(ctl.instance)})
    ctl.show(
        [
            _row(n, by_name.get(n) or {**DETACHED, "netns": str(pods.netns_path(ctl.instance, n))})
            for n in names
        ],
        PODS,
        "no pods; make one with: fibril pod add NAME",
    )


@command.command("exec", context_settings=EXEC_SETTINGS)
@click.argument("name", shell_complete=_complete)
@click.argument("argv", nargs=-1, type=click.UNPROCESSED)
@pass_ctl
def exec_(ctl: Ctl, name: str, argv: tuple[str, ...]) -> None:
    """Run a command in pod NAME (by default a shell), with this terminal; its exit code becomes ours."""
    from services.ctl import pods

    pods.execute(ctl.instance, name, words(argv))


@command.command("rm")
@click.argument("names", nargs=-1, required=True, shell_complete=_complete)
@pass_ctl
def rm(ctl: Ctl, names: Sequence[str]) -> None:
    """End and remove pods; one that is not there counts as removed."""
    from fibril.endpoint.v1 import endpoint_pb2
    from services.ctl import pods
    from services.ctl.commands.endpoint import stub

    async def delete(channel: Any) -> None:
        for name in names:
            pods.check_name(name)
            request = endpoint_pb2.DeleteEndpointRequest(container_id=pods.container_id(name))
            await stub(channel).DeleteEndpoint(request, timeout=ctl.seconds)
            await pods.remove(ctl.instance, name)

    ctl.call(delete)
