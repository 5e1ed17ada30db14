"""Running programs: the one way Fibril calls another program and waits for it.

A command that fails is logged so that it can be pasted into a shell and tried by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import shlex
import signal
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import DeadlineExceeded, FailedPrecondition, Internal

log = logging.getLogger(__name__)

# Of the input that is logged, and of the output in an error.
_SHOWN = 2000


@dataclass(frozen=True)
class Result:
    """What a program that ended left."""

    code: int
    stdout: str
    stderr: str


async def run(
    cmd: Sequence[str | Path],
    *,
    input: str = "",
    timeout_s: float = 30.0,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    check: bool = True,
    fix: str = "",
) -> Result:
    """Run a program to its end, without a shell.

    input: for its standard input. env: added to our own environment. check: a code other than 0 is an error.
    fix: the remedy to name when it fails. It has `timeout_s` seconds; then, and when the caller is cancelled,
    it is killed with all that it has started.

    Raises FailedPrecondition when the program is not there or may not be run, DeadlineExceeded when it takes
    too long, Internal (with the end of what it said) when it fails and `check` is set.
    """
    argv = [os.fspath(part) for part in cmd]
    paste = shown(argv, input, env, cwd)
    starting = asyncio.create_task(
        asyncio.create_subprocess_exec(
            *argv,
            stdin=asyncio.subprocess.PIPE if input else asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
            env={**os.environ, **env} if env else None,
            cwd=cwd,
            # A group of its own, to kill what it has started along with it.
            start_new_session=True,
        )
    )
    try:
        process = await asyncio.shield(starting)
    except asyncio.CancelledError:
        # Were the start itself cancelled, asyncio would kill the one process, and wait for what that has started by then.
        with contextlib.suppress(OSError):
            await _kill(await starting)
        raise
    except (FileNotFoundError, PermissionError, NotADirectoryError) as error:
        log.error("command cannot be run: %s", paste)
        raise FailedPrecondition(
            f"cannot run {argv[0]}: {error.strerror}", fix=fix or "install it, or check PATH and permissions"
        ) from error
    try:
        async with asyncio.timeout(timeout_s):
            out, err = await process.communicate(input.encode() if input else None)
    except TimeoutError:
        await _kill(process)
        log.error("command did not end within %g s: %s", timeout_s, paste)
        raise DeadlineExceeded(f"{argv[0]} did not end within {timeout_s:g} s", fix=fix) from None
    except BaseException:
        await _kill(process)
        raise
    assert process.returncode is not None
    result = Result(process.returncode, out.decode(errors="replace"), err.decode(errors="replace"))
    if check and result.code:
        said = (result.stderr.strip() or result.stdout.strip())[-_SHOWN:]
        how = signal.Signals(-result.code).name if result.code < 0 else f"code {result.code}"
        log.error("command failed with %s: %s\n%s", how, paste, said)
        raise Internal(f"{argv[0]} failed with {how}: {said or 'it said nothing'}", fix=fix)
    return result


async def _kill(process: asyncio.subprocess.Process) -> None:
    """Kill its whole group. Only called while something of the group holds our pipes, so that its number cannot
    be another's.
    """
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    await process.wait()


def shown(
    argv: Sequence[str], input: str = "", env: Mapping[str, str] | None = None, cwd: Path | None = None
) -> str:
    """The command as one would type it."""
    text = shlex.join([*(f"{name}={value}" for name, value in (env or {}).items()), *argv])
    if cwd is not None:
        text = f"cd {shlex.quote(str(cwd))} && {text}"
    if not input:
        return text
    if len(input) > _SHOWN:
        return f"{text}  # with {len(input)} characters of input, beginning {input[:80]!r}"
    return f"{text} <<'END'\n{input.rstrip()}\nEND"
