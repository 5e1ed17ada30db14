"""Servers for the scripted service that are taken down again."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest

from fibril.ipam.v1 import ipam_pb2_grpc
from services.common import telemetry
from services.common.rpc.server import RpcConfig, RpcServer
from services.common.telemetry import Telemetry
from tests.unit.common.rig import Rig, Scripted, Start


@pytest.fixture
async def start(run_dir: Path) -> AsyncIterator[Start]:
    """Start a server: `await start()`; on TCP when the configuration given says so."""
    async with AsyncExitStack() as stack:

        async def begin(
            cfg: RpcConfig | None = None, made: Telemetry | None = None, name: str = "ipam"
        ) -> Rig:
            cfg = cfg or RpcConfig()
            server = RpcServer(cfg.tcp or run_dir / f"{name}.sock", cfg, made or Telemetry())
            stack.push_async_callback(server.drain, 0)
            servicer = Scripted()
            server.add(ipam_pb2_grpc.add_IpamServiceServicer_to_server, servicer)
            await server.start()
            target = f"127.0.0.1:{server.port}" if cfg.tcp else f"unix:{run_dir / f'{name}.sock'}"
            return Rig(server, servicer, target)

        yield begin


@pytest.fixture
def run_dir() -> Iterator[Path]:
    """A run directory others may enter (pytest's own may not be) with a path short enough for sockets."""
    path = Path(tempfile.mkdtemp(prefix="fibril-unit-"))
    path.chmod(0o755)
    yield path
    shutil.rmtree(path)


@pytest.fixture
def no_telemetry() -> Iterator[None]:
    """Leave the process without telemetry afterwards."""
    yield
    telemetry.current().close()
    telemetry.setup("")
