#!/usr/bin/python3 -IS
"""fibril-cni: the CNI plugin a container runtime executes. It carries a call to the ipam service.

Start-up time is what this file is judged by, so it stands alone and imports nothing that is not built into
the interpreter. It decides nothing: environment and standard input go over a unix socket, the answer comes
back with its exit code (framing: services/ipam/cni/server.py). VERSION alone is answered here, so that it
works while the service is away.

A service that restarts is waited for: a call whose connection is refused or broken off is sent again for as
long as RETRY_SECONDS last (ADD and DEL are idempotent). STATUS asks whether the service is there, so it is
sent once. Every way out is bounded; a service that stays away is CNI error 11, "try again later".
"""

import _socket
import sys
import time
from posix import _exit, environ, read, write

# `fibril cni install` writes the socket of its instance in here.
SOCKET = "/run/fibril/node/cni.sock"

# How long an absent service is waited for, and how long an answer may take (the service gives up earlier).
RETRY_SECONDS = 8.0
ANSWER_SECONDS = 40
MAX_INPUT = 4 << 20

VERSIONS = ("0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0")


def quoted(text: str) -> str:
    """A JSON string; there is no time to import json."""
    out = []
    for char in text:
        out.append(char if " " <= char <= "~" and char not in '"\\' else f"\\u{min(ord(char), 0xFFFF):04x}")
    return '"' + "".join(out) + '"'


def config_version(config: bytes) -> str:
    """The first cniVersion in the configuration, near enough for VERSION and errors; else the newest."""
    after = config.partition(b'"cniVersion"')[2].lstrip(b" \t\r\n")
    if after[:1] == b":":
        value = after[1:].lstrip(b" \t\r\n")
        if value[:1] == b'"':
            version = value[1:17].partition(b'"')[0]
            if version and not version.strip(b"0123456789."):
                return version.decode()
    return VERSIONS[-1]


def finish(code: int, output: bytes) -> None:
    """Print and end at once, without the interpreter's tear-down."""
    while output:
        output = output[write(1, output) :]
    _exit(code)


def fail(config: bytes, code: int, message: str, details: str) -> None:
    """End with a CNI error."""
    finish(
        1,
        f'{{"cniVersion": {quoted(config_version(config))}, "code": {code}, "msg": {quoted(message)}, '
        f'"details": {quoted(details)}}}\n'.encode(),
    )


def read_config() -> bytes:
    """Standard input; more than MAX_INPUT bytes are not read to the end."""
    config = b""
    while len(config) <= MAX_INPUT:
        part = read(0, 65536)
        if not part:
            break
        config += part
    return config


def call(request: bytes) -> tuple[int, bytes]:
    """Send one request. OSError: the service is away or broke off; BlockingIOError: it took too long."""
    sock = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    # Socket options instead of settimeout(): a non-blocking connect() to a busy unix socket fails at once.
    seconds = ANSWER_SECONDS.to_bytes(8, sys.byteorder) + bytes(8)
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_SNDTIMEO, seconds)
    sock.setsockopt(_socket.SOL_SOCKET, _socket.SO_RCVTIMEO, seconds)
    sock.connect(SOCKET)
    sock.sendall(request)
    answer = b""
    while True:
        part = sock.recv(65536)
        if not part:
            break
        answer += part
    head, newline, body = answer.partition(b"\n")
    fields = head.split()
    if not newline or len(fields) != 2 or int(fields[1]) != len(body):
        raise ConnectionResetError("the service broke off in its answer")
    return int(fields[0]), body


def main() -> None:
    """Answer VERSION, pass on everything else."""
    config = read_config()
    if len(config) > MAX_INPUT:
        fail(config, 6, "the network configuration is too large", f"more than {MAX_INPUT} bytes")
    command = environ.get(b"CNI_COMMAND", b"")
    if command == b"VERSION":
        supported = ", ".join(quoted(version) for version in VERSIONS)
        version = quoted(config_version(config))
        finish(0, f'{{"cniVersion": {version}, "supportedVersions": [{supported}]}}\n'.encode())
    if not command:
        fail(config, 4, "CNI_COMMAND is not set", "fibril-cni is run by a container runtime, not by hand")
    variables = b"".join(b"%s=%s\0" % pair for pair in environ.items() if pair[0][:4] == b"CNI_")
    request = b"%d %d\n" % (len(variables), len(config)) + variables + config
    deadline = time.monotonic() + (0 if command == b"STATUS" else RETRY_SECONDS)
    while True:
        try:
            finish(*call(request))
        except BlockingIOError:
            fail(
                config,
                11,
                "fibril's ipam service does not answer, try again later",
                f"no answer on {SOCKET} within {ANSWER_SECONDS} s; `fibril status` says what is wrong",
            )
        except (OSError, ValueError) as error:
            if time.monotonic() >= deadline:
                fail(
                    config,
                    50 if command == b"STATUS" else 11,
                    "fibril's ipam service is not running, try again later",
                    f"{SOCKET}: {error}; start it with `fibril up`",
                )
        time.sleep(0.05)


if __name__ == "__main__":
    main()
