"""What the commands of the lb service share: reaching it, reading "address:port" and whole files."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from services.ctl.context import Ctl, completed, pages

if TYPE_CHECKING:
    from fibril.lb.v1 import lb_pb2 as pb

SERVICE = "lb"
_DIGITS = 9
"""More do not fit the messages; what a port or weight may be is said by the service."""


def stub(channel: Any) -> Any:
    """A stub of LbService."""
    from fibril.lb.v1 import lb_pb2_grpc

    return lb_pb2_grpc.LbServiceStub(channel)


def ask(ctl: Ctl, method: str, request: Any) -> Any:
    """One call."""
    return ctl.call(lambda ch: getattr(stub(ch), method)(request, timeout=ctl.seconds), SERVICE)


def services(ctl: Ctl, prefix: str = "", *, backends: bool = True) -> list[pb.Service]:
    """All services whose names begin so, sorted."""
    return ctl.call(lambda ch: fetch(ctl, ch, prefix, backends=backends), SERVICE)


async def fetch(ctl: Ctl, channel: Any, prefix: str = "", *, backends: bool = True) -> list[pb.Service]:
    """As `services`, with a channel."""
    from fibril.lb.v1 import lb_pb2

    # What is large must fit a message.
    size = 100 if backends else 1000

    async def page(request: Any) -> Any:
        request.size = size
        return await stub(channel).ListServices(
            lb_pb2.ListServicesRequest(page=request, prefix=prefix, without_backends=not backends),
            timeout=ctl.seconds,
        )

    return await pages(page, "services")


def complete_service(ctx: click.Context, _param: click.Parameter, incomplete: str) -> list[str]:
    """Names of services."""
    return completed(
        ctx, incomplete, lambda ctl: [each.name for each in services(ctl, incomplete, backends=False)]
    )


def is_number(text: str) -> bool:
    """Whether it can be sent as a port or a weight."""
    return text.isdecimal() and len(text) <= _DIGITS


def backend(text: str) -> pb.Backend:
    """Of "address:port" or "address:port=weight". InvalidArgument."""
    from fibril.lb.v1 import lb_pb2
    from services.common.errors import InvalidArgument

    where, equals, weight = text.partition("=")
    if equals and not is_number(weight):
        raise InvalidArgument(f"{weight!r} is no weight", field="backend", fix="as 10.0.0.1:80=3")
    address, port = endpoint(where, "backend")
    return lb_pb2.Backend(address=address, port=port, weight=int(weight or 1))


def endpoint(text: str, field: str) -> tuple[str, int]:
    """Address and port of "10.0.0.1:80" or "[fd00::1]:80". InvalidArgument."""
    from services.common.errors import InvalidArgument

    address, colon, port = text.rpartition(":")
    if not colon or not is_number(port) or (":" in address and not address.startswith("[")):
        raise InvalidArgument(
            f"{text!r} is not an address and port", field=field, fix="as 10.0.0.1:80 or [fd00::1]:80"
        )
    return address.strip("[]"), int(port)


def with_protocol(text: str, field: str) -> tuple[str, int]:
    """What is before "/tcp", "/udp" or "/sctp", and the protocol's number; TCP when nothing is said. InvalidArgument."""
    from fibril.lb.v1 import lb_pb2
    from services.common.errors import InvalidArgument

    rest, _, name = text.partition("/")
    try:
        return rest, int(lb_pb2.Protocol.Value(f"PROTOCOL_{(name or 'tcp').upper()}"))
    except ValueError:
        raise InvalidArgument(f"{name!r} is no protocol", field=field, fix="use tcp, udp or sctp") from None


def backend_keys(texts: Sequence[str]) -> list[pb.BackendKey]:
    """Of "address:port" words."""
    from fibril.lb.v1 import lb_pb2

    pairs = [endpoint(text, "backends") for text in texts]
    return [lb_pb2.BackendKey(address=address, port=port) for address, port in pairs]


def shown_endpoint(address: str, port: int, last: int = 0) -> str:
    """address:port, IPv6 in brackets, "*" for every address of a node; port-last for a range."""
    where = {"0.0.0.0": "*", "::": "[*]"}.get(address, f"[{address}]" if ":" in address else address)
    return f"{where}:{port}-{last}" if last and last != port else f"{where}:{port}"


def read(files: Iterable[str]) -> str:
    """Several files as one stream of documents; "-" is standard input. NotFound, InvalidArgument."""
    from services.common.errors import InvalidArgument, NotFound

    texts = []
    for name in files:
        try:
            texts.append(sys.stdin.read() if name == "-" else Path(name).read_text())
        except OSError as error:
            raise NotFound(f"cannot read {name}: {error.strerror}", field="file") from None
        except UnicodeDecodeError:
            raise InvalidArgument(f"{name} is no text in UTF-8", field="file") from None
    return "\n---\n".join(texts)
