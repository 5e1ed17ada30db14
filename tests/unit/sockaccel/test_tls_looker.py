"""What becomes of what the programs report."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from services.common.instance import Instance
from services.sockaccel.tls import programs
from services.sockaccel.tls.looker import Chosen, Looker, shown

SPACE, THREAD = 4026531840, 77


@pytest.fixture
def looker() -> Iterator[Looker]:
    made = Looker(Instance.from_env("t-looker"), list, list)
    made._chosen = {SPACE: Chosen("web", frozenset(), False, frozenset({(1, 443)}))}
    yield made
    made._thread.shutdown()


def record(head: bytes, kernel: bool = False, received: bool = False, comm: bytes = b"web") -> programs.Record:
    made = programs.Record(
        time=1, session=2, pid=70, thread=THREAD, netns=SPACE, captured=len(head), received=received, kernel=kernel, comm=comm
    )
    made.head[: len(head)] = head
    return made


def test_what_a_library_gives_to_the_kernel_is_one_message(looker: Looker) -> None:
    first, second = (b"GET /%d HTTP/1.1\r\n\r\n" % number for number in (1, 2))
    looker._take(record(first), 0)
    looker._take(record(first, kernel=True), 0)
    # Written by the thread without a library.
    looker._take(record(first, kernel=True), 0)
    looker._take(record(second, received=True), 0)
    looker._take(record(second, kernel=True), 0)
    assert [(each.path, each.kernel) for each in looker._last] == [
        ("/1", False), ("/1", True), ("/2", False), ("/2", True),
    ]  # fmt: skip


def test_threads_that_never_come_back_are_forgotten(looker: Looker) -> None:
    for number in range(5000):
        made = record(b"GET / HTTP/1.1\r\n\r\n")
        made.thread = number
        looker._take(made, 0)
    assert len(looker._wrote) <= 4096


def test_http2_and_what_is_not_understood_are_counted(looker: Looker) -> None:
    looker._take(record(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"), 0)
    looker._take(record(b"GET /" + b"x" * 500), 0)
    looker._take(record(b"GET \x00\x01\x02 nonsense\r\n"), 0)
    found = looker.probes()
    assert (found.http2, found.unknown, len(looker._last)) == (1, 2, 0)


def test_what_a_process_calls_itself_cannot_steer_a_terminal(looker: Looker) -> None:
    looker._take(record(b"GET / HTTP/1.1\r\n\r\n", comm=b"\x1b[2J\xff"), 0)
    assert looker._last[0].comm == "\\x1b[2J\\\\xff"
    assert shown(b"/usr/lib/libssl.so.3") == "/usr/lib/libssl.so.3"


def test_who_is_no_longer_chosen_is_not_shown(looker: Looker) -> None:
    looker._take(record(b"GET /before HTTP/1.1\r\n\r\n"), 0)
    looker._chosen = {}
    looker._take(record(b"GET /after HTTP/1.1\r\n\r\n"), 0)
    assert [each.path for each in looker._last] == ["/before"]
    looker.forget()
    assert not looker._last
