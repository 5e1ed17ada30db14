"""What `fibril sockaccel` asks for, and how classes and pairs look."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

import pytest
from click.shell_completion import ShellComplete
from click.testing import CliRunner, Result

from fibril.sockaccel.v1 import sockaccel_pb2 as pb
from fibril.types.v1 import types_pb2
from services.common.errors import NotFound, Unavailable
from services.ctl import main
from services.ctl.commands import sockaccel
from services.ctl.context import Ctl
from services.ctl.main import cli
from services.ctl.render import to_record

PAIR = pb.Pair(
    id=(1 << 63) + 5, class_name="local-proxies", state=pb.PAIR_STATE_SHORTENED, redirected=True, made_unix_seconds=1.5,
    client=pb.PairEnd(address="fd00::1", port=40000, short_bytes=1400, short_sends=3, tcp_bytes=90, tcp_sends=1),
    server=pb.PairEnd(address="10.0.0.2", port=15001, endpoint=7, pod="shop/api", short_bytes=200, tcp_bytes=10),
)  # fmt: skip
ENDED = pb.Pair(
    id=9, class_name="web", state=pb.PAIR_STATE_ENDED, end_reason=pb.END_REASON_BULK,
    client=pb.PairEnd(address="127.0.0.1", port=40001), server=pb.PairEnd(address="127.0.0.1", port=80),
)  # fmt: skip
CLASS = pb.Class(
    name="web", enabled=True, scopes=[pb.SCOPE_POD, pb.SCOPE_HOST_POD],
    ports=[pb.PortRange(first=80), pb.PortRange(first=8000, last=8080)],
)  # fmt: skip


class Service:
    """Remembers what it was asked for. Gives pairs in pages of one."""

    def __init__(self) -> None:
        self.asked: list[Any] = []
        self.pairs = [PAIR, ENDED]
        self.refusal: Exception | None = None

    def __getattr__(self, method: str) -> Callable[..., Any]:
        if method == "WatchPairs":
            return self._watch

        def call(request: Any, timeout: float | None = None) -> Awaitable[Any]:
            assert timeout is not None
            self.asked.append(request)
            return self._answer(getattr(self, f"_{method}")(request))

        return call

    async def _answer(self, answer: Any) -> Any:
        if self.refusal is not None:
            raise self.refusal
        return answer

    def _ListClasses(self, _: pb.ListClassesRequest) -> pb.ListClassesResponse:
        return pb.ListClassesResponse(classes=[CLASS])

    def _UpsertClass(self, request: pb.UpsertClassRequest) -> pb.UpsertClassResponse:
        return pb.UpsertClassResponse(declared=request.declared, created=True)

    def _DeleteClass(self, _: pb.DeleteClassRequest) -> pb.DeleteClassResponse:
        return pb.DeleteClassResponse()

    def _Switch(self, _: pb.SwitchRequest) -> pb.SwitchResponse:
        return pb.SwitchResponse()

    def _ListPairs(self, request: pb.ListPairsRequest) -> pb.ListPairsResponse:
        at = int(request.page.token or 0)
        more = str(at + 1) if at + 1 < len(self.pairs) else ""
        return pb.ListPairsResponse(pairs=self.pairs[at : at + 1], next_token=more)

    def _GetUsage(self, _: pb.GetUsageRequest) -> pb.GetUsageResponse:
        return pb.GetUsageResponse(enabled=True, pairs=2, ended={"bulk": 4})

    def _watch(self, request: pb.WatchPairsRequest) -> AsyncIterator[pb.WatchPairsResponse]:
        self.asked.append(request)

        async def answers() -> AsyncIterator[pb.WatchPairsResponse]:
            yield pb.WatchPairsResponse(kind=types_pb2.WATCH_KIND_PUT, pair=PAIR)
            yield pb.WatchPairsResponse(kind=types_pb2.WATCH_KIND_SYNCED)
            yield pb.WatchPairsResponse(kind=types_pb2.WATCH_KIND_DELETE, pair=PAIR)

        return answers()


@pytest.fixture
def service(monkeypatch: pytest.MonkeyPatch) -> Service:
    made = Service()

    def call(_: Ctl, use: Callable[[Any], Any], service: str = "ipam") -> Any:
        import asyncio

        assert service == "sockaccel"
        return asyncio.run(use(None))

    monkeypatch.setattr(sockaccel, "stub", lambda _: made)
    monkeypatch.setattr(Ctl, "call", call)
    return made


def run(line: str, code: int = 0, output: str = "table") -> Result:
    done = CliRunner().invoke(cli, ["-o", output, "sockaccel", *shlex.split(line)])
    assert done.exit_code == code, (line, done.output, done.exception)
    return done


def row(message: Any, cols: list[Any]) -> dict[str, str]:
    return {column.head: column.text(to_record(message)) for column in cols}


# ---- classes ------------------------------------------------------------------------------------------------
def test_options_become_one_class(service: Service) -> None:
    run(
        "class set web --scope pod --scope host-pod --port 80 --port 8000-8080 --client-label app=x=y --client-label e= "
        "--server-label tier=db --cgroup shop.slice --cgroup /a/b --proxies-only --nonblocking-only --off"
    )
    (asked,) = service.asked
    assert asked.declared == pb.Class(
        name="web", enabled=False, scopes=[pb.SCOPE_POD, pb.SCOPE_HOST_POD],
        ports=[pb.PortRange(first=80), pb.PortRange(first=8000, last=8080)],
        client_labels={"app": "x=y", "e": ""}, server_labels={"tier": "db"}, cgroups=["shop.slice", "/a/b"],
        proxies_only=True, nonblocking_only=True,
    )  # fmt: skip


def test_a_class_is_on_and_for_all_ports_unless_said_otherwise(service: Service) -> None:
    run("class set all --scope pods")
    assert service.asked[0].declared == pb.Class(name="all", enabled=True, scopes=[pb.SCOPE_PODS])


@pytest.mark.parametrize("scope", sockaccel.SCOPES)
def test_every_scope_is_known_to_the_service(service: Service, scope: str) -> None:
    run(f"class set x --scope {scope}")
    (number,) = service.asked[0].declared.scopes
    assert pb.Scope.Name(number) == f"SCOPE_{scope.upper().replace('-', '_')}"
    assert len(sockaccel.SCOPES) + 1 == len(pb.Scope.values()) and len(sockaccel.STATES) + 1 == len(pb.PairState.values())


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("class set web", "--scope"),
        ("class set --scope pod", "NAME"),
        ("class set web --scope node", "node"),
        ("class set web --scope pod --port http", "PORT"),
        ("class set web --scope pod --port ''", "PORT"),
        ("class set web --scope pod --port -1", "PORT"),
        ("class set web --scope pod --port \u0661", "PORT"),
        ("class set web --scope pod --port 80-", "PORT"),
        ("class set web --scope pod --port 9-8", "does not end"),
        ("class set web --scope pod --port 80-0", "does not end"),
        ("class set web --scope pod --client-label app", "KEY=VALUE"),
        ("class set web --scope pod --server-label app=a --server-label app=b", "both"),
        ("class rm", "NAME"),
        ("on", "say what"),
        ("off --class ''", "say what"),
        ("off --all --class web", "say what"),
        ("off --pair 0", "--pair"),
        ("off --pair 18446744073709551616", "--pair"),
        ("pairs --port 65536", "--port"),
        ("pairs --state gone", "--state"),
        ("top --interval 0", "--interval"),
        ("top --interval nan", "--interval"),
        ("top --lines 0", "--lines"),
        ("top --count -1", "--count"),
    ],
)
def test_what_makes_no_sense_is_refused_before_anyone_is_asked(service: Service, words: str, said: str) -> None:
    assert said in run(words, code=2).output and not service.asked


def test_numbers_that_are_no_ports_are_left_to_the_service(service: Service) -> None:
    run("class set web --scope pod --port 0 --port 70000")
    assert [each.first for each in service.asked[0].declared.ports] == [0, 70000]


def test_a_class_is_shown_as_it_is_typed(service: Service) -> None:
    found = row(CLASS, sockaccel.CLASSES)
    assert (found["NAME"], found["ON"], found["SCOPES"], found["PORTS"]) == ("web", "yes", "pod,host-pod", "80,8000-8080")
    assert json.loads(run("class ls", output="json").output)[0]["scopes"] == ["SCOPE_POD", "SCOPE_HOST_POD"]


# ---- switches -----------------------------------------------------------------------------------------------
@pytest.mark.parametrize(
    ("words", "wanted"),
    [
        ("off --all", pb.SwitchRequest(all=True)),
        ("on --all", pb.SwitchRequest(all=True, on=True)),
        ("off --class web", pb.SwitchRequest(class_name="web")),
        (f"on --pair {(1 << 64) - 1}", pb.SwitchRequest(pair=(1 << 64) - 1, on=True)),
    ],
)
def test_switches_say_what_and_which_way(service: Service, words: str, wanted: pb.SwitchRequest) -> None:
    run(words)
    assert service.asked == [wanted]


# ---- pairs --------------------------------------------------------------------------------------------------
def test_all_pages_of_pairs_are_shown(service: Service) -> None:
    found = json.loads(run("pairs --pod shop/api --class web --state shortened --port 80", output="json").output)
    assert [int(each["id"]) for each in found] == [(1 << 63) + 5, 9]
    wanted = pb.PairFilter(pod="shop/api", class_name="web", state=pb.PAIR_STATE_SHORTENED, port=80)
    assert [each.filter for each in service.asked] == [wanted, wanted]
    assert [each.page.token for each in service.asked] == ["", "1"]


def test_a_pair_is_shown_by_pod_or_address() -> None:
    found = row(PAIR, sockaccel.PAIRS)
    assert (found["CLIENT"], found["SERVER"]) == ("[fd00::1]:40000", "shop/api:15001 (redirected)")
    assert (found["STATE"], found["SHORT"], found["SENDS"]) == ("shortened", "75%", "3")
    assert (found["BYTES"], found["TCP BYTES"]) == ("1.6K", "100")


def test_an_ended_pair_says_why() -> None:
    found = row(ENDED, sockaccel.PAIRS)
    assert (found["STATE"], found["SHORT"]) == ("ended (bulk)", "-")


@pytest.mark.parametrize(
    ("count", "shown"), [(0, "0"), (999, "999"), (1000, "1.0K"), (123_456, "123K"), (5e9, "5.0G"), (2e15, "2000.0T")]
)
def test_bytes_are_for_people(count: float, shown: str) -> None:
    assert sockaccel.size(count) == shown


def test_no_pairs_is_a_sentence_or_an_empty_list(service: Service) -> None:
    service.pairs = []
    assert run("pairs").output == "no pairs\n"
    assert json.loads(run("pairs", output="json").output) == []


def test_watching_gives_an_object_a_change(service: Service) -> None:
    lines = [json.loads(line) for line in run("watch --port 80", output="json").output.splitlines()]
    assert [each["kind"] for each in lines] == ["WATCH_KIND_PUT", "WATCH_KIND_DELETE"]
    assert service.asked == [pb.WatchPairsRequest(filter=pb.PairFilter(port=80))]
    assert [line.split()[0] for line in run("watch").output.splitlines()[-2:]] == ["+", "-"]


def test_top_tells_rates_not_totals(service: Service) -> None:
    (line,) = run("top --count 1 --interval 0.2 --lines 1", output="json").output.splitlines()
    found = json.loads(line)
    assert len(found["pairs"]) == 1 and set(found["pairs"][0]["rate"].values()) == {0.0}
    assert run("top --count 1 --interval 0.2").output.startswith("2 pairs, 0 sends a second past the stack")


def test_usage_is_told_in_full(service: Service) -> None:
    assert json.loads(run("usage", output="json").output)["ended"] == {"bulk": 4}


# ---- what goes wrong, and completion --------------------------------------------------------------------------
def test_a_refusal_names_what_to_do(service: Service, capsys: pytest.CaptureFixture[str]) -> None:
    service.refusal = NotFound("there is no class 'web'", field="name", fix="see: fibril sockaccel class ls")
    assert main.run(["sockaccel", "class", "rm", "web"]) == 1
    assert capsys.readouterr().err == "fibril: there is no class 'web' (name)\n  hint: see: fibril sockaccel class ls\n"


@pytest.mark.parametrize(
    "words", ["class ls", "class rm x", "class set x --scope pod", "off --all", "pairs", "watch", "top", "usage"]
)
def test_without_the_service_every_command_says_so(words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main.run(["--instance", "not-there-at-all", "sockaccel", *words.split()]) == 1
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("fibril: node 'not-there-at-all' is not running") and said[1].startswith("  hint: ")


def _complete(incomplete: str) -> list[str]:
    """As a shell asks."""
    shell = ShellComplete(cli, {}, "fibril", "_FIBRIL_COMPLETE")
    return [each.value for each in shell.get_completions(["-i", "x", "sockaccel", "class", "rm"], incomplete)]


def test_names_of_classes_are_completed(service: Service) -> None:
    assert (_complete("w"), _complete("x")) == (["web"], [])
    service.refusal = Unavailable("no")
    assert _complete("w") == []


def test_asking_for_help_imports_nothing_heavy() -> None:
    program = (
        "import sys; from services.ctl import main; main.run(['sockaccel', 'class', 'set', '--help']); "
        "sys.exit(any(m.split('.')[0] in ('grpc', 'google', 'asyncio') for m in sys.modules))"
    )
    subprocess.run([sys.executable, "-c", program], check=True, stdout=subprocess.DEVNULL)
