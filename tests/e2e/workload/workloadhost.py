"""A process that serves WorkloadService alone: `python workloadhost.py INSTANCE ENDPOINTS`.

ENDPOINTS is a JSON list of endpoints (fibril.endpoint.v1 in protobuf's JSON), or "unknown": none have been told yet.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence

from google.protobuf import json_format

from fibril.endpoint.v1 import endpoint_pb2 as ep
from fibril.workload.v1 import workload_pb2_grpc
from services.common.host import HostConfig, run
from services.common.instance import Instance
from services.common.service import ComponentStatus, HostContext
from services.identity.workload.api import WorkloadApi
from services.identity.workload.endpoints import EndpointView
from services.identity.workload.trace import Tracer


class WorkloadHost:
    name = "identity"

    def __init__(self, instance: Instance, endpoints: str) -> None:
        self._view = EndpointView()
        self._tracer = Tracer(instance, self._view)
        if endpoints != "unknown":
            for endpoint in json.loads(endpoints):
                self._view.put(json_format.ParseDict(endpoint, ep.Endpoint()))
            self._view.synced()

    async def start(self, ctx: HostContext) -> None:
        ctx.rpc.add(
            workload_pb2_grpc.add_WorkloadServiceServicer_to_server, WorkloadApi(self._view, self._tracer)
        )

    async def stop(self) -> None:
        self._tracer.stop()

    def status(self) -> Sequence[ComponentStatus]:
        return self._tracer.status()


if __name__ == "__main__":
    instance = Instance.from_env(sys.argv[1])
    sys.exit(run([WorkloadHost(instance, sys.argv[2])], HostConfig(), instance))
