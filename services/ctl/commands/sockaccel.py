"""`fibril sockaccel`: connections within this node that skip the stack."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from typing import Any, Final

import click

from services.ctl.context import Ctl, completed, pass_ctl
from services.ctl.render import Column, Record, age, columns, short, table, to_record

SERVICE: Final = "sockaccel"
SCOPES: Final = ("pod", "pods", "host-pod", "host")
STATES: Final = ("proving", "shortened", "ended", "off")
_PAGE: Final = 5000


def stub(channel: Any) -> Any:
    """A stub of SockAccelService."""
    from fibril.sockaccel.v1 import sockaccel_pb2_grpc

    return sockaccel_pb2_grpc.SockAccelServiceStub(channel)


def ask(ctl: Ctl, method: str, request: Any) -> Any:
    """The answer to one call."""
    return ctl.call(lambda channel: getattr(stub(channel), method)(request, timeout=ctl.seconds), SERVICE)


def _end(end: Record) -> str:
    name = end.get("pod") or end["address"]
    return f"[{name}]:{end['port']}" if ":" in name else f"{name}:{end['port']}"


def _sum(record: Record, field: str) -> int:
    return int(record["client"][field]) + int(record["server"][field])


def _share(record: Record) -> str:
    taken, rest = _sum(record, "short_sends"), _sum(record, "tcp_sends")
    return f"{100 * taken / (taken + rest):.0f}%" if taken + rest else ""


def size(count: float) -> str:
    """Bytes for people: "1.5M"."""
    for unit in ("", "K", "M", "G"):
        if count < 1000:
            return f"{count:.0f}{unit}" if not unit or count >= 100 else f"{count:.1f}{unit}"
        count /= 1000
    return f"{count:.1f}T"


def _state(record: Record) -> str:
    state = short(record["state"], "PAIR_STATE_")
    return f"{state} ({short(record['end_reason'], 'END_REASON_')})" if state == "ended" else state


def _ports(record: Record) -> str:
    return ",".join(str(r["first"]) if r["last"] in (0, r["first"]) else f"{r['first']}-{r['last']}" for r in record["ports"])


CLASSES = columns(
    "name",
    ("ON", "enabled"),
    ("SCOPES", lambda r: ",".join(short(each, "SCOPE_") for each in r["scopes"])),
    ("PORTS", _ports),
    ("CLIENTS", "client_labels"),
    ("SERVERS", "server_labels"),
    ("CGROUPS", "cgroups"),
    ("PROXIES ONLY", "proxies_only"),
    ("NONBLOCKING ONLY", "nonblocking_only"),
    "pairs",
    ("", "message"),
)
PAIRS = columns(
    "id",
    ("CLIENT", lambda r: _end(r["client"])),
    ("SERVER", lambda r: _end(r["server"]) + (" (redirected)" if r["redirected"] else "")),
    ("CLASS", "class_name"),
    ("STATE", _state),
    ("SHORT", _share),
    ("SENDS", lambda r: _sum(r, "short_sends")),
    ("BYTES", lambda r: size(_sum(r, "short_bytes"))),
    ("TCP BYTES", lambda r: size(_sum(r, "tcp_bytes"))),
    ("AGE", lambda r: age(r["made_unix_seconds"])),
)


def classes(ctl: Ctl) -> list[Record]:
    """All classes, as records."""
    from fibril.sockaccel.v1 import sockaccel_pb2 as pb

    return [to_record(each) for each in ask(ctl, "ListClasses", pb.ListClassesRequest()).classes]


def complete_class(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Names of classes."""
    return completed(ctx, incomplete, lambda ctl: [each["name"] for each in classes(ctl)])


def _filter(pod: str, class_name: str, state: str | None, port: int) -> Any:
    from fibril.sockaccel.v1 import sockaccel_pb2 as pb

    return pb.PairFilter(
        pod=pod,
        class_name=class_name,
        state=pb.PairState.Value(f"PAIR_STATE_{(state or 'unspecified').upper()}"),
        port=port,
    )


def _filters(command: Any) -> Any:
    for option in reversed((
        click.option("--pod", default="", help="Pod at either end."),
        click.option("--class", "class_name", default="", shell_complete=complete_class, help="Only of this class."),
        click.option("--state", type=click.Choice(STATES)),
        click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port at either end."),
    )):  # fmt: skip
        command = option(command)
    return command


@click.group(short_help="Shorten connections within this node.")
def command() -> None:
    """TCP connections within this node whose data are handed from socket to socket, past the stack."""


@command.group("class")
def classes_group() -> None:
    """Which connections may be shortened."""


@classes_group.command("ls")
@pass_ctl
def class_ls(ctl: Ctl) -> None:
    """List classes."""
    ctl.show(classes(ctl), CLASSES, "no classes: nothing is shortened")


@classes_group.command("set")
@click.argument("name", shell_complete=complete_class)
@click.option("--scope", "scopes", multiple=True, required=True, type=click.Choice(SCOPES), help="Where both ends are; repeat.")
@click.option("--port", "ports", multiple=True, metavar="PORT[-PORT]", help="The server's; none: any.")
@click.option("--client-label", "clients", multiple=True, metavar="KEY=VALUE", help="Of the client's pod; again for more.")
@click.option("--server-label", "servers", multiple=True, metavar="KEY=VALUE", help="Of the server's pod.")
@click.option("--cgroup", "cgroups", multiple=True, metavar="PATH", help="One end's process is in it, or below.")
@click.option("--proxies-only", is_flag=True, help="One end is a proxy beside an application.")
@click.option("--nonblocking-only", is_flag=True, help="Neither end waits in recv(): those who poll.")
@click.option("--off", is_flag=True, help="Declare it without switching it on.")
@pass_ctl
def class_set(
    ctl: Ctl,
    name: str,
    scopes: Sequence[str],
    ports: Sequence[str],
    clients: Sequence[str],
    servers: Sequence[str],
    cgroups: Sequence[str],
    proxies_only: bool,
    nonblocking_only: bool,
    off: bool,
) -> None:
    """Declare a class, or replace the one of that name."""
    from fibril.sockaccel.v1 import sockaccel_pb2 as pb

    declared = pb.Class(
        name=name,
        enabled=not off,
        scopes=[pb.Scope.Value(f"SCOPE_{each.upper().replace('-', '_')}") for each in scopes],
        ports=[_range(each) for each in ports],
        client_labels=_labels(clients, "--client-label"),
        server_labels=_labels(servers, "--server-label"),
        cgroups=cgroups,
        proxies_only=proxies_only,
        nonblocking_only=nonblocking_only,
    )
    answer = ask(ctl, "UpsertClass", pb.UpsertClassRequest(declared=declared))
    ctl.show([to_record(answer.declared)], CLASSES)


def _range(text: str) -> Any:
    from fibril.sockaccel.v1 import sockaccel_pb2 as pb

    match = re.fullmatch(r"([0-9]{1,5})(?:-([0-9]{1,5}))?", text)
    if match is None:
        raise click.BadParameter(f"{text!r}: write PORT or PORT-PORT", param_hint="--port")
    # To the service 0 is a range of one port.
    if match[2] and int(match[2]) < int(match[1]):
        raise click.BadParameter(f"{text!r} does not end behind its beginning", param_hint="--port")
    return pb.PortRange(first=int(match[1]), last=int(match[2] or 0))


def _labels(texts: Sequence[str], option: str) -> dict[str, str]:
    found: dict[str, str] = {}
    for text in texts:
        key, sign, value = text.partition("=")
        if not sign:
            raise click.BadParameter(f"{text!r}: write KEY=VALUE", param_hint=option)
        if found.setdefault(key, value) != value:
            raise click.BadParameter(f"{key!r} cannot be both {found[key]!r} and {value!r}", param_hint=option)
    return found


@classes_group.command("rm")
@click.argument("name", shell_complete=complete_class)
@pass_ctl
def class_rm(ctl: Ctl, name: str) -> None:
    """Remove a class; its connections go on by TCP."""
    from fibril.sockaccel.v1 import sockaccel_pb2 as pb

    ask(ctl, "DeleteClass", pb.DeleteClassRequest(name=name))
    ctl.describe({"deleted": name})


def _switch(ctl: Ctl, class_name: str, pair: int, everything: bool, on: bool) -> None:
    from fibril.sockaccel.v1 import sockaccel_pb2 as pb

    given = [bool(class_name), bool(pair), everything]
    if sum(given) != 1:
        raise click.UsageError("say what: one of --class, --pair, --all")
    if class_name:
        request = pb.SwitchRequest(class_name=class_name, on=on)
    elif pair:
        request = pb.SwitchRequest(pair=pair, on=on)
    else:
        request = pb.SwitchRequest(all=True, on=on)
    ask(ctl, "Switch", request)
    ctl.describe({"switched": "on" if on else "off", "what": class_name or pair or "everything"})


def _switches(text: str, on: bool) -> click.Command:
    @click.option("--class", "class_name", default="", shell_complete=complete_class)
    @click.option("--pair", type=click.IntRange(1, (1 << 64) - 1), default=None, help="Its id: see pairs.")
    @click.option("--all", "everything", is_flag=True, help="Everything on this node.")
    @pass_ctl
    def switch(ctl: Ctl, class_name: str, pair: int | None, everything: bool) -> None:
        _switch(ctl, class_name, pair or 0, everything, on)

    return click.command("on" if on else "off", help=text)(switch)


command.add_command(_switches("Shorten connections again: a class, a pair, or all.", True))
command.add_command(_switches("Have connections go by TCP from now on: a class, a pair, or all.", False))


@command.command("pairs")
@_filters
@pass_ctl
def pairs(ctl: Ctl, /, **given: Any) -> None:
    """List connections that are considered, with what went which way."""
    ctl.show(_pairs(ctl, _filter(**given)), PAIRS, "no pairs")


def _pairs(ctl: Ctl, wanted: Any) -> list[Record]:
    from fibril.sockaccel.v1 import sockaccel_pb2 as pb
    from fibril.types.v1 import types_pb2

    found: list[Record] = []
    token = ""
    while True:
        page = types_pb2.PageRequest(size=_PAGE, token=token)
        answer = ask(ctl, "ListPairs", pb.ListPairsRequest(filter=wanted, page=page))
        found += [to_record(each) for each in answer.pairs]
        token = answer.next_token
        if not token:
            return found


@command.command("watch")
@_filters
@pass_ctl
def watch(ctl: Ctl, /, **given: Any) -> None:
    """Show pairs as they change, until interrupted."""
    from fibril.sockaccel.v1 import sockaccel_pb2 as pb

    live = ctl.live(
        [*columns(("", lambda r: "-" if r["kind"].endswith("DELETE") else "+")), *_of_pair()],
        (1, 8, 28, 28, 14, 18, 5, 8, 8, 9, 4),
    )
    request = pb.WatchPairsRequest(filter=_filter(**given))
    ctl.stream(
        lambda channel: stub(channel).WatchPairs(request),
        lambda answer: live.put(to_record(answer)) if answer.HasField("pair") else None,
        SERVICE,
    )


def _of_pair() -> list[Column]:
    """The columns of a pair, of a record that holds one."""

    def inner(column: Column) -> Column:
        return Column(column.head, lambda record: column.text(record["pair"]))

    return [inner(each) for each in PAIRS]


@command.command("top")
@click.option("--interval", type=click.FloatRange(0.2, 60), default=1.0, show_default=True, help="Seconds between two looks.")
@click.option("--count", type=click.IntRange(0), default=0, help="So many looks; 0: until interrupted.")
@click.option("--lines", type=click.IntRange(1), default=20, show_default=True, help="Pairs shown at most.")
@_filters
@pass_ctl
def top(ctl: Ctl, /, interval: float, count: int, lines: int, **given: Any) -> None:
    """Show live which connections skip the stack, the busiest first. JSON: one object a look."""
    import json

    if interval != interval:
        raise click.BadParameter("that is no number", param_hint="--interval")
    wanted = _filter(**given)
    before: dict[int, Record] = {}
    then = time.monotonic()
    looks = 0
    clear = ctl.output == "table" and sys.stdout.isatty()
    while True:
        found = {int(each["id"]): each for each in _pairs(ctl, wanted)}
        now = time.monotonic()
        if before or looks:
            rows = _rates(before, found, now - then)
            if ctl.output == "table":
                click.echo(("\033[2J\033[H" if clear else "") + _screen(rows, lines))
            else:
                click.echo(json.dumps({"seconds": round(now - then, 3), "pairs": rows[:lines]}))
            if count and looks >= count:
                return
        looks += 1
        before, then = found, now
        time.sleep(interval)


def _rates(before: dict[int, Record], found: dict[int, Record], seconds: float) -> list[dict[str, Any]]:
    rows = []
    for number, record in found.items():
        old = before.get(number)
        rate = {
            field: max(0, _sum(record, field) - (_sum(old, field) if old else 0)) / seconds
            for field in ("short_sends", "tcp_sends", "short_bytes", "tcp_bytes")
        }
        rows.append({**record, "rate": {field: round(value, 1) for field, value in rate.items()}})
    return sorted(rows, key=lambda r: -(r["rate"]["short_sends"] + r["rate"]["tcp_sends"]))


TOP = columns(
    ("CLIENT", lambda r: _end(r["client"])),
    ("SERVER", lambda r: _end(r["server"]) + (" (redirected)" if r["redirected"] else "")),
    ("STATE", _state),
    ("SHORT/S", lambda r: f"{r['rate']['short_sends']:.0f}"),
    ("TCP/S", lambda r: f"{r['rate']['tcp_sends']:.0f}"),
    ("BYTES/S", lambda r: size(r["rate"]["short_bytes"])),
    ("TCP BYTES/S", lambda r: size(r["rate"]["tcp_bytes"])),
    ("SHORT", _share),
    ("CLASS", "class_name"),
)


def _screen(rows: Sequence[Record], lines: int) -> str:
    total = {field: sum(row["rate"][field] for row in rows) for field in ("short_sends", "tcp_sends", "short_bytes")}
    head = (
        f"{len(rows)} pairs, {total['short_sends']:.0f} sends a second past the stack ({size(total['short_bytes'])}B/s), "
        f"{total['tcp_sends']:.0f} by TCP"
    )
    return f"{head}\n{table(list(rows[:lines]), TOP)}" if rows else head


@command.command("usage")
@pass_ctl
def usage(ctl: Ctl) -> None:
    """Show totals and room."""
    from fibril.sockaccel.v1 import sockaccel_pb2 as pb

    ctl.describe(to_record(ask(ctl, "GetUsage", pb.GetUsageRequest())))
