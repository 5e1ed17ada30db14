"""`fibril whoami`: which pod a process or a control group belongs to."""

from __future__ import annotations

from pathlib import Path

import click

from services.ctl.context import Ctl, pass_ctl
from services.ctl.render import to_record


@click.command(short_help="The pod of a process.")
@click.argument("pid", type=click.IntRange(1, (1 << 32) - 1), required=False)
@click.option(
    "--cgroup",
    metavar="PATH",
    help="The pod of this control group: its directory, or its path below the cgroup2 mount.",
)
@pass_ctl
def command(ctl: Ctl, pid: int | None, cgroup: str | None) -> None:
    """Show the pod that process PID belongs to; by default the one this command runs in.

    Exit code 1 if it is no pod's."""
    import os

    from fibril.workload.v1 import workload_pb2, workload_pb2_grpc

    if pid is not None and cgroup is not None:
        raise click.UsageError("give either PID or --cgroup")
    request = workload_pb2.WhoamiRequest()
    if cgroup is not None:
        request.cgroup_id = _cgroup_id(cgroup)
    else:
        request.pid = os.getpid() if pid is None else pid
    answer = ctl.call(
        lambda ch: workload_pb2_grpc.WorkloadServiceStub(ch).Whoami(request, timeout=ctl.seconds), "identity"
    )
    ctl.describe(to_record(answer.workload))


def _cgroup_id(text: str) -> int:
    from services.common.kernel import cgroup

    top = cgroup.mount_point()
    path = Path(text)
    return cgroup.cgroup_id(path if path.is_relative_to(top) else top / text.lstrip("/"))
