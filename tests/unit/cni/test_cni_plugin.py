"""The plugin as a runtime runs it: a process with an environment, standard input and output."""

from __future__ import annotations

import ast
import json
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

SOURCE = Path(__file__).parents[3] / "services/ipam/cni/plugin.py"
CONFIG = b'{"cniVersion": "1.0.0", "name": "net", "type": "fibril-cni"}'


class Plugin:
    """A copy of the plugin that talks to `socket`."""

    def __init__(self, directory: Path, retry_seconds: float = 10.0, answer_seconds: int = 10) -> None:
        self.socket = directory / "cni.sock"
        self.path = directory / "fibril-cni"
        text = SOURCE.read_text()
        for name, value in (
            ("SOCKET", repr(str(self.socket))),
            ("RETRY_SECONDS", repr(retry_seconds)),
            ("ANSWER_SECONDS", repr(answer_seconds)),
        ):
            text, count = re.subn(rf"^{name} = .*$", f"{name} = {value}", text, flags=re.MULTILINE)
            assert count == 1
        self.path.write_text(text)

    def run(self, command: str, config: bytes = CONFIG, **variables: str) -> tuple[int, dict[str, Any]]:
        environment = {"CNI_COMMAND": command, "UNRELATED": "x", **variables}
        done = subprocess.run(
            [sys.executable, "-IS", self.path], input=config, env=environment, capture_output=True, timeout=20
        )
        assert done.stderr == b""
        return done.returncode, json.loads(done.stdout)


@pytest.fixture
def plugin(tmp_path: Path) -> Plugin:
    return Plugin(tmp_path)


@pytest.fixture
def hasty(tmp_path: Path) -> Plugin:
    """One that soon gives up."""
    return Plugin(tmp_path, retry_seconds=0.3, answer_seconds=1)


@pytest.fixture
def serve(plugin: Plugin) -> Iterator[Callable[..., list[bytes]]]:
    """serve(answer, answer…): a service that answers successive calls so; returns what it was sent."""
    listener = socket.socket(socket.AF_UNIX)
    threads = []

    def start(*answers: bytes) -> list[bytes]:
        received: list[bytes] = []
        listener.bind(str(plugin.socket))
        listener.listen()

        def loop() -> None:
            for answer in answers:
                connection, _ = listener.accept()
                with connection, connection.makefile("rb") as stream:
                    sizes = stream.readline().split()
                    received.append(stream.read(int(sizes[0])) + b"|" + stream.read(int(sizes[1])))
                    connection.sendall(answer)

        threads.append(threading.Thread(target=loop, daemon=True))
        threads[0].start()
        return received

    yield start
    listener.close()


def framed(code: int, output: bytes) -> bytes:
    return b"%d %d\n" % (code, len(output)) + output


def test_only_modules_built_into_debians_interpreter_are_imported() -> None:
    names = set()
    for node in ast.walk(ast.parse(SOURCE.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module or "")
    assert names <= {"sys", "os", "posix", "_socket", "time"}
    assert SOURCE.read_text().startswith("#!/usr/bin/python3 -IS\n") and os.access(SOURCE, os.X_OK)


@pytest.mark.parametrize(
    "config, version",
    [
        (b'{"cniVersion": "0.4.0"}', "0.4.0"),
        (b'{"a":1,"cniVersion":"1.0.0"}', "1.0.0"),
        (b"", "1.1.0"),
        (b'{"cniVersion": 3}', "1.1.0"),
        (b'{"cniVersion": "x\\""}', "1.1.0"),
    ],
)
def test_version_is_answered_without_the_service(plugin: Plugin, config: bytes, version: str) -> None:
    code, answer = plugin.run("VERSION", config)
    assert code == 0
    assert answer["cniVersion"] == version
    assert answer["supportedVersions"] == ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"]


def test_the_service_gets_cni_variables_and_configuration(
    plugin: Plugin, serve: Callable[..., list[bytes]]
) -> None:
    received = serve(framed(0, b'{"ok": true}'))
    assert plugin.run("ADD", CNI_ARGS="K=V;é=1", CNI_IFNAME="eth0") == (0, {"ok": True})
    variables, config = received[0].split(b"|", 1)
    assert sorted(variables.split(b"\0")) == [
        b"", b"CNI_ARGS=K=V;" + "é".encode() + b"=1", b"CNI_COMMAND=ADD", b"CNI_IFNAME=eth0",
    ]  # fmt: skip
    assert config == CONFIG


def test_errors_of_the_service_are_printed_with_its_exit_code(
    plugin: Plugin, serve: Callable[..., list[bytes]]
) -> None:
    serve(framed(1, b'{"code": 7}'))
    assert plugin.run("ADD") == (1, {"code": 7})


@pytest.mark.parametrize("first", [b"", b"0 900\n{", b"0"])
def test_a_call_broken_off_is_sent_again(
    plugin: Plugin, serve: Callable[..., list[bytes]], first: bytes
) -> None:
    received = serve(first, framed(0, b'{"second": 1}'))
    assert plugin.run("ADD") == (0, {"second": 1})
    assert received[0] == received[1]


@pytest.mark.parametrize("command", ["ADD", "DEL", "CHECK", "GC"])
def test_an_absent_service_is_try_again_later(hasty: Plugin, command: str) -> None:
    began = time.monotonic()
    code, answer = hasty.run(command)
    assert (code, answer["code"], answer["cniVersion"]) == (1, 11, "1.0.0")
    assert str(hasty.socket) in answer["details"] and "fibril up" in answer["details"]
    assert 0.3 <= time.monotonic() - began < 20


def test_status_of_an_absent_service_is_not_available(hasty: Plugin) -> None:
    code, answer = hasty.run("STATUS")
    assert (code, answer["code"]) == (1, 50)


def test_a_service_that_hangs_is_try_again_later(hasty: Plugin) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(hasty.socket))
        listener.listen()
        code, answer = hasty.run("ADD")
    assert (code, answer["code"]) == (1, 11)


def test_a_service_that_comes_back_is_waited_for(tmp_path: Path) -> None:
    plugin = Plugin(tmp_path)

    def serve_once(answer: bytes) -> None:
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(str(plugin.socket))
            listener.listen()
            connection, _ = listener.accept()
            with connection:
                assert connection.recv(65536)
                plugin.socket.unlink()
                connection.sendall(answer)

    process = subprocess.Popen(
        [sys.executable, "-IS", plugin.path],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        env={"CNI_COMMAND": "ADD"},
    )
    assert process.stdout is not None
    with process.stdout:
        serve_once(b"")  # dies in the middle of the call; its socket is gone
        serve_once(framed(0, b"done"))
        assert process.stdout.read() == b"done" and process.wait() == 0


def test_without_a_command_it_says_what_it_is(plugin: Plugin) -> None:
    assert plugin.run("")[1]["code"] == 4


@settings(max_examples=25, suppress_health_check=list(HealthCheck))
@given(
    config=st.binary(max_size=300)
    | st.text(max_size=100).map(lambda text: json.dumps({"cniVersion": text}).encode())
)
def test_any_input_gets_a_json_answer(hasty: Plugin, config: bytes) -> None:
    for command in ("VERSION", "STATUS"):
        code, answer = hasty.run(command, config)
        assert code in (0, 1) and re.fullmatch(r"[0-9.]+", answer["cniVersion"])
