"""`fibril flow`: connections as this node's policy has seen them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Sequence
from typing import Any, Final, TypeVar

import click

from services.ctl.context import Ctl, completed, pass_ctl
from services.ctl.render import Record, columns, short, to_record

SERVICE: Final = "policy"
PROTOCOLS: Final = {"tcp": 6, "udp": 17, "sctp": 132, "icmp": 1, "icmpv6": 58}
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
F = TypeVar("F", bound=Callable[..., Any])


def _when(record: Record) -> str:
    return time.strftime("%H:%M:%S", time.localtime(record["time_unix_seconds"]))


def _end(record: Record) -> str:
    name = record.get("pod") or record["address"]
    if not record.get("port"):
        return str(name)
    return f"[{name}]:{record['port']}" if ":" in name else f"{name}:{record['port']}"


def _protocol(record: Record) -> str:
    number = record.get("protocol", 0)
    name = next((name for name, known in PROTOCOLS.items() if known == number), str(number))
    return f"{name}/{record.get('icmp_type', 0)}" if name.startswith("icmp") else name


def _why(record: Record) -> str:
    reason = record.get("drop_reason", "")
    why = short(reason, "DROP_REASON_") if reason and not reason.endswith("UNSPECIFIED") else ""
    rule = ", ".join(part for part in (record.get("policy", ""), record.get("rule", "")) if part)
    more = f"{record['suppressed']} like it before" if record.get("suppressed") else ""
    return "; ".join(part for part in (why, rule, more) if part)


FLOWS = columns(
    ("TIME", _when),
    ("VERDICT", lambda r: short(r["verdict"], "FLOW_VERDICT_")),
    ("TYPE", lambda r: short(r["type"], "FLOW_TYPE_")),
    ("POLICY", lambda r: short(r["direction"], "FLOW_DIRECTION_")),
    ("PROTOCOL", _protocol),
    ("FROM", lambda r: _end(r["source"])),
    ("TO", lambda r: _end(r["destination"])),
    ("WHY", _why),
)


class Ago(click.ParamType[float]):
    """A time before now: "30s", "5m", "2h"; in seconds."""

    name = "ago"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        if isinstance(value, int | float):
            return float(value)
        match = re.fullmatch(r"([0-9]{1,9})([smhd])", str(value))
        if match is None:
            self.fail(f"{value!r} is no time; write 30s, 5m, 2h or 1d", param, ctx)
        return float(int(match[1]) * _UNITS[match[2]])


def stub(channel: Any) -> Any:
    """A stub of FlowService."""
    from fibril.flow.v1 import flow_pb2_grpc

    return flow_pb2_grpc.FlowServiceStub(channel)


def _complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Pods of this node."""
    from services.ctl.commands.endpoint import list_all

    return completed(ctx, incomplete, lambda ctl: [each["pod"] for each in list_all(ctl) if each.get("pod")])


def _filters(command: F) -> F:
    for option in reversed((
        click.option("--pod", default="", shell_complete=_complete, help='Pod at either end; "shop/*" for all that begin so.'),
        click.option("--from-pod", default="", shell_complete=_complete, help="Pod that sent."),
        click.option("--to-pod", default="", shell_complete=_complete, help="Pod that was sent to."),
        click.option("--ip", default="", metavar="PREFIX", help="Address or prefix at either end."),
        click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port at either end."),
        click.option("--protocol", "--proto", type=click.Choice(tuple(PROTOCOLS))),
        click.option("--verdict", type=click.Choice(("forwarded", "dropped", "audited"))),
        click.option("--type", "kind", type=click.Choice(("new", "closed", "revoked", "drop"))),
        click.option("--identity", type=click.IntRange(0), default=0, help="Identity at either end."),
        click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Label at either end; again for more."),
        click.option("--policy", default="", metavar="TEXT", help="What the name of policy or rule holds."),
    )):  # fmt: skip
        command = option(command)
    return command


def _filter(given: dict[str, Any]) -> Any:
    from fibril.flow.v1 import flow_pb2 as pb

    labels = {}
    for text in given["labels"]:
        key, sign, value = text.partition("=")
        if not sign:
            raise click.BadParameter(f"{text!r}: write KEY=VALUE", param_hint="--label")
        labels[key] = value
    return pb.FlowFilter(
        pod=given["pod"],
        source_pod=given["from_pod"],
        destination_pod=given["to_pod"],
        address=given["ip"],
        port=given["port"],
        protocol=PROTOCOLS.get(given["protocol"] or "", 0),
        verdict=pb.FlowVerdict.Value(f"FLOW_VERDICT_{(given['verdict'] or 'unspecified').upper()}"),
        type=pb.FlowType.Value(f"FLOW_TYPE_{(given['kind'] or 'unspecified').upper()}"),
        identity=given["identity"],
        labels=labels,
        policy=given["policy"],
    )


def _request(given: dict[str, Any], **more: Any) -> Any:
    from fibril.flow.v1 import flow_pb2 as pb

    wanted = _filter(given)
    return pb.GetFlowsRequest(allow=[wanted] if wanted.ByteSize() else [], **more)


@click.group(short_help="Show who has talked to whom, and who was refused.")
def command() -> None:
    """Connections as this node's policy has seen them: one flow each when it begins, ends or is refused."""


@command.command("ls")
@_filters
@click.option("--since", type=Ago(), default=0.0, metavar="TIME", help="Only of the last 30s, 5m, 2h.")
@click.option("--last", type=click.IntRange(0), default=100, show_default=True, help="So many at most; 0: all remembered.")
@pass_ctl
def ls(ctl: Ctl, /, since: float, last: int, **given: Any) -> None:
    """List remembered flows, oldest first."""
    request = _request(given, last=last, since_unix_seconds=time.time() - since if since else 0)

    async def use(channel: Any) -> list[Record]:
        stream = stub(channel).GetFlows(request, timeout=ctl.seconds)
        return [to_record(answer.flow) async for answer in stream if answer.HasField("flow")]

    found: Sequence[Record] = ctl.call(use, SERVICE)
    ctl.show(list(found), FLOWS, "no flows")


@command.command("follow")
@_filters
@click.option("--since", type=Ago(), default=0.0, metavar="TIME", help="First those of the last 30s, 5m, 2h.")
@click.option("--last", type=click.IntRange(0), default=0, help="First the last so many.")
@pass_ctl
def follow(ctl: Ctl, /, since: float, last: int, **given: Any) -> None:
    """Show flows as they come, until interrupted. JSON: one object a line, as fibril.flow.v1 has it."""
    live = ctl.live(FLOWS, (9, 10, 8, 8, 9, 28, 28, 0))
    oldest = time.time() - since if since or not last else 0
    request = _request(given, follow=True, last=last, since_unix_seconds=oldest)
    ctl.stream(
        lambda channel: stub(channel).GetFlows(request),
        lambda answer: live.put(to_record(answer.flow)) if answer.HasField("flow") else None,
        SERVICE,
    )


@command.command("status")
@pass_ctl
def status(ctl: Ctl) -> None:
    """Show how many flows are remembered, and how many were lost."""
    from fibril.flow.v1 import flow_pb2 as pb

    answer = ctl.call(
        lambda channel: stub(channel).GetFlowStatus(pb.GetFlowStatusRequest(), timeout=ctl.seconds), SERVICE
    )
    ctl.describe(to_record(answer))
