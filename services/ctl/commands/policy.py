"""`fibril policy`: who may talk to whom, and why."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import click

from services.ctl import parties
from services.ctl.context import Ctl, completed, pages, pass_ctl
from services.ctl.policyrules import RULES
from services.ctl.render import Record, columns, short, to_record

SERVICE: Final = "policy"
KINDS: Final = {
    "fibril": 1, "cnp": 2, "ccnp": 3, "np": 4, "cluster": 5, "anp": 6, "banp": 7,
}  # fmt: skip
_NAMES: Final = {number: name for name, number in KINDS.items()}
PROTOCOLS: Final = {"tcp": 6, "udp": 17, "sctp": 132, "icmp": 1, "icmpv6": 58}
ENDPOINT_MAX: Final = 65535
_LONG_S: Final = 60.0
TEXT_MAX: Final = (4 << 20) - 1024
"""Bytes of documents that fit into a request."""


def stub(channel: Any) -> Any:
    """A stub of PolicyService."""
    from fibril.policy.v1 import policy_pb2_grpc

    return policy_pb2_grpc.PolicyServiceStub(channel)


def _ask(ctl: Ctl, method: str, request: Any, seconds: float | None = None) -> Any:
    return ctl.call(
        lambda channel: getattr(stub(channel), method)(request, timeout=seconds or ctl.seconds), SERVICE
    )


def _key(record: Record) -> str:
    """ "cnp/shop/api", as commands take it."""
    from fibril.policy.v1 import policy_pb2 as pb

    kind = _NAMES.get(pb.PolicyKind.Value(record["kind"]), "?")
    return "/".join(part for part in (kind, record.get("namespace", ""), record["name"]) if part)


def _rules(record: Record) -> str:
    ingress = sum(rule["direction"].endswith("INGRESS") for rule in record.get("rules", []))
    return f"{ingress} in, {len(record.get('rules', [])) - ingress} out"


POLICIES = columns(
    ("POLICY", lambda r: _key(r["key"])), ("RULES", _rules), ("DESCRIPTION", "description"), "revision"
)
APPLIED = columns(
    ("POLICY", lambda r: _key(r["key"])), ("RESULT", lambda r: short(r["result"], "APPLIED_RESULT_"))
)
CHANGES = columns(
    ("", lambda r: "-" if r["kind"].endswith("DELETE") else "+"), ("POLICY", lambda r: _key(r["policy"]["key"]))
)
ENDPOINTS = columns(
    ("ID", "endpoint"),
    "pod",
    "identity",
    ("INGRESS", lambda r: "enforced" if r.get("ingress_enforced") else "open"),
    ("EGRESS", lambda r: "enforced" if r.get("egress_enforced") else "open"),
    ("MODE", lambda r: "lockdown" if r.get("lockdown") else "audit" if r.get("audit") else ""),
    "policy",
    "generation",
    "peers",
    "ports",
    "message",
)
PAIRS = columns(
    ("FROM", lambda r: _who(r, "source")),
    ("TO", lambda r: _who(r, "destination")),
    ("PORTS", lambda r: _all(r["ports"]) or ", ".join(dict.fromkeys(map(_ports, r["ports"])))),
)
FLOWS = columns(
    ("FROM", lambda r: _end(r["flow"]["source"])),
    ("TO", lambda r: _end(r["flow"]["destination"])),
    ("REASON", lambda r: r["decision"]["reason"]),
)


def _who(record: Record, end: str) -> str:
    pods = record.get(f"{end}_pods", [])
    if pods:
        return ", ".join(pods[:3]) + (f" and {len(pods) - 3} more" if len(pods) > 3 else "")
    labels = record.get(f"{end}_labels", {})
    return ",".join(f"{key}={text}" if text else key for key, text in sorted(labels.items())[:4])


def _all(ports: Sequence[Record]) -> str:
    """If it is one stretch of all protocols."""
    if len(ports) != 1 or ports[0]["protocol"]:
        return ""
    return "+all" if ports[0]["allowed_after"] else "-all"


def _ports(record: Record) -> str:
    number = record.get("protocol", 0)
    protocol = next((name for name, known in PROTOCOLS.items() if known == number), str(number))
    sign = "+" if record.get("allowed_after") else "-"
    if not number:
        return f"{sign}other"
    first, last = record.get("first", 0), record.get("last", 0)
    if (first, last) == (0, 65535):
        return f"{sign}{protocol}"
    return f"{sign}{protocol}/{first}" + (f"-{last}" if last != first else "")


def _end(record: Record) -> str:
    name = record.get("pod") or record["address"]
    return f"{name}:{record['port']}" if record.get("port") else name


class Key(click.ParamType[Any]):
    """Kind, namespace and name of a policy: "cnp/shop/api", "ccnp/baseline"."""

    name = "policy"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        from fibril.policy.v1 import policy_pb2 as pb

        if isinstance(value, pb.PolicyKey):
            return value
        kind, *rest = str(value).split("/")
        if kind not in KINDS or len(rest) not in (1, 2):
            self.fail(
                f"{value!r} names no policy; write KIND/NAMESPACE/NAME or KIND/NAME, KIND one of {', '.join(KINDS)}",
                param,
                ctx,
            )
        return pb.PolicyKey(
            kind=pb.PolicyKind.ValueType(KINDS[kind]), namespace=rest[0] if len(rest) == 2 else "", name=rest[-1]
        )


def _complete(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Keys of policies."""
    return completed(
        ctx, incomplete, lambda ctl: [_key(to_record(policy)["key"]) for policy in _policies(ctl)]
    )


def _policies(ctl: Ctl, namespace: str = "") -> list[Any]:
    from fibril.policy.v1 import policy_pb2 as pb

    async def use(channel: Any) -> list[Any]:
        return await pages(
            lambda page: stub(channel).ListPolicies(
                pb.ListPoliciesRequest(page=page, namespace=namespace), timeout=ctl.seconds
            ),
            "policies",
        )

    found: list[Any] = ctl.call(use, SERVICE)
    return found


def _read(files: Sequence[Path]) -> str:
    texts = []
    for file in files:
        raw = sys.stdin.buffer.read() if str(file) == "-" else file.read_bytes()
        try:
            texts.append(raw.decode("utf-8-sig"))
        except UnicodeDecodeError as error:
            raise click.ClickException(f"{file} is no text in UTF-8: {error.reason} at byte {error.start}") from None
    joined = "\n---\n".join(texts)
    if len(joined.encode()) > TEXT_MAX:
        raise click.ClickException(f"{len(joined.encode())} bytes of documents, the limit is {TEXT_MAX}; apply them in parts")
    return joined


_FILES = click.option(
    "-f", "--file", "files", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    multiple=True, required=True, metavar="FILE", help='YAML or JSON; "-": standard input; again for more.',
)  # fmt: skip
_NAMESPACE = click.option(
    "-n", "--namespace", default="default", show_default=True, help="Namespace of documents that name none."
)
_PROTOCOL = click.option("--protocol", type=click.Choice(tuple(PROTOCOLS)), default="tcp", show_default=True)


@click.group(short_help="Say who may talk to whom, and ask why.")
def command() -> None:
    """Policies of the cluster. What no policy selects may talk to everybody; `apply` takes those of Kubernetes and Cilium."""


@command.command("apply")
@_FILES
@_NAMESPACE
@click.option("--dry-run", is_flag=True, help="Check, and change nothing.")
@click.option("--wait", is_flag=True, help="Return once this node enforces it.")
@pass_ctl
def apply(ctl: Ctl, files: Sequence[Path], namespace: str, dry_run: bool, wait: bool) -> None:
    """Declare the policies of files: NetworkPolicy, CiliumNetworkPolicy, ClusterNetworkPolicy, AdminNetworkPolicy, …"""
    from fibril.policy.v1 import policy_pb2 as pb

    request = pb.ApplyDocumentsRequest(text=_read(files), default_namespace=namespace, dry_run=dry_run)
    answer = _ask(ctl, "ApplyDocuments", request, _LONG_S)
    if wait and answer.revision:
        _ask(ctl, "WaitEnforced", pb.WaitEnforcedRequest(revision=answer.revision), _LONG_S)
    ctl.show([to_record(each) for each in answer.documents], APPLIED, "no policies")


@command.command("rm")
@click.argument("keys", nargs=-1, type=Key(), metavar="[POLICY]...", shell_complete=_complete)
@click.option(
    "-f", "--file", "files", type=click.Path(exists=True, dir_okay=False, allow_dash=True, path_type=Path),
    multiple=True, metavar="FILE", help="Remove what the documents name.",
)  # fmt: skip
@_NAMESPACE
@pass_ctl
def rm(ctl: Ctl, keys: Sequence[Any], files: Sequence[Path], namespace: str) -> None:
    """Remove policies, as cnp/NAMESPACE/NAME, or those that files declare."""
    from fibril.policy.v1 import policy_pb2 as pb

    if not keys and not files:
        raise click.UsageError("name policies, or files with -f")
    if keys:
        _ask(ctl, "DeletePolicies", pb.DeletePoliciesRequest(keys=keys))
    if files:
        request = pb.ApplyDocumentsRequest(text=_read(files), default_namespace=namespace, delete=True)
        _ask(ctl, "ApplyDocuments", request, _LONG_S)


@command.command("ls")
@click.option("-n", "--namespace", default="", help="Only of this namespace.")
@pass_ctl
def ls(ctl: Ctl, namespace: str) -> None:
    """List policies."""
    ctl.show([to_record(each) for each in _policies(ctl, namespace)], POLICIES, "no policies")


@command.command("get")
@click.argument("key", type=Key(), metavar="POLICY", shell_complete=_complete)
@pass_ctl
def get(ctl: Ctl, key: Any) -> None:
    """Show a policy's rules, as they are understood; its document, too, with -o yaml."""
    from fibril.policy.v1 import policy_pb2 as pb

    found = to_record(_ask(ctl, "GetPolicy", pb.GetPolicyRequest(key=key)).policy)
    if ctl.output != "table":
        ctl.describe(found)
        return
    ctl.describe({"policy": _key(found["key"]), **{field: found[field] for field in ("description", "revision")}})
    ctl.show(found["rules"], RULES, "no rules")


@command.command("watch")
@pass_ctl
def watch(ctl: Ctl) -> None:
    """Show policies as they come, change and go, until interrupted."""
    from fibril.policy.v1 import policy_pb2 as pb

    live = ctl.live(CHANGES, (2, 0))
    ctl.stream(
        lambda channel: stub(channel).WatchPolicies(pb.WatchPoliciesRequest()),
        lambda message: live.put(to_record(message)) if message.HasField("policy") else None,
        SERVICE,
    )


@command.command("trace")
@click.option("--from", "source", required=True, metavar="WHO", help="Who opens the connection.")
@click.option("--to", "target", required=True, metavar="WHO", help="To whom.")
@click.option("--port", type=click.IntRange(0, 65535), default=0, help="Port, or ICMP type.")
@_PROTOCOL
@pass_ctl
def trace(ctl: Ctl, source: str, target: str, port: int, protocol: str) -> None:
    """Explain a verdict by the policies alone. WHO: a pod, an address, labels as app=web,tier=db, endpoint:ID, identity:N,
    world, host, remote-node, init, health.
    """
    from fibril.policy.v1 import policy_pb2 as pb

    request = pb.TraceRequest(
        to=parties.party(target, "--to"), protocol=pb.PortProtocol.ValueType(PROTOCOLS[protocol]), port=port
    )
    getattr(request, "from").CopyFrom(parties.party(source, "--from"))
    answer = _ask(ctl, "Trace", request)
    if ctl.output != "table":
        ctl.describe(to_record(answer))
        return
    click.echo("allowed" if answer.allowed else "denied")
    for name in ("egress", "ingress"):
        click.echo(f"  {name}: {getattr(answer, name).reason}")
    for each in answer.matches:
        click.echo(f"    matches {_key(to_record(each.policy))} {each.rule_name!r}: {each.reason}")
    if request.to.address:
        _say_behind(ctl, request.to.address, port, protocol)


def _say_behind(ctl: Ctl, address: str, port: int, protocol: str) -> None:
    if note := parties.behind(ctl, address, port, protocol):
        click.echo(f"  note: {note}")


@command.command("why")
@click.argument("source", metavar="SOURCE[:PORT]")
@click.argument("target", metavar="DESTINATION[:PORT]")
@_PROTOCOL
@pass_ctl
def why(ctl: Ctl, source: str, target: str, protocol: str) -> None:
    """Replay a packet against this node's kernel: its tables, its connections. For ICMP the port is the type.

    SOURCE and DESTINATION are addresses, or pods of this node.
    """
    from fibril.policy.v1 import policy_pb2 as pb

    (source, source_port), (target, target_port) = (
        parties.place(source, "SOURCE"),
        parties.place(target, "DESTINATION"),
    )
    source, target = parties.pair(ctl, source, target)
    answer = _ask(
        ctl,
        "Why",
        pb.WhyRequest(
            source=source,
            destination=target,
            protocol=PROTOCOLS[protocol],
            source_port=source_port,
            destination_port=target_port,
        ),
    )
    if ctl.output != "table":
        ctl.describe(to_record(answer))
        return
    click.echo("allowed" if answer.allowed else "denied")
    for name in ("egress", "ingress"):
        if answer.HasField(name):
            found = getattr(answer, name)
            click.echo(
                f"  {name} of endpoint {found.endpoint}: {found.decision.reason} "
                f"(peer {found.peer_identity}, generation {found.generation})"
            )
    if answer.HasField("connection"):
        known = answer.connection
        click.echo(f"  connection from {known.source}, {known.state}, silent for {known.idle_seconds} s")
    _say_behind(ctl, target, target_port, protocol)


@command.command("diff")
@_FILES
@_NAMESPACE
@click.option("--delete", is_flag=True, help="As if what the documents name were removed.")
@click.option("--minutes", type=click.IntRange(0), default=0, help="Only flows seen so lately; 0: all remembered.")
@pass_ctl
def diff(ctl: Ctl, files: Sequence[Path], namespace: str, delete: bool, minutes: int) -> None:
    """Show what applying files would change: which pairs of pods, and which connections seen lately would break."""
    from fibril.policy.v1 import policy_pb2 as pb

    request = pb.DiffRequest(
        text=_read(files), default_namespace=namespace, delete=delete, flows_seconds=60 * minutes
    )
    answer = _ask(ctl, "Diff", request, _LONG_S)
    if ctl.output != "table":
        ctl.describe(to_record(answer))
        return
    ctl.show([to_record(each) for each in answer.pairs], PAIRS, "no pair of pods would see another verdict")
    if answer.pair_count > len(answer.pairs):
        click.echo(f"and {answer.pair_count - len(answer.pairs)} pairs more")
    click.echo(f"connections seen on this node that would be denied: {answer.flow_count}")
    if answer.flows:
        ctl.show([to_record(each) for each in answer.flows], FLOWS)


@command.command("endpoints")
@pass_ctl
def endpoints(ctl: Ctl) -> None:
    """List what is in force for this node's endpoints."""
    from fibril.policy.v1 import policy_pb2 as pb

    async def use(channel: Any) -> list[Any]:
        return await pages(
            lambda page: stub(channel).ListEndpointPolicies(
                pb.ListEndpointPoliciesRequest(page=page), timeout=ctl.seconds
            ),
            "endpoints",
        )

    ctl.show([to_record(each) for each in ctl.call(use, SERVICE)], ENDPOINTS, "no endpoints")


def _complete_endpoint(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    from services.ctl.commands.endpoint import list_all

    return completed(ctx, incomplete, lambda ctl: ["host", *(each["pod"] for each in list_all(ctl) if each["pod"])])


@command.command("set")
@click.argument("what", metavar="ENDPOINT", shell_complete=_complete_endpoint)
@click.option("--audit/--no-audit", default=None, help="Report what is denied, and let it pass.")
@click.option("--lockdown/--no-lockdown", default=None, help="Let nothing pass.")
@click.option(
    "--port", "ports", multiple=True, metavar="NAME=PORT[/PROTOCOL]", help="All named ports; again for more."
)
@click.option("--no-ports", is_flag=True, help="Forget the named ports.")
@pass_ctl
def set_(
    ctl: Ctl, what: str, audit: bool | None, lockdown: bool | None, ports: Sequence[str], no_ports: bool
) -> None:
    """Switch the audit mode or lockdown of an endpoint, by number or as `fibril endpoint get` knows it, or name its ports.
    Endpoint 0, or "host", is the host.
    """
    from fibril.policy.v1 import policy_pb2 as pb
    from services.ctl.commands.endpoint import find

    endpoint = 0 if what == "host" else int(what) if what.isdecimal() else find(ctl, what)["id"]
    if endpoint > ENDPOINT_MAX:
        raise click.BadParameter(f"{endpoint} is outside 0..{ENDPOINT_MAX}", param_hint="ENDPOINT")
    if audit is not None or lockdown is not None:
        request = pb.SetEndpointModeRequest(endpoint=endpoint, audit=audit, lockdown=lockdown)
        answer = _ask(ctl, "SetEndpointMode", request)
    elif not ports and not no_ports:
        raise click.UsageError("give a switch or ports")
    if ports or no_ports:
        named = pb.SetNamedPortsRequest(endpoint=endpoint)
        for text in ports:
            name, _, where = text.partition("=")
            number, _, protocol = where.partition("/")
            if not number.isdecimal() or (protocol or "tcp") not in PROTOCOLS:
                raise click.BadParameter(f"{text!r}: write http=8080 or dns=53/udp", param_hint="--port")
            named.ports[name].port = int(number)
            named.ports[name].protocol = pb.PortProtocol.ValueType(PROTOCOLS[protocol or "tcp"])
        answer = _ask(ctl, "SetNamedPorts", named)
    ctl.show([to_record(answer.endpoint)], ENDPOINTS)


@command.command("wait")
@click.option("--revision", type=click.IntRange(0), default=0, help="As apply -o json gives it; 0: what is known.")
@pass_ctl
def wait(ctl: Ctl, revision: int) -> None:
    """Return once this node enforces all policies."""
    from fibril.policy.v1 import policy_pb2 as pb

    _ask(ctl, "WaitEnforced", pb.WaitEnforcedRequest(revision=revision), _LONG_S)


@command.command("usage")
@pass_ctl
def usage(ctl: Ctl) -> None:
    """Show what policies take in the kernel."""
    from fibril.policy.v1 import policy_pb2 as pb

    ctl.describe(to_record(_ask(ctl, "GetUsage", pb.GetUsageRequest())))
