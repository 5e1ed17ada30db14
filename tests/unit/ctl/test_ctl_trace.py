"""How traced events look, and which wishes `fibril trace` and `fibril whoami` refuse."""

from __future__ import annotations

import pytest
from click.testing import CliRunner

from fibril.workload.v1 import workload_pb2 as pb
from services.ctl.commands import trace
from services.ctl.main import cli
from services.ctl.render import to_record

WORKLOAD = pb.Workload(endpoint_id=3, pod="shop/web", container_id="c" * 64, labels={"b": "2", "a": "1"})


def row(message: object, cols: list[trace.Column]) -> list[str]:
    return [column.text(to_record(message)) for column in cols[1:]]


def test_an_execution_shows_pod_labels_and_what_one_would_type() -> None:
    process = pb.Process(pid=10, parent_pid=9, uid=1000, command="cat", workload=WORKLOAD)
    event = pb.WatchExecsResponse(process=process, path="/bin/cat", arguments=["cat", "a b"])
    assert row(event, trace.EXECS) == ["shop/web", "a=1,b=2", "10", "9", "1000", "/bin/cat 'a b'"]


def test_connections_show_ports_and_who_is_of_no_pod() -> None:
    tcp = pb.WatchConnectsResponse(
        process=pb.Process(pid=10, command="curl"), protocol=6, source="10.0.0.1", source_port=1, destination="fd00::1",
        destination_port=443,
    )  # fmt: skip
    assert row(tcp, trace.CONNECTS) == ["(host)", "-", "10", "curl", "tcp", "10.0.0.1:1", "[fd00::1]:443"]
    udp = pb.WatchConnectsResponse(
        process=pb.Process(workload=pb.Workload(endpoint_id=4)),
        protocol=17,
        destination="10.0.0.2",
        destination_port=53,
    )
    assert row(udp, trace.CONNECTS)[0] == "endpoint 4"
    assert row(udp, trace.CONNECTS)[-3:] == ["udp", "-", "10.0.0.2:53"]


@pytest.mark.parametrize(
    "words",
    [("trace", "exec", "--host", "--endpoint", "1"), ("whoami", "1", "--cgroup", "/x"), ("whoami", "0")],
)
def test_wishes_that_make_no_sense_are_refused(words: tuple[str, ...]) -> None:
    assert CliRunner().invoke(cli, words).exit_code == 2
