"""Running programs."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from services.common import process
from services.common.errors import DeadlineExceeded, FailedPrecondition, Internal


async def test_output_input_environment_and_directory(tmp_path: Path) -> None:
    result = await process.run(
        ["sh", "-c", 'cat; echo "$COLOUR"; pwd; echo oops >&2'],
        input="in\n",
        env={"COLOUR": "red"},
        cwd=tmp_path,
    )
    assert result == process.Result(0, f"in\nred\n{tmp_path}\n", "oops\n")


async def test_a_failure_names_what_was_said_and_logs_a_line_to_paste(
    caplog: pytest.LogCaptureFixture,
) -> None:
    command = ["sh", "-c", "cat >/dev/null; echo it is broken >&2; exit 3"]
    with pytest.raises(Internal, match="sh failed with code 3: it is broken; mend it"):
        await process.run(command, input="some 'input'\n", fix="mend it")
    pasted = caplog.records[-1].getMessage().split(": ", 1)[1].rsplit("\n", 1)[0]
    again = await process.run(["sh", "-c", pasted], check=False)
    assert (again.code, again.stderr) == (3, "it is broken\n")


async def test_unchecked_failures_and_signals_are_results() -> None:
    assert (await process.run(["sh", "-c", "exit 3"], check=False)).code == 3
    assert (await process.run(["sh", "-c", "kill -9 $$"], check=False)).code == -9
    with pytest.raises(Internal, match="SIGKILL"):
        await process.run(["sh", "-c", "kill -9 $$"])


async def test_a_missing_program_is_a_precondition(tmp_path: Path) -> None:
    with pytest.raises(FailedPrecondition, match=r"cannot run .*nothing-here.*install it"):
        await process.run(["nothing-here"])
    (tmp_path / "plain").write_text("not executable")
    with pytest.raises(FailedPrecondition, match="Permission denied"):
        await process.run([tmp_path / "plain"])


async def test_one_that_takes_too_long_is_killed_with_what_it_started(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    with pytest.raises(DeadlineExceeded, match="did not end within 2 s"):
        await process.run(["sh", "-c", f"sleep 100 & echo $! $$ >{pids}; wait"], timeout_s=2)
    await _gone(*map(int, pids.read_text().split()))


async def test_a_cancelled_caller_leaves_nothing_behind(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    task = asyncio.create_task(process.run(["sh", "-c", f"sleep 100 & echo $! $$ >{pids}; wait"]))
    await _until(lambda: pids.exists() and len(pids.read_text().split()) == 2)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    await _gone(*map(int, pids.read_text().split()))


async def test_a_caller_cancelled_while_it_begins_leaves_nothing_behind(tmp_path: Path) -> None:
    pids = tmp_path / "pids"
    task = asyncio.create_task(process.run(["sh", "-c", f"sleep 100 & echo $! $$ >{pids}; wait"]))
    for _ in range(10):
        await asyncio.sleep(0)
        # It has a child of its own by the time that our side has heard of its start.
        if _written(pids):
            break
    task.cancel()
    async with asyncio.timeout(20):
        await asyncio.wait({task})
    assert task.cancelled()
    await _gone(*map(int, pids.read_text().split()))


def _written(pids: Path) -> bool:
    """Whether both numbers are there, soon; holds up the event loop."""
    for _ in range(50):
        if pids.exists() and len(pids.read_text().split()) == 2:
            return True
        time.sleep(0.01)
    return False


async def _gone(*pids: int) -> None:
    """Wait until none of them runs; a zombie that waits for its new parent does not count."""
    await _until(lambda: not any(_running(pid) for pid in pids))


async def _until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():  # noqa: ASYNC110 other processes set no event
            await asyncio.sleep(0.01)


def _running(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return pid != os.getpid() and stat.rpartition(")")[2].split()[0] != "Z"
