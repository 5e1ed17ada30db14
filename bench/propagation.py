"""How long after a pod was asked for on one node another node knows it: two nodes of a lab.

node 1: CreateEndpoint (what a CNI ADD does) ─▶ identity ─▶ etcd ─▶ node 2: entry in the ipcache's BPF map

The clock runs from the request until the map has the pod's address with the identity of its labels. Every fourth pod has
labels that no pod had before, so an identity has to be made for it, too.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import grpc

from bench.common import Bench, log, median, percentile, quick
from bench.node import FIBRIL
from fibril.endpoint.v1 import endpoint_pb2, endpoint_pb2_grpc
from services.common.instance import Instance
from services.common.kernel import netns
from services.common.kernel.maps import BpfMap
from services.common.pipeline import abi
from services.identity.numbers import cluster_of

PODS: Final = quick(40, 300)
WAIT_S: Final = 10.0
POLL_S: Final = 0.0003
SHARED: Final = 8
"""Label sets that several pods have."""

Ipcache = BpfMap[abi.FibAddr, abi.IpcacheEntry]


@contextlib.contextmanager
def lab() -> Iterator[tuple[Instance, Instance]]:
    """Two nodes of one cluster, gone afterwards."""
    name = f"b{secrets.token_hex(3)}"
    root = Path(tempfile.mkdtemp(prefix="fibril-"))
    env = {**os.environ, "FIBRIL_RUN_ROOT": str(root / "run"), "FIBRIL_STATE_ROOT": str(root / "state")}

    def fibril(*words: str) -> None:
        subprocess.run([str(FIBRIL), *words], env=env, check=True, stdout=sys.stderr.fileno())

    try:
        fibril("lab", "up", "--name", name, "--nodes", "2")
        one, two = (Instance.from_env(f"{name}-c1n{number}", env) for number in (1, 2))
        yield one, two
    finally:
        with contextlib.suppress(subprocess.CalledProcessError):
            fibril("lab", "down", "--name", name)
        shutil.rmtree(root, ignore_errors=True)


def arrived(ipcache: Ipcache, address: str, begin: float) -> float:
    """Milliseconds until the map has the address with an identity of the cluster."""
    key = abi.FibAddr.of(address)
    while (entry := ipcache.lookup(key)) is None or not cluster_of(entry.identity):
        if time.perf_counter() > begin + WAIT_S:
            raise TimeoutError(f"{address} did not get to the other node within {WAIT_S:g} s")
        time.sleep(POLL_S)
    return (time.perf_counter() - begin) * 1e3


def measure(one: Instance, two: Instance) -> list[float]:
    """Milliseconds of each pod."""
    found = []
    with (
        grpc.insecure_channel(f"unix:{one.socket('ipam')}") as to_ipam,
        BpfMap.open(two.pin_dir / abi.MAPS["ipc_addr"], abi.FibAddr, abi.IpcacheEntry) as ipcache,
    ):
        endpoints = endpoint_pb2_grpc.EndpointServiceStub(to_ipam)
        for number in range(PODS):
            space = Path(f"/run/netns/{one.name}-p{number}")
            netns.add(space)
            try:
                app = f"new-{number}" if number % 4 == 0 else f"shared-{number % SHARED}"
                request = endpoint_pb2.CreateEndpointRequest(
                    container_id=f"p{number}", netns=str(space), pod=f"bench/p{number}", labels={"app": app}
                )
                begin = time.perf_counter()
                endpoint = endpoints.CreateEndpoint(request, timeout=30).endpoint
                found.append(arrived(ipcache, endpoint.ipv4, begin))
                # Pods come one by one here; the end of one is not what is measured.
                endpoints.DeleteEndpoint(
                    endpoint_pb2.DeleteEndpointRequest(container_id=f"p{number}"), timeout=30
                )
            finally:
                netns.remove(space)
    return found


def main() -> None:
    """Print the 99th percentile."""
    with Bench("identity") as bench, lab() as (one, two):
        found = measure(one, two)
        log(f"{len(found)} pods: median {median(found):.1f} ms, at most {max(found):.1f} ms")
        bench.emit("ipcache_propagation_p99", "ms", percentile(found, 99), "target", 100)


if __name__ == "__main__":
    main()
