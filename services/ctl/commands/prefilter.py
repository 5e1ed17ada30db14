"""`fibril prefilter`: which sources the node takes packets from, and how many."""

from __future__ import annotations

import re
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from itertools import islice
from typing import Any, TextIO

import click

from services.ctl.context import Ctl, completed, pages, pass_ctl
from services.ctl.render import Record, columns, short, to_record

SERVICE = "lb"
_MESSAGE = 10_000
_BULK_S = 300.0
_LONGEST = 0xFFFFFFFF
_UNITS = {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86400}


def _action(record: Record) -> str:
    return short(record["action"], "ACTION_")


def _traffic(field: str, what: str) -> tuple[str, Any]:
    return f"{field} {what}".upper().strip(), lambda r: r.get(field, {}).get(what, 0)


SETS = columns(
    "name",
    ("ACTION", _action),
    ("IPV4", "entries_v4"),
    ("IPV6", "entries_v6"),
    "expiring",
    ("PACKETS", lambda r: r["traffic"]["packets"]),
    ("BYTES", lambda r: r["traffic"]["bytes"]),
)
PREFIXES = columns("prefix", ("EXPIRES", lambda r: _left(r["expires_at"])))
LIMITS = columns(
    "prefix",
    ("PACKETS/S", "rate_pps"),
    "burst",
    _traffic("passed", "packets"),
    _traffic("dropped", "packets"),
)
TOTALS = columns("what", "packets", "bytes")


class Ttl(click.ParamType[int]):
    """A time to live: "90", "30s", "10m", "2h", "7d"; in seconds."""

    name = "ttl"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if isinstance(value, int):
            return value
        match = re.fullmatch(r"([0-9]{1,9})([smhd]?)", str(value))
        seconds = int(match[1]) * _UNITS[match[2]] if match else 0
        if not 0 < seconds <= _LONGEST:
            self.fail(f"{value!r} is no time; write 30s, 10m, 2h or 7d", param, ctx)
        return seconds


def stub(channel: Any) -> Any:
    """A stub of PrefilterService."""
    from fibril.prefilter.v1 import prefilter_pb2_grpc

    return prefilter_pb2_grpc.PrefilterServiceStub(channel)


def _ask(ctl: Ctl, method: str, request: Any) -> Any:
    return ctl.call(lambda channel: getattr(stub(channel), method)(request, timeout=ctl.seconds), SERVICE)


def _sets(ctl: Ctl) -> Any:
    from fibril.prefilter.v1 import prefilter_pb2 as pb

    return _ask(ctl, "ListSets", pb.ListSetsRequest())


def _complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Names of sets."""
    return completed(ctx, incomplete, lambda ctl: [each.name for each in _sets(ctl).sets])


def _left(unix_seconds: int) -> str:
    if not unix_seconds:
        return ""
    seconds = max(0, unix_seconds - int(time.time()))
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"in {seconds // size}{unit}"
    return f"in {seconds}s"


def _words(lines: TextIO) -> Iterator[str]:
    """The first word of each line; what follows "#" or ";" is a comment."""
    for line in lines:
        words = re.split("[#;]", line, maxsplit=1)[0].split()
        if words:
            yield words[0]


def _given(prefixes: Sequence[str], files: Sequence[TextIO]) -> Iterator[str]:
    yield from prefixes
    for lines in files:
        yield from _words(lines)


def _stream(ctl: Ctl, method: str, first: Any, prefixes: Iterator[str], ttl: int = 0) -> Any:
    """Send a set's prefixes in messages of a size that keeps the service answering others."""

    async def requests() -> AsyncIterator[Any]:
        message = first
        while chunk := list(islice(prefixes, _MESSAGE)):
            message.prefixes.extend(chunk)
            if ttl:
                message.ttl_s = ttl
            yield message
            message = type(first)()
        if message is first:
            yield first

    seconds = _BULK_S if ctl.timeout is None else ctl.timeout
    return ctl.call(lambda channel: getattr(stub(channel), method)(requests(), timeout=seconds), SERVICE)


_NAME = click.argument("name", metavar="SET", shell_complete=_complete)
_PREFIXES = click.argument("prefixes", nargs=-1, metavar="[PREFIX]...")
_FILE = click.option(
    "-f", "--file", "files", type=click.File(), multiple=True, metavar="FILE",
    help='Read prefixes, one a line; "-": standard input. What follows "#" or ";" is a comment.',
)  # fmt: skip
_ALLOW = click.option(
    "--allow/--deny", default=None, help="What to do with these sources; a new set denies unless you say."
)
_TTL = click.option(
    "--ttl", type=Ttl(), default=0, metavar="TIME", help="Forget these prefixes after 30s, 10m, 2h, 7d."
)
_FORCE = click.option("--force", is_flag=True, help="Deny even everybody (0.0.0.0/0, ::/0).")


def _number(allow: bool | None) -> int:
    from fibril.prefilter.v1 import prefilter_pb2 as pb

    return pb.ACTION_UNSPECIFIED if allow is None else pb.ACTION_ALLOW if allow else pb.ACTION_DENY


@click.group(short_help="Drop packets before anything else looks at them.")
def command() -> None:
    """Which sources this node takes packets from, and how many a second. The longest prefix of all sets decides."""


@command.command("ls")
@click.argument("name", metavar="[SET]", required=False, default="", shell_complete=_complete)
@pass_ctl
def ls(ctl: Ctl, name: str) -> None:
    """List the sets, or the prefixes of one."""
    from fibril.prefilter.v1 import prefilter_pb2 as pb

    if name:

        async def use(channel: Any) -> list[Any]:
            return await pages(
                lambda page: stub(channel).ListPrefixes(
                    pb.ListPrefixesRequest(set=name, page=page), timeout=ctl.seconds
                ),
                "prefixes",
            )

        ctl.show([to_record(each) for each in ctl.call(use, SERVICE)], PREFIXES, "no prefixes")
        return
    answer = _sets(ctl)
    if ctl.output != "table":
        ctl.describe(to_record(answer))
        return
    ctl.show([to_record(each) for each in answer.sets], SETS, "no sets")
    if answer.devices:
        click.echo(
            f"in force on {', '.join(answer.devices)}; tables take {answer.memory_bytes / (1 << 20):.1f} MiB"
        )
    if answer.problem:
        click.echo(f"not in force: {answer.problem}", err=True)


@command.command("set")
@_NAME
@_PREFIXES
@_FILE
@_ALLOW
@_TTL
@_FORCE
@pass_ctl
def set_(
    ctl: Ctl,
    name: str,
    prefixes: Sequence[str],
    files: Sequence[TextIO],
    allow: bool | None,
    ttl: int,
    force: bool,
) -> None:
    """Make a set be exactly these prefixes, all at once."""
    from fibril.prefilter.v1 import prefilter_pb2 as pb

    if not prefixes and not files:
        raise click.UsageError("give prefixes or a file; to remove a set: fibril prefilter rm SET --all")
    first = pb.SetPrefixesRequest(set=name, action=_number(allow), force=force)  # type: ignore[arg-type]
    _counted(ctl, name, _stream(ctl, "SetPrefixes", first, _given(prefixes, files), ttl))


@command.command("add")
@_NAME
@_PREFIXES
@_FILE
@_ALLOW
@_TTL
@_FORCE
@pass_ctl
def add(
    ctl: Ctl,
    name: str,
    prefixes: Sequence[str],
    files: Sequence[TextIO],
    allow: bool | None,
    ttl: int,
    force: bool,
) -> None:
    """Add prefixes to a set, or renew how long they stay."""
    from fibril.prefilter.v1 import prefilter_pb2 as pb

    if not prefixes and not files:
        raise click.UsageError("give prefixes or a file")
    first = pb.AddPrefixesRequest(set=name, action=_number(allow), force=force)  # type: ignore[arg-type]
    _counted(ctl, name, _stream(ctl, "AddPrefixes", first, _given(prefixes, files), ttl))


@command.command("rm")
@_NAME
@_PREFIXES
@_FILE
@click.option("--all", "whole", is_flag=True, help="Remove the set itself.")
@pass_ctl
def rm(ctl: Ctl, name: str, prefixes: Sequence[str], files: Sequence[TextIO], whole: bool) -> None:
    """Take prefixes out of a set, or remove it."""
    from fibril.prefilter.v1 import prefilter_pb2 as pb

    if whole == bool(prefixes or files):
        raise click.UsageError("give prefixes or a file, or --all for the set itself")
    if whole:
        _ask(ctl, "DeleteSet", pb.DeleteSetRequest(set=name))
        return
    _counted(
        ctl, name, _stream(ctl, "RemovePrefixes", pb.RemovePrefixesRequest(set=name), _given(prefixes, files))
    )


def _counted(ctl: Ctl, name: str, answer: Any) -> None:
    record = to_record(answer)
    if ctl.output != "table":
        ctl.describe({"set": name, **record})
        return
    changes = [f"{record[what]} {what}" for what in ("added", "removed") if record.get(what)]
    click.echo(f"{name}: {record['entries']} prefixes ({', '.join(changes) or 'nothing new'})")


@command.command("get")
@click.argument("address")
@pass_ctl
def get(ctl: Ctl, address: str) -> None:
    """Tell what becomes of packets from an address, and by which entry or limit."""
    from fibril.prefilter.v1 import prefilter_pb2 as pb

    record = to_record(_ask(ctl, "GetAddress", pb.GetAddressRequest(address=address)))
    if ctl.output == "table":
        record = _told(record)
    ctl.describe(record)


def _told(record: Mapping[str, Any]) -> dict[str, Any]:
    """For people."""
    told: dict[str, Any] = {
        "verdict": {"ACTION_DENY": "dropped", "ACTION_ALLOW": "let through"}.get(record["action"], "")
    }
    if record["set"]:
        left = _left(record["entry"]["expires_at"])
        told["decided_by"] = f"{record['entry']['prefix']} in {record['set']}" + (
            f", expires {left}" if left else ""
        )
        told["packets"] = record["set_traffic"]["packets"]
    elif "limit" in record:
        limit = record["limit"]
        told["verdict"] = "dropped now, sends too much" if record["limited_now"] else "let through, limited"
        told["decided_by"] = (
            f"{limit['rate_pps']} packets a second, burst {limit['burst']}, by {limit['prefix']}"
        )
    else:
        told["verdict"] = "let through, nothing holds it"
    if record["others"]:
        told["also_in"] = [
            f"{each['entry']['prefix']} in {each['set']} ({_action(each)})" for each in record["others"]
        ]
    return told


@command.command("limit")
@click.argument("prefix", required=False, default="")
@click.argument("rate", type=click.IntRange(1, 0xFFFFFFFF), required=False, default=None)
@click.option(
    "--burst",
    type=click.IntRange(1, 0xFFFFFFFF),
    metavar="PACKETS",
    help="At once after silence; else a tenth of a second's.",
)
@pass_ctl
def limit(ctl: Ctl, prefix: str, rate: int | None, burst: int | None) -> None:
    """Let each source within PREFIX send RATE packets a second; without arguments list the limits.

    A source is an IPv4 address or an IPv6 /64. PREFIX may be 0.0.0.0/0 or ::/0.
    """
    from fibril.prefilter.v1 import prefilter_pb2 as pb

    if not prefix:
        answer = _ask(ctl, "ListLimits", pb.ListLimitsRequest())
        ctl.show([to_record(each) for each in answer.limits], LIMITS, "no limits")
        return
    if rate is None:
        raise click.UsageError("give the packets a second: fibril prefilter limit PREFIX RATE")
    wanted = pb.Limit(prefix=prefix, rate_pps=rate, burst=burst or 0)
    ctl.show([to_record(_ask(ctl, "SetLimit", pb.SetLimitRequest(limit=wanted)).limit)], LIMITS)


def _complete_limit(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    from fibril.prefilter.v1 import prefilter_pb2 as pb

    return completed(
        ctx,
        incomplete,
        lambda ctl: [each.prefix for each in _ask(ctl, "ListLimits", pb.ListLimitsRequest()).limits],
    )


@command.command("unlimit")
@click.argument("prefix", shell_complete=_complete_limit)
@pass_ctl
def unlimit(ctl: Ctl, prefix: str) -> None:
    """Take a limit away."""
    from fibril.prefilter.v1 import prefilter_pb2 as pb

    _ask(ctl, "RemoveLimit", pb.RemoveLimitRequest(prefix=prefix))


@command.command("counters")
@pass_ctl
def counters(ctl: Ctl) -> None:
    """Show what has been dropped and let through, and why."""
    from fibril.prefilter.v1 import prefilter_pb2 as pb

    record = to_record(_ask(ctl, "GetCounters", pb.GetCountersRequest()))
    if ctl.output != "table":
        ctl.describe(record)
        return
    words = {
        "denied": "dropped, denied", "limited": "dropped, over the limit", "allowed": "let through, allowed",
        "within": "let through, within the limit",
    }  # fmt: skip
    ctl.show([{"what": text, **record[field]} for field, text in words.items()], TOTALS)
    for title, rows, shown in (("sets", record["sets"], SETS), ("limits", record["limits"], LIMITS)):
        if rows:
            click.echo(f"\n{title}")
            ctl.show(rows, shown)
