"""What every command gets: the instance, how to print, how long to wait, and how to reach the services."""

from __future__ import annotations

import os
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from services.ctl.render import Column, Record, Stream, details, render

if TYPE_CHECKING:
    import grpc.aio

    from services.common.instance import Instance

T = TypeVar("T")

OUTPUTS = ("table", "json", "yaml")
DEFAULT_TIMEOUT = 10.0
READY_S = 5.0  # longest wait for a service to accept connections


@dataclass(frozen=True)
class Ctl:
    """The global options of one command line."""

    name: str
    output: str
    config: Path | None
    timeout: float | None

    @property
    def instance(self) -> Instance:
        """The instance; raises InvalidArgument for a name that cannot be one."""
        from services.common.instance import Instance

        return Instance.from_env(self.name)

    @property
    def seconds(self) -> float:
        """Longest wait for one answer."""
        return DEFAULT_TIMEOUT if self.timeout is None else self.timeout

    def call(self, use: Callable[[grpc.aio.Channel], Awaitable[T]], service: str = "ipam") -> T:
        """Run `use` with a channel to a service of the node; RPC failures become FibrilError.

        Raises Unavailable at once when the node is not running."""
        import asyncio

        return asyncio.run(self._call(use, service))

    async def _call(self, use: Callable[[grpc.aio.Channel], Awaitable[T]], service: str) -> T:
        import asyncio

        import grpc

        from services.common.errors import Unavailable
        from services.common.rpc.status import from_rpc_error

        async with self.channel(service) as channel:
            try:
                # A service that is being restarted is back in a moment.
                await asyncio.wait_for(channel.channel_ready(), min(self.seconds, READY_S))
                return await use(channel)
            except TimeoutError:
                raise Unavailable(
                    f"the {service} service of node {self.name!r} does not answer",
                    fix=f"see what ails it: fibril --instance {self.name} status",
                ) from None
            except grpc.aio.AioRpcError as error:
                raise from_rpc_error(error) from None

    def channel(self, service: str = "ipam") -> grpc.aio.Channel:
        """An open channel to a service on its unix socket. Raises Unavailable when there is no such
        socket."""
        from services.common.errors import Unavailable
        from services.common.rpc.client import channel

        socket = self.instance.socket(service)
        if not socket.exists():
            if any(self.instance.run_dir.glob("*.sock")):
                raise Unavailable(
                    f"the {service} service of node {self.name!r} is not running: there is no {socket}",
                    fix=f"start it with: fibril --instance {self.name} up",
                )
            raise Unavailable(
                f"node {self.name!r} is not running: there is no {socket}",
                fix=f"start it with: fibril --instance {self.name} up",
            )
        return channel(f"unix:{socket}")

    def stream(
        self,
        open_stream: Callable[[grpc.aio.Channel], AsyncIterator[Any]],
        handle: Callable[[Any], None],
        service: str = "ipam",
    ) -> None:
        """Hand every message of a server stream to `handle` until it ends or the user interrupts."""

        async def use(channel: grpc.aio.Channel) -> None:
            async for message in open_stream(channel):
                handle(message)

        self.call(use, service)

    def show(self, records: Sequence[Record] | Record, cols: Sequence[Column], empty: str = "") -> None:
        """Print records the way the user asked for."""
        click.echo(render(records, self.output, cols, empty))

    def describe(self, record: Record) -> None:
        """Print one record in full."""
        click.echo(details(record, self.output))

    def live(self, cols: Sequence[Column], widths: Sequence[int] = ()) -> Stream:
        """A printer for records that come one by one."""
        return Stream(sys.stdout, self.output, cols, widths)


async def pages(fetch: Callable[[Any], Awaitable[Any]], items: str) -> list[Any]:
    """All elements of a paged List: `fetch(PageRequest)` gives a page, `items` names its repeated field."""
    from fibril.types.v1.types_pb2 import PageRequest

    found: list[Any] = []
    token = ""
    while True:
        page = await fetch(PageRequest(token=token))
        found.extend(getattr(page, items))
        token = page.next_token
        if not token:
            return found


def completed(ctx: click.Context, incomplete: str, names: Callable[[Ctl], Sequence[str]]) -> list[str]:
    """Completions asked from a service: none when it does not answer at once."""
    from dataclasses import replace

    from services.common.errors import FibrilError

    # While completing, click reads the command line and calls nothing: there are options, but no Ctl yet.
    given = ctx.find_root().params
    ctl = ctx.find_object(Ctl) or Ctl(given["instance"], given["output"], given["config"], given["timeout"])
    try:
        return [name for name in names(replace(ctl, timeout=1.0)) if name.startswith(incomplete)]
    except FibrilError:
        return []


def words(argv: Sequence[str]) -> list[str]:
    """The command of an `exec` and its arguments, by default a shell. A leading "--" is ours, not the command's."""
    given = list(argv[1:] if argv[:1] == ("--",) else argv)
    return given or [os.environ.get("SHELL", "/bin/sh")]


EXEC_SETTINGS = {"allow_interspersed_args": False}  # options behind the first word belong to the command

pass_ctl = click.make_pass_decorator(Ctl)
