"""The unix socket: its permissions, who is let in, dead and living predecessors."""

from __future__ import annotations

import grp
import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from fibril.ipam.v1.ipam_pb2 import GetPoolRequest
from services.common.errors import FailedPrecondition
from services.common.rpc.server import RpcConfig
from tests.unit.common.rig import Start

# Connects as an unprivileged user with the given supplementary groups; exit code 0: let in, 13: EACCES.
CONNECT = (
    "import os, socket, sys; os.setgroups([int(g) for g in sys.argv[2:]]);"
    "os.setgid(65534); os.setuid(65534);"
    "s = socket.socket(socket.AF_UNIX); sys.exit(s.connect_ex(sys.argv[1]))"
)
LISTEN = (
    "import socket, sys; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen();"
    "print('up', flush=True); sys.stdin.read()"
)


async def test_the_socket_is_for_root_and_the_group(start: Start, run_dir: Path) -> None:
    await start(RpcConfig(socket_group="games"))
    found = (run_dir / "ipam.sock").stat()
    assert stat.S_IMODE(found.st_mode) == 0o660
    if os.geteuid() == 0:
        assert found.st_gid == grp.getgrnam("games").gr_gid
    assert sorted(path.name for path in run_dir.iterdir()) == ["ipam.sock"]


async def test_a_group_that_does_not_exist_is_no_obstacle(start: Start, run_dir: Path) -> None:
    await start(RpcConfig(socket_group="no-such-group"))
    assert (run_dir / "ipam.sock").stat().st_gid == os.getegid()


@pytest.mark.skipif(os.geteuid() != 0, reason="takes on other users' credentials, which needs root")
async def test_the_kernel_lets_in_the_group_and_nobody_else(start: Start, run_dir: Path) -> None:
    await start(RpcConfig(socket_group="games"))
    command = [sys.executable, "-c", CONNECT, str(run_dir / "ipam.sock")]
    assert subprocess.run(command, check=False).returncode == 13
    assert subprocess.run([*command, str(grp.getgrnam("games").gr_gid)], check=False).returncode == 0


async def test_a_dead_process_socket_is_replaced(start: Start, run_dir: Path) -> None:
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(run_dir / "ipam.sock"))
        dead.listen()
    rig = await start()
    async with rig.stub() as stub:
        await stub.GetPool(GetPoolRequest())


async def test_a_leftover_of_a_start_that_was_killed_is_no_obstacle(start: Start, run_dir: Path) -> None:
    (run_dir / ".ipam").mkdir()
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(run_dir / ".ipam" / "s"))
    rig = await start()
    async with rig.stub() as stub:
        await stub.GetPool(GetPoolRequest())


async def test_a_living_process_is_not_pushed_aside(start: Start, run_dir: Path) -> None:
    path = run_dir / "ipam.sock"
    with subprocess.Popen(
        [sys.executable, "-c", LISTEN, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None and other.stdout.readline()
        inode = path.stat().st_ino
        with pytest.raises(FailedPrecondition, match=f"in use by process {other.pid}"):
            await start()
        assert path.stat().st_ino == inode
        assert other.stdin is not None
        other.stdin.close()


async def test_drain_removes_the_socket_but_not_a_successors(start: Start, run_dir: Path) -> None:
    path = run_dir / "ipam.sock"
    first = await start()
    await first.server.drain(0)
    assert not path.exists()
    second = await start()
    path.unlink()
    with socket.socket(socket.AF_UNIX) as successor:
        successor.bind(str(path))
        await second.server.drain(0)
        assert path.exists()


async def test_a_client_finds_a_restarted_server(start: Start) -> None:
    first = await start()
    async with first.stub() as stub:
        await stub.GetPool(GetPoolRequest())
        await first.server.drain(0)
        second = await start()
        await stub.GetPool(GetPoolRequest(), wait_for_ready=True, timeout=20)
    assert second.servicer.calls == 1
