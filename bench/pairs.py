"""Two namespaces that reach each other, and measuring between them with bench/net.c."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from pathlib import Path

from bench.common import cpus, quick

MILLISECONDS = quick(60, 150)
WARMUP_MILLISECONDS = 20
UNITS = {"rr": ("transactions/s", 1.0), "crr": ("connections/s", 1.0), "stream": ("Gbit/s", 1e9)}
FAMILIES = {"v4": "", "v6": "_v6"}  # family -> what its metrics' names end with


@dataclass(frozen=True)
class Pair:
    """Names of two network namespaces; the addresses are the server's."""

    client: str
    server: str
    ipv4: str
    ipv6: str


def build(scratch: Path) -> Path:
    """Compile client and server; gives the program."""
    program = scratch / "net"
    subprocess.run(["gcc", "-O2", "-o", program, Path(__file__).with_name("net.c")], check=True)
    return program


def measure(program: Path, mode: str, pair: Pair, family: str) -> float:
    """One run; transactions, connections or bits a second. CalledProcessError if any connection failed."""
    usable = cpus()
    client, server = (usable[0], usable[-1]) if mode == "stream" else (usable[-1], usable[-1])
    address = pair.ipv4 if family == "v4" else pair.ipv6
    words = [
        mode,
        Path("/run/netns") / pair.client,
        Path("/run/netns") / pair.server,
        address,
        MILLISECONDS,
        client,
        server,
        WARMUP_MILLISECONDS,
    ]
    done = subprocess.run(
        [program, *map(str, words)], check=True, stdout=subprocess.PIPE, text=True, timeout=60
    )
    return float(done.stdout)
