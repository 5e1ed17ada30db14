"""`fibril`: the command. This file holds the global options, the table of commands, and what happens to
errors.

Command modules are imported when they are needed, and import gRPC and the kernel adapters only inside the
functions that use them, so that help and completion answer at once.

Exit codes: 0 done and well; 1 the operation failed, or (`status`, `check`, `endpoint check`) something is
not well; 2 the command line is wrong; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import click

from services.ctl.context import EXEC_SETTINGS, OUTPUTS, Ctl

PROG = "fibril"

# Command -> module below services.ctl.commands that holds it as `command`.
COMMANDS = {
    "up": "up",
    "down": "down",
    "status": "status",
    "check": "check",
    "pod": "pod",
    "ipam": "ipam",
    "endpoint": "endpoint",
    "identity": "identity",
    "ipcache": "ipcache",
    "node": "node",
    "service": "service",
    "backend": "backend",
    "lb": "lb",
    "policy": "policy",
    "flow": "flow",
    "prefilter": "prefilter",
    "sockaccel": "sockaccel",
    "tls": "tls",
    "connectivity": "connectivity",
    "monitor": "monitor",
    "trace": "trace",
    "whoami": "whoami",
    "cni": "cni",
    "bpf": "bpf",
    "lab": "lab",
    "completion": "completion",
    "version": "version",
}


def _output(ctx: click.Context, _param: click.Parameter, value: str | None) -> None:
    if value is not None and not ctx.resilient_parsing:
        ctx.obj = replace(ctx.obj, output=value)


def _take_output(command: click.Command) -> None:
    """Have `--output` taken behind the command as well, where most people write it."""
    if isinstance(command, click.Group):
        for each in command.commands.values():
            _take_output(each)
    elif command.context_settings != EXEC_SETTINGS and all(each.name != "output" for each in command.params):
        command.params.append(
            click.Option(
                ["--output", "-o"],
                type=click.Choice(OUTPUTS),
                expose_value=False,
                callback=_output,
                help="How to print results.",
            )
        )


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        module = COMMANDS.get(cmd_name)
        if module is None:
            return None
        command: click.Command = import_module(f"services.ctl.commands.{module}").command
        _take_output(command)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        try:
            return super().resolve_command(ctx, args)
        except click.UsageError as error:
            from difflib import get_close_matches

            near = get_close_matches(args[0], COMMANDS, 1) if args else []
            if near:
                raise click.UsageError(f"{error.message} Did you mean {near[0]!r}?", ctx) from None
            raise


def _version(ctx: click.Context, _param: click.Parameter, value: bool) -> None:
    if value and not ctx.resilient_parsing:
        from services.common.version import version

        click.echo(f"{PROG} {version()}")
        ctx.exit()


@click.group(
    cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.option(
    "--instance",
    "-i",
    envvar="FIBRIL_INSTANCE",
    default="node",
    show_default=True,
    metavar="NAME",
    help="The node to work on; several nodes can live on one kernel. [env: FIBRIL_INSTANCE]",
)
@click.option(
    "--output",
    "-o",
    type=click.Choice(OUTPUTS),
    default="table",
    show_default=True,
    help="How to print results.",
)
@click.option(
    "--config",
    type=click.Path(exists=True, dir_okay=False, path_type=Path),
    envvar="FIBRIL_CONFIG",
    help="Configuration file of the services (`up`). [env: FIBRIL_CONFIG]",
)
@click.option(
    "--timeout",
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
    help="Longest wait for an answer; by default 10, and 30 for `up`.",
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_version, help="Show the version."
)
@click.pass_context
def cli(ctx: click.Context, instance: str, output: str, config: Path | None, timeout: float | None) -> None:
    """Networking, addresses and policy for the containers of a node, by BPF."""
    ctx.obj = Ctl(name=instance, output=output, config=config, timeout=timeout)


def report(error: BaseException) -> int:
    """Print what went wrong as one sentence, and the way out if one is known; gives the exit code.

    An exception nobody expected is raised again when FIBRIL_DEBUG is set, so that its traceback is seen."""
    from services.common.errors import FibrilError

    if isinstance(error, FibrilError):
        where = f" ({error.field})" if error.field else ""
        click.echo(f"{PROG}: {error.message}{where}", err=True)
        if error.fix:
            click.echo(f"  hint: {error.fix}", err=True)
        return 1
    if os.environ.get("FIBRIL_DEBUG"):
        raise error
    text = str(error) or type(error).__name__
    click.echo(
        f"{PROG}: {text}" if isinstance(error, OSError) else f"{PROG}: {type(error).__name__}: {text}",
        err=True,
    )
    hint = (
        "run it as root"
        if isinstance(error, PermissionError)
        else "set FIBRIL_DEBUG=1 to see where it happened"
    )
    click.echo(f"  hint: {hint}", err=True)
    return 1


def run(args: Sequence[str] | None = None) -> int:
    """Run one command line; gives its exit code."""
    try:
        result: Any = cli.main(
            args=None if args is None else list(args), prog_name=PROG, standalone_mode=False
        )
        return result if isinstance(result, int) and not isinstance(result, bool) else 0
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except click.exceptions.Exit as error:
        return error.exit_code
    except (click.Abort, KeyboardInterrupt):
        return 130
    except BrokenPipeError:
        # The reader of our output (`| head`) has gone; keep the interpreter from complaining at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        return report(error)


def main() -> None:
    """Entry point of the console script."""
    sys.exit(run())


if __name__ == "__main__":
    main()
