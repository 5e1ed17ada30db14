"""`fibril tls`: what processes of chosen pods say over TLS."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any, Final

import click

from services.ctl.context import Ctl, completed, pass_ctl
from services.ctl.render import Record, columns, to_record

SERVICE: Final = "sockaccel"


def stub(channel: Any) -> Any:
    """A stub of TlsService."""
    from fibril.tls.v1 import tls_pb2_grpc

    return tls_pb2_grpc.TlsServiceStub(channel)


def ask(ctl: Ctl, method: str, request: Any) -> Any:
    """The answer to one call."""
    return ctl.call(lambda channel: getattr(stub(channel), method)(request, timeout=ctl.seconds), SERVICE)


def _what(record: Record) -> str:
    if record["status"]:
        return f"{record['version']} {record['status']}"
    return f"{record['method']} {record['path']}"


def _headers(record: Record) -> str:
    return "; ".join(f"{name}: {value}" for name, value in sorted(record["headers"].items()))


TARGETS = columns(
    "name",
    ("PODS", "pods"),
    ("LABELS", "labels"),
    ("HEADERS", "headers"),
    ("QUERY", "query"),
    ("KERNEL PORTS", "kernel_ports"),
)
PROBES = columns(
    "path",
    "library",
    ("FUNCTIONS", lambda r: len(r["functions"])),
    ("PODS", "pods"),
    ("PROCESSES", lambda r: len(r["processes"])),
    ("", "problem"),
)
MESSAGES = columns(
    ("TIME", lambda r: time.strftime("%H:%M:%S", time.localtime(r["unix_seconds"]))),
    "pod",
    ("PROCESS", lambda r: f"{r['comm']}/{r['pid']}"),
    ("SESSION", lambda r: f"{r['session']:08x}"),
    ("", lambda r: "read" if r["received"] else "wrote"),
    ("", lambda r: "kernel" if r["kernel"] else ""),
    ("MESSAGE", _what),
    ("HEADERS", _headers),
)


def targets(ctl: Ctl) -> list[Record]:
    """All targets, as records."""
    from fibril.tls.v1 import tls_pb2 as pb

    return [to_record(each) for each in ask(ctl, "ListTargets", pb.ListTargetsRequest()).targets]


def complete_target(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Names of targets."""
    return completed(ctx, incomplete, lambda ctl: [each["name"] for each in targets(ctl)])


@click.group(short_help="See request and status lines of HTTPS.")
def command() -> None:
    """Request lines and status lines of HTTP/1 over TLS, seen where processes of chosen pods call their TLS library, or where
    the kernel encrypts for them.

    Off until a target names pods. What is seen is kept in memory only; values of headers that are not named are never kept.
    """


@command.group("target")
def targets_group() -> None:
    """Whose TLS is looked into."""


@targets_group.command("ls")
@pass_ctl
def target_ls(ctl: Ctl) -> None:
    """List targets."""
    ctl.show(targets(ctl), TARGETS, "no targets: nothing is looked into")


@targets_group.command("set")
@click.argument("name", shell_complete=complete_target)
@click.option("--pod", "pods", multiple=True, help="A pod's name; again for more.")
@click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Pods with this label, with all that are given.")
@click.option("--header", "headers", multiple=True, help="Show this header; again for more. Credentials are refused.")
@click.option("--query", is_flag=True, help='Show what follows "?" in paths.')
@click.option(
    "--kernel-port",
    "kernel_ports",
    type=click.IntRange(1, 65535),
    multiple=True,
    help="A server's port of connections whose TLS the kernel may do (kTLS); again for more.",
)
@pass_ctl
def target_set(
    ctl: Ctl,
    name: str,
    pods: Sequence[str],
    labels: Sequence[str],
    headers: Sequence[str],
    query: bool,
    kernel_ports: Sequence[int],
) -> None:
    """Declare a target, or replace the one of that name."""
    from fibril.tls.v1 import tls_pb2 as pb

    pairs = [each.partition("=") for each in labels]
    for text, sign, _ in pairs:
        if not sign:
            raise click.BadParameter(f"{text!r}: write KEY=VALUE", param_hint="--label")
    target = pb.Target(
        name=name,
        pods=pods,
        labels={key: value for key, _, value in pairs},
        headers=headers,
        query=query,
        kernel_ports=kernel_ports,
    )
    ctl.show([to_record(ask(ctl, "UpsertTarget", pb.UpsertTargetRequest(target=target)).target)], TARGETS)


@targets_group.command("rm")
@click.argument("name", shell_complete=complete_target)
@pass_ctl
def target_rm(ctl: Ctl, name: str) -> None:
    """Remove a target, and the probes only it needed."""
    from fibril.tls.v1 import tls_pb2 as pb

    ask(ctl, "DeleteTarget", pb.DeleteTargetRequest(name=name))
    ctl.describe({"deleted": name})


@command.command("probes")
@pass_ctl
def probes(ctl: Ctl) -> None:
    """List libraries and programs that are probed, and those that cannot be, with the reason."""
    from fibril.tls.v1 import tls_pb2 as pb

    answer = ask(ctl, "ListProbes", pb.ListProbesRequest())
    found = [to_record(each) for each in answer.probes]
    if answer.HasField("kernel"):
        taken = f"{answer.kernel.taken} connections belong to other programs" if answer.kernel.taken else ""
        kernel = pb.Probe(path="-", library="kernel", problem=answer.kernel.problem or taken)
        found.append(to_record(kernel))
    ctl.show(found, PROBES, "nothing is probed")


@command.command("watch")
@click.option("--pod", default="", help="Only this pod's.")
@click.option("--last", type=click.IntRange(0, 1024), default=20, show_default=True, help="So many of those that were.")
@click.option("--no-follow", is_flag=True, help="Show only those that were.")
@pass_ctl
def watch(ctl: Ctl, pod: str, last: int, no_follow: bool) -> None:
    """Show messages as they pass, until interrupted."""
    from fibril.tls.v1 import tls_pb2 as pb

    live = ctl.live(MESSAGES, (8, 20, 20, 8, 5, 6, 48, 20))
    request = pb.FollowMessagesRequest(pod=pod, last=last)

    class Enough(Exception):
        """All that were have been shown."""

    def take(answer: Any) -> None:
        if answer.HasField("message"):
            live.put(to_record(answer.message))
        elif no_follow:
            raise Enough

    try:
        ctl.stream(lambda channel: stub(channel).FollowMessages(request), take, SERVICE)
    except Enough:
        return
