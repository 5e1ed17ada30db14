"""Calls of sockets on shortened connections give what they give on TCP: each is made on both, and compared.

What differs all the same is in DIFFERENCES, to the letter: a kernel, or a program, that behaves otherwise is noticed.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import callends
import callreads
import callring
import callwrites
import pytest
from accelrig import A4, B4, Rig, until
from calltools import CASES

from services.sockaccel import abi, hooks
from tests.e2e.lb.sockrig import Process

DIFFERENCES: dict[str, Any] = {
    # A recv() that waits, and is woken by anything but data, gives up with EAGAIN; what it waits for is there for the next.
    "signal_while_reading": [["EAGAIN"], ["EAGAIN"], "abc"],
    "room_to_write_while_reading": [["EAGAIN"], ["EAGAIN"], [None]],
    "two_wait_for_one_word": [["EAGAIN", "abc"], ["EAGAIN", "abc"]],
    "read_ends_with_shutdown_beside": ["EAGAIN"],
    "read_ends_with_reset": [["EAGAIN"], "ECONNRESET"],
    # Nobody tells the writer that what he wrote has not been read.
    "close_with_something_unread": "",
    # Noticed with the first call, which behaves like a plain one.
    "waitall_in_parts": "abc",
    "trunc": [4, "0123", "456789abc"],
    "out_of_band": [1, [2, "a"], "bcd"],
    # Noticed with the next turn of who writes.
    "lowat_within_a_turn": [1, 1, "abcdef"],
    # Not known to maps of sockets.
    "splice_out": ["EAGAIN", "abcdef"],  # the first of a process only
    "peek_off": ["ab", "abcdef", "abcdef"],
    "inq": [],
    "timestamps": 0,
    "bad_address_to_write_from": [0, None, "abc"],
    "to_an_address": [[3, 3], "abcabc"],
}
ENDS = {
    "waitall_of_what_is_there": abi.EndReason.READS,
    "waitall_in_parts": abi.EndReason.READS,
    "waitall_a_second_time": abi.EndReason.READS,
    "trunc": abi.EndReason.READS,
    "zerocopy": abi.EndReason.SENDS,
    "zerocopy_a_second_time": abi.EndReason.SENDS,
    "out_of_band": abi.EndReason.SENDS,
    "out_of_band_that_nobody_asks_for": abi.EndReason.SENDS,
    "lowat_after_a_turn": abi.EndReason.OPTION,
    "slow_reader": abi.EndReason.BEHIND,
}
"""Why a connection was no longer shortened by the end; of all others: it was closed."""
KNOWS = f"""
sys.path.insert(0, {str(Path(__file__).parent)!r})
from calltools import *
import {", ".join(each.__name__ for each in (callends, callreads, callring, callwrites))}
"""
KINDS = {
    "v4": ("AF_INET", -1, "127.0.0.1", "127.0.0.1"),
    "v6": ("AF_INET6", -1, "::1", "::1"),
    "mapped": ("AF_INET6", "AF_INET", f"::ffff:{A4}", A4),
}


def begin(process: Process, kind: str) -> None:
    family, of_server, to, at = KINDS[kind]
    other = f"socket.{of_server}" if isinstance(of_server, str) else of_server
    process.do(f"c, d = connected(socket.{family}, {other}, {to!r}, {at!r})")


@pytest.fixture
def caller(rig: Rig) -> Iterator[Process]:
    process = rig.process()
    process.do(KNOWS)
    yield process


def newest(rig: Rig) -> abi.Pair:
    return max(rig.pairs(), key=lambda pair: pair.made)


@pytest.mark.parametrize("name", CASES)
def test_a_call_gives_what_it_gives_on_tcp(rig: Rig, caller: Process, name: str) -> None:
    ways = [(kind, ("c", "d")) for kind in KINDS] + [("v4", ("d", "c"))]
    # Nothing is handed to a process any more that has read so; and what takes seconds is the same in all families.
    for kind, (w, r) in ways[:1] if name in ("splice_out", "ring_recv_of_all", "keepalive", "sndtimeo") else ways:
        found = {}
        for on in (False, True):
            rig.write(on=on)
            begin(caller, kind)
            if w == "d":
                # So that whoever writes begins a turn.
                caller.do("c.sendall(b'.'); exactly(d, 1)")
            if on:
                pair = newest(rig)
                assert all(end.mode == abi.Mode.SHORT and end.sends for end in pair.ends), "not shortened"
                before = {reason: rig.ended(reason) for reason in abi.EndReason}
            found[on] = caller.give(f"run({name!r}, {w}, {r})")
        assert found[True] != "hangs" and found[False] != "hangs", (kind, found)
        wanted = DIFFERENCES.get(name, found[False])
        assert found[True] == wanted, (kind, json.dumps(found))
        assert name not in DIFFERENCES or found[False] != wanted, "no difference any more"
        if name in ENDS:
            until(lambda: rig.ended(ENDS[name]) > before[ENDS[name]])  # noqa: B023


@pytest.mark.parametrize("call", ["r.recv(6, socket.MSG_WAITALL)", "r.recvmsg(6, 0, socket.MSG_WAITALL)[0]"])
@pytest.mark.parametrize("turns", range(6))
def test_who_waits_for_all_is_not_left_waiting(rig: Rig, caller: Process, call: str, turns: int) -> None:
    """One half comes by TCP and is taken; then the other end would begin to hand over, which that call does not see."""
    caller.do(f"w, r = connected(socket.AF_INET, -1, '127.0.0.1', '127.0.0.1', turns={turns})")
    found = caller.do(f"""
with beside(lambda: {call}) as found:
    w.sendall(b"abc"); pause()
    r.sendall(b"."); exactly(w, 1)
    w.sendall(b"def")
""", "found")
    assert found == ["abcdef"]


def test_nothing_is_handed_to_a_process_that_has_spliced(rig: Rig, caller: Process) -> None:
    begin(caller, "v4")
    caller.do("a, b = c, d")
    caller.do("c, d = connected(socket.AF_INET, -1, '127.0.0.1', '127.0.0.1', turns=1)")
    assert caller.give("run('splice_out', c, d)") == [6, "EAGAIN"]
    # Nor at a connection that was shortened before.
    handed = rig.stat(abi.Stat.SENDS)
    caller.do("for _ in range(20): a.sendall(b'abc'); exactly(b, 3); b.sendall(b'def'); exactly(a, 3)")
    assert rig.stat(abi.Stat.SENDS) == handed
    assert caller.give("run('splice_out', a, b)") == [6, "EAGAIN"]
    before = rig.stat(abi.Stat.SENDS)
    begin(caller, "v4")
    assert caller.give("run('splice_out', d, c)") == [6, "EAGAIN"]
    assert rig.stat(abi.Stat.SENDS) == before


def test_nothing_is_handed_to_the_next_process_of_a_program_that_has_spliced(rig: Rig, caller: Process) -> None:
    """In its namespace, under its user: of another name, or elsewhere, it is another program."""
    caller.do("libc.prctl(15, b'relay')")
    begin(caller, "v4")
    assert caller.give("run('splice_out', c, d)") == ["EAGAIN", "abcdef"]
    for name, space, known in (("relay", 0, True), ("other", 0, False), ("relay", 1, False)):
        process = rig.process(space)
        process.do(KNOWS + f"libc.prctl(15, b'{name}')")
        before = rig.stat(abi.Stat.SENDS)
        begin(process, "v4")
        assert (rig.stat(abi.Stat.SENDS) == before) is known, (name, space)
        assert process.give("run('splice_out', c, d)") == ([6, "EAGAIN"] if known else ["EAGAIN", "abcdef"])


SPLICED = """
there, here = os.pipe()
d.setblocking(False)
def spliced(): return tell(lambda: os.read(there, os.splice(d.fileno(), here, 99)))
"""


def test_nothing_overtakes_what_a_first_splice_does_not_see(rig: Rig, caller: Process) -> None:
    """It waits behind that, until that is read; from there on everything comes by TCP, and can be spliced."""
    begin(caller, "v4")
    caller.do(SPLICED)
    caller.do("c.sendall(b'one')")
    assert caller.give("spliced()") == "EAGAIN"
    assert newest(rig).ended == abi.EndReason.READS and newest(rig).ends[1].stuck == abi.Stuck.STUCK
    caller.do("c.sendall(b'two'); c.sendall(b'six'); time.sleep(PAUSE_S)")
    assert caller.give("[spliced(), got(d, 4), spliced(), got(d)]") == ["EAGAIN", "onet", "EAGAIN", "wosix"]
    assert caller.do("c.sendall(b'ten'); time.sleep(PAUSE_S)", "[spliced(), got(d)]") == ["ten", "EAGAIN"]
    # Nothing keeps it any more.
    until(lambda: not rig.pairs())
    # And the other way, where nothing was stuck.
    assert caller.do("d.sendall(b'back')", "got(c)") == "back"


def test_what_has_been_overtaken_goes_no_further(rig: Rig, caller: Process) -> None:
    """The pair went back to TCP while something waited, and what came behind it has been spliced: an error."""
    begin(caller, "v4")
    caller.do(SPLICED + "c.sendall(b'one')")
    rig.write(on=False)
    caller.do("c.sendall(b'two'); time.sleep(PAUSE_S)")
    assert caller.give("spliced()") == "two"
    assert newest(rig).ends[1].stuck == abi.Stuck.OVERTAKEN
    assert caller.give("[got(d), tell(lambda: c.send(b'six'))]") == ["one", "EACCES"]


def test_nothing_is_handed_to_who_is_known_to_splice_later(rig: Rig, caller: Process) -> None:
    caller.do("libc.prctl(15, b'haproxy')")
    before = rig.stat(abi.Stat.SENDS)
    begin(caller, "v4")
    assert rig.stat(abi.Stat.SENDS) == before
    caller.do(SPLICED)
    assert caller.do("c.sendall(b'one'); time.sleep(PAUSE_S)", "spliced()") == "one"


def test_a_splice_before_anything_waits_holds_nobody_up(rig: Rig, caller: Process) -> None:
    begin(caller, "v4")
    caller.do(SPLICED)
    assert caller.give("spliced()") == "EAGAIN"
    assert newest(rig).ends[1].stuck != abi.Stuck.STUCK
    assert caller.do("c.sendall(b'one'); time.sleep(PAUSE_S)", "spliced()") == "one"


def test_who_sends_behind_what_is_stuck_is_told_when_it_is_too_much(rig: Rig, caller: Process) -> None:
    """Or when a policy has changed: there is no way that is right."""
    begin(caller, "v4")
    caller.do(SPLICED + "c.sendall(b'one'); spliced()")
    assert caller.give("tell(lambda: c.send(bytes(65536)))") == "EACCES"
    begin(caller, "v4")
    caller.do("c.sendall(b'one'); c.sendall(b'two')")
    assert caller.give("got(d)") == "onetwo"


def test_a_read_that_waits_for_more_than_it_says_now_is_no_plain_one(rig: Rig, caller: Process) -> None:
    """It began with SO_RCVLOWAT, has something already, and waits for more by TCP."""
    caller.do("""
w, r = connected(socket.AF_INET, -1, '127.0.0.1', '127.0.0.1', turns=1)
r.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 2)
w.sendall(b"a"); time.sleep(PAUSE_S)
found = []
t = threading.Thread(target=lambda: found.append(got(r)), daemon=True); t.start()
""")
    until(lambda: not rig.pairs() or newest(rig).ended == abi.EndReason.READS)
    found = caller.do("""
r.setsockopt(socket.SOL_SOCKET, socket.SO_RCVLOWAT, 1)
for _ in range(6): r.sendall(b"."); exactly(w, 1)
w.sendall(b"b"); t.join(5)
""", "found")
    assert found == ["ab"]


@pytest.mark.parametrize("name", ["signal_while_reading", "room_to_write_while_reading", "read_ends_with_reset"])
def test_who_waits_gives_up_before_anything_is_shortened(rig: Rig, caller: Process, name: str) -> None:
    """It is enough that the socket is a candidate: in the map of sockets."""
    caller.do("c, d = connected(socket.AF_INET, -1, '127.0.0.1', '127.0.0.1', turns=1)")
    assert not newest(rig).ends[0].sends
    assert caller.give(f"run({name!r}, c, d)") == DIFFERENCES[name]


@pytest.mark.parametrize("name", ["signal_while_reading", "room_to_write_while_reading", "read_ends_with_reset"])
@pytest.mark.parametrize(("w", "r"), [("c", "d"), ("d", "c")])
def test_nobody_gives_up_waiting_where_nobody_is_to_wait(rig: Rig, caller: Process, name: str, w: str, r: str) -> None:
    """A class for those who do not wait leaves others alone with their first word: out of the map of sockets, as on TCP."""
    rig.write(on=False)
    begin(caller, "v4")
    plain = caller.give(f"run({name!r}, {w}, {r})")
    rig.write(on=True, nonblocking=1)
    before = rig.ended(abi.EndReason.READS)
    caller.do("c, d = connected(socket.AF_INET, -1, '127.0.0.1', '127.0.0.1', turns=1)")
    until(lambda: rig.ended(abi.EndReason.READS) > before and not rig.pairs())
    assert caller.give(f"run({name!r}, {w}, {r})") == plain != DIFFERENCES[name]


def test_a_server_that_waits_is_a_candidate_once(rig: Rig, caller: Process) -> None:
    """Where nobody is to wait; until somebody listens there anew."""
    rig.write(nonblocking=1)
    caller.do("""
def serve(port):
    global l
    l = socket.socket(); l.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    l.bind(("127.0.0.1", port)); l.listen()
    return l.getsockname()[1]
def asked(waits):
    c = socket.create_connection(l.getsockname(), 5); d, _ = l.accept(); d.setblocking(waits)
    for _ in range(20):
        for one, other in ((c, d), (d, c)):
            one.sendall(b"word")
            assert ready(other) and other.recv(9) == b"word"
    c.close(); d.close()
""")
    port = caller.give("serve(0)")
    made = rig.stat(abi.Stat.PAIRS)
    for _ in range(3):
        caller.give("asked(True)")
        assert rig.stat(abi.Stat.PAIRS) == made + 1
    caller.give("asked(False)")
    assert rig.stat(abi.Stat.PAIRS) == made + 1
    caller.do(f"l.close(); serve({port}); asked(False)")
    assert rig.stat(abi.Stat.PAIRS) == made + 2 and rig.stat(abi.Stat.SHORTENED)


def test_who_is_told_something_before_anybody_looks_is_not_taken_for_one_who_waits(rig: Rig, caller: Process) -> None:
    """The programs behind recv() come with the first pair of a node: its first words are not seen."""
    rig.write(nonblocking=1)
    hooks.detach_calls(rig.instance)
    caller.do("""
c, d = connected(socket.AF_INET, -1, '127.0.0.1', '127.0.0.1', turns=0); c.setblocking(False)
def talk(turns):
    for _ in range(turns):
        for one, other in ((c, d), (d, c)):
            one.sendall(b"word")
            assert ready(other) and other.recv(9, socket.MSG_DONTWAIT) == b"word"
talk(2)
""")
    hooks.attach_all(rig.instance, rig.group.name)
    caller.do("talk(20)")
    assert not newest(rig).ended and newest(rig).ends[1].mode == abi.Mode.SHORT


@pytest.mark.parametrize("calls", ["setblocking", "MSG_DONTWAIT"])
def test_who_does_not_wait_is_shortened_where_nobody_is_to_wait(rig: Rig, caller: Process, calls: str) -> None:
    """Until somebody does, or is to: then all goes by TCP."""
    rig.write(nonblocking=1)
    caller.do("c, d = connected(socket.AF_INET, -1, '127.0.0.1', '127.0.0.1', turns=0); c.setblocking(False)")
    if calls == "setblocking":
        caller.do("d.setblocking(False)")
    caller.do("""
def talk(turns):
    for _ in range(turns):
        for one, other in ((c, d), (d, c)):
            one.sendall(b"word")
            assert ready(other) and other.recv(9, socket.MSG_DONTWAIT) == b"word"
talk(20)
""")
    pair = newest(rig)
    assert all(end.mode == abi.Mode.SHORT and end.sends for end in pair.ends) and not pair.ended
    assert caller.do("c.sendall(b'word'); d.setblocking(True)", "got(d)") == "word"
    assert newest(rig).ended == abi.EndReason.READS
    caller.do("talk(5)")
    until(lambda: not rig.pairs())
    # One that waits already, under a class that changes. An older service has written something else there.
    rig.write(nonblocking=0)
    config = rig.tables.config()
    config.nonblocking = 0xFFFFFFFF
    rig.tables._config.update(0, config)
    begin(caller, "v4")
    assert newest(rig).ends[0].mode == abi.Mode.SHORT
    rig.write(nonblocking=1)
    caller.do("c.sendall(b'word'); exactly(d, 4)")
    assert newest(rig).ended == abi.EndReason.READS


def test_what_was_handed_over_is_peeked_before_what_comes_by_tcp(rig: Rig, caller: Process) -> None:
    """A peek reaches up to where the way changes, no further: who waits for more must read."""
    begin(caller, "v4")
    caller.do("c.sendall(b'abc')")
    assert newest(rig).ends[0].bytes and newest(rig).ends[0].mode == abi.Mode.SHORT
    rig.write(on=False)
    caller.do("c.sendall(b'def'); time.sleep(PAUSE_S)")
    peeks = "[got(d, 9, socket.MSG_PEEK), waiting(d), got(d, 1), got(d), got(d, 9, socket.MSG_PEEK), got(d)]"
    assert caller.give(peeks) == ["abc", 3, "a", "bc", "def", "def"]


@pytest.mark.parametrize("count", [1, 7, 60])
def test_words_stay_in_order_when_the_way_changes_between_any_two(rig: Rig, caller: Process, count: int) -> None:
    """Switched off and on again at every place of a conversation, with the reader behind by some words."""
    begin(caller, "v4")
    caller.do("whole, back = b'', b''")
    for number in range(2 * count):
        rig.write(on=bool(number % 2))
        caller.do(f"""
for at in range(8):
    word = b'%d.%d;' % ({number}, at)
    whole += word; c.sendall(word)
    if at % 3 == {number % 3}:
        back += d.recv(5); d.sendall(b'.'); exactly(c, 1)
""")
    assert caller.give("back + exactly(d, len(whole) - len(back)) == whole")


def test_of_two_readers_whoever_is_left_reads_on(rig: Rig, caller: Process, tmp_path: Path) -> None:
    """Both are woken by a word that comes by TCP, and one is too late: it waits for TCP, where nothing comes any more.

    One in some ten thousand goes that way still (README), where it was one in some hundred.
    """
    program = tmp_path / "tworeaders"
    source = Path(__file__).with_name("tworeaders.c")
    subprocess.run(["gcc", "-O2", "-Wall", "-Werror", "-pthread", "-o", program, source], check=True)
    before = rig.stat(abi.Stat.SHORTENED)
    assert int(caller.do("import subprocess", f"subprocess.check_output(['{program}', '1500'], text=True)")) <= 4
    assert rig.stat(abi.Stat.SHORTENED) > before + 50


@pytest.mark.parametrize("client", [262, 0])
def test_multipath_is_left_alone(rig: Rig, caller: Process, client: int) -> None:
    """IPPROTO_MPTCP at both ends is not shortened; asked for by the server only, it is TCP after all."""
    try:
        caller.do("l = socket.socket(socket.AF_INET, socket.SOCK_STREAM, 262)")
    except OSError:
        pytest.skip("the kernel has no multipath TCP")
    found = caller.do(f"""
l.bind(({A4!r}, 0)); l.listen()
c = socket.socket(socket.AF_INET, socket.SOCK_STREAM, {client}); c.connect(l.getsockname()); d, _ = l.accept()
for number in range(50):
    c.sendall(b'%d' % number); assert exactly(d, len(b'%d' % number)) == b'%d' % number
    d.sendall(b'.'); exactly(c, 1)
whole = pattern(300_000)
with beside(lambda: c.sendall(whole)) as done:
    arrived = exactly(d, len(whole)) == whole
c.close(); end = rest(d)
""", "[arrived, done, end]")
    assert found == [True, [None], ["", "end"]]
    assert client == 0 or all(not end.sends for pair in rig.pairs() for end in pair.ends)


def test_pods_call_each_other(rig: Rig) -> None:
    """Ends in two processes and two namespaces, for calls that need both at once."""
    server, client = rig.process(1), rig.process(0)
    for each in (server, client):
        each.do(KNOWS)
    port = server.do(f"l = socket.create_server(({B4!r}, 0))", "l.getsockname()[1]")
    client.do(f"s = socket.create_connection(({B4!r}, {port})); s.settimeout(5)")
    server.do("s, _ = l.accept(); s.settimeout(5)")
    for number in range(40):
        for one, other in ((client, server), (server, client)):
            one.do(f"s.sendall(b'{number:04}')")
            assert other.give("exactly(s, 4).decode()") == f"{number:04}"
    assert all(end.mode == abi.Mode.SHORT for end in newest(rig).ends)
    # The server dies with something unread, and with something on its way: the client gets what was sent, and then the end.
    client.do("s.sendall(b'unread')")
    server.do("s.sendall(b'last')")
    server.close()
    assert client.give("rest(s)") == ["last", "end"]
