"""The command line itself: quick, helpful, and exact about exit codes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import click
import pytest

from services.common.errors import InvalidArgument
from services.ctl import main
from services.ctl.commands import monitor

HEAVY = ("grpc", "google.protobuf", "pyroute2", "asyncio", "services.common.kernel")


def walk(command: click.Command, path: tuple[str, ...] = ()) -> list[tuple[str, ...]]:
    found = [path]
    if isinstance(command, click.Group):
        ctx = click.Context(command)
        for name in command.list_commands(ctx):
            sub = command.get_command(ctx, name)
            assert sub is not None
            found += walk(sub, (*path, name))
    return found


def test_every_command_has_help(capsys: pytest.CaptureFixture[str]) -> None:
    paths = walk(main.cli)
    assert ("ipam", "pool", "put") in paths
    for path in paths:
        assert main.run([*path, "--help"]) == 0
        text = capsys.readouterr().out
        assert text.startswith("Usage: fibril")
        # The sentence under the usage line.
        assert len(text.split("\n\n")[1].strip()) > 10, path


@pytest.mark.parametrize("heavy", HEAVY)
def test_help_imports_nothing_heavy(heavy: str) -> None:
    program = (
        "import sys; from services.ctl import main; main.run(['--help']); "
        f"sys.exit(sum(m == {heavy!r} or m.startswith({heavy + '.'!r}) for m in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)


def test_wrong_command_lines_exit_with_2_and_name_the_near_miss(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["endpiont", "ls"]) == 2
    assert "Did you mean 'endpoint'?" in capsys.readouterr().err
    assert main.run(["-o", "xml", "status"]) == 2
    assert main.run(["pod", "add"]) == 2


def test_the_output_may_be_named_before_or_behind_the_command(capsys: pytest.CaptureFixture[str]) -> None:
    for words in (["-o", "json", "version"], ["version", "-o", "json"], ["-o", "yaml", "version", "--output", "json"]):
        assert main.run(words) == 0
        assert json.loads(capsys.readouterr().out)["kernel"]
    assert main.run(["version", "-o", "xml"]) == 2
    # What is behind such an `exec` belongs to the command that is executed.
    places = {("pod", "exec"): False, ("lab", "exec"): False, ("trace", "exec"): True, ("policy", "why"): True}
    for path, taken in places.items():
        assert main.run([*path, "--help"]) == 0
        assert ("--output" in capsys.readouterr().out) == taken, path


def test_a_failure_is_a_sentence_and_a_hint(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--instance", "not-there-at-all", "endpoint", "ls"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("fibril: node 'not-there-at-all' is not running")
    assert lines[1] == "  hint: start it with: fibril --instance not-there-at-all up"
    assert len(lines) == 2


def test_an_impossible_instance_name_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--instance", "No/Way", "endpoint", "ls"]) == 1
    assert "No/Way" in capsys.readouterr().err


def test_unexpected_errors_are_reported_without_traceback_unless_asked(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("FIBRIL_DEBUG", raising=False)
    assert main.report(ValueError("odd")) == 1
    assert "ValueError: odd" in capsys.readouterr().err
    monkeypatch.setenv("FIBRIL_DEBUG", "1")
    with pytest.raises(ValueError, match="odd"):
        main.report(ValueError("odd"))
    assert main.report(InvalidArgument("bad", field="x", fix="mend it")) == 1
    assert capsys.readouterr().err == "fibril: bad (x)\n  hint: mend it\n"


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_scripts_name_the_command(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["completion", shell]) == 0
    assert "_FIBRIL_COMPLETE" in capsys.readouterr().out


def test_version_is_printed_both_ways(capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--version"]) == 0
    name, version = capsys.readouterr().out.split()
    assert name == "fibril"
    assert main.run(["-o", "json", "version"]) == 0
    assert f'"fibril": "{version}"' in capsys.readouterr().out


def test_a_closed_pipe_is_not_an_error_message(tmp_path: Path) -> None:
    script = f"{sys.executable} -m services.ctl.main completion bash 2>{tmp_path}/err | true"
    subprocess.run(["bash", "-c", script], check=True)
    assert (tmp_path / "err").read_text() == ""


def test_events_are_shown_with_names() -> None:
    event = {
        "time_unix_nanos": 1_700_000_000_123_456_789, "verdict": "VERDICT_DROPPED", "protocol": 6,
        "tcp_flags": 0x12, "ethertype": 0x0800,
        "reason": "DROP_REASON_SPOOFED_MAC", "direction": "DIRECTION_FROM_POD",
        "source": "fd00::1", "source_port": 80, "source_pod": "shop/cart-0",
        "destination": "10.0.0.1", "destination_port": 0, "destination_pod": "",
    }  # fmt: skip
    assert monitor.protocol(event) == "tcp SA"
    assert monitor.party(event, "source") == "shop/cart-0([fd00::1]:80)"
    assert monitor.party(event, "destination") == "10.0.0.1"
    assert monitor.reason(event["reason"]) == "spoofed-mac"
    assert monitor.clock(event["time_unix_nanos"]).endswith(".123")
    assert monitor.protocol({**event, "protocol": 0, "ethertype": 0x0806}) == "arp"
    assert monitor.protocol({**event, "protocol": 0, "ethertype": 0x1234}) == "ether 0x1234"
