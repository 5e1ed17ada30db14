"""Connections that are shortened, and those that are not: real sockets, tables filled by hand."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelrig import A4, A6, B4, B6, Rig, until

from services.sockaccel import abi
from tests.e2e.lb.sockrig import Process

MESSAGE = 256
"""What a send that waits unread counts for besides its bytes: SA_MESSAGE."""
TALK = """
def take(s, size):
    got = b""
    while len(got) < size:
        more = s.recv(size - len(got))
        assert more, "closed"
        got += more
    return got

def talk(rounds, size=64, begin=0):
    # Both ends are here: client c, server d.
    for number in range(begin, begin + rounds):
        word = bytes([number & 255]) * size
        c.sendall(word)
        assert take(d, size) == word
        d.sendall(word[::-1] + b".")
        assert take(c, size + 1) == word[::-1] + b"."
"""
KINDS = {
    "v4 loopback": ("AF_INET", "AF_INET", "127.0.0.1", "127.0.0.1"),
    "v6 loopback": ("AF_INET6", "AF_INET6", "::1", "::1"),
    "v4 own address": ("AF_INET", "AF_INET", A4, A4),
    "v6 own address": ("AF_INET6", "AF_INET6", A6, A6),
    "mapped client": ("AF_INET6", "AF_INET", f"::ffff:{A4}", A4),
    "mapped server": ("AF_INET", "AF_INET6", A4, "::"),
}


def pair_up(
    process: Process,
    family: str = "AF_INET",
    of_server: str = "AF_INET",
    to: str = "127.0.0.1",
    at: str = "127.0.0.1",
) -> None:
    process.do(TALK)
    process.do(f"""
l = socket.socket(socket.{of_server}); l.bind(({at!r}, 0)); l.listen()
c = socket.socket(socket.{family}); c.connect(({to!r}, l.getsockname()[1])); d, _ = l.accept()
c.settimeout(5); d.settimeout(5)
""")


@pytest.mark.parametrize("kind", KINDS)
def test_two_that_take_turns_are_shortened(rig: Rig, kind: str) -> None:
    process = rig.process()
    before = rig.stat(abi.Stat.SENDS)
    pair_up(process, *KINDS[kind])
    (pair,) = rig.pairs()
    assert pair.ends[0].netns == pair.ends[1].netns == rig.cookies[0]
    process.do("talk(50)")
    (pair,) = rig.pairs()
    # Proofs first, and a first word and an answer before them.
    assert pair.ends[0].sends >= 40 and pair.ends[1].sends >= 40
    assert pair.ends[0].tcp_sends + pair.ends[0].sends == 50
    assert pair.ends[0].bytes == 64 * pair.ends[0].sends and pair.ends[1].bytes == 65 * pair.ends[1].sends
    assert rig.stat(abi.Stat.SENDS) - before == pair.ends[0].sends + pair.ends[1].sends
    process.do("c.close(); assert d.recv(1) == b''; d.close()")
    assert until(lambda: not rig.pairs())


@pytest.mark.parametrize("address", [B4, B6])
def test_pods_of_one_node_are_shortened(rig: Rig, address: str) -> None:
    server, client = rig.process(1), rig.process(0)
    family = "AF_INET6" if ":" in address else "AF_INET"
    port = server.do(f"l = socket.socket(socket.{family}); l.bind(({address!r}, 0)); l.listen()", "l.getsockname()[1]")
    client.do(f"c = socket.socket(socket.{family}); c.connect(({address!r}, {port}))")
    server.do("d, _ = l.accept()")
    for number in range(30):
        client.do(f"c.sendall(b'{number:03}')")
        assert server.do("", "d.recv(99).decode()") == f"{number:03}"
        server.do(f"d.sendall(b'{number:05}')")
        assert client.do("", "c.recv(99).decode()") == f"{number:05}"
    (pair,) = rig.pairs()
    assert (pair.ends[0].endpoint, pair.ends[1].endpoint) == (1, 2)
    assert pair.ends[0].sends > 20 and pair.ends[1].sends > 20


def test_bulk_is_left_to_tcp_and_taken_out(rig: Rig) -> None:
    process = rig.process()
    pair_up(process)
    before = rig.ended(abi.EndReason.BULK)
    process.do("""
def reader():
    global got
    got = 0
    while got < 4 << 20:
        got += len(d.recv(1 << 16))
t = threading.Thread(target=reader); t.start()
c.sendall(bytes(4 << 20)); t.join()
""")
    assert process.give("got") == 4 << 20
    until(lambda: not rig.pairs())
    assert rig.ended(abi.EndReason.BULK) == before + 1
    process.do("talk(20)")


def test_bulk_later_goes_back_to_tcp_for_good(rig: Rig) -> None:
    process = rig.process()
    pair_up(process)
    process.do("talk(30)")
    assert rig.pairs()[0].ends[0].sends > 20
    ended = rig.ended(abi.EndReason.BULK)
    process.do("""
def reader():
    take(d, 4 << 20)
t = threading.Thread(target=reader); t.start()
c.sendall(bytes(4 << 20)); t.join()
talk(20)
""")
    # Its sockets are taken out as soon as all that was handed over is read: a stream pays for nothing.
    until(lambda: not rig.pairs())
    assert rig.ended(abi.EndReason.BULK) == ended + 1


def test_taken_out_in_the_middle_of_a_stream(rig: Rig) -> None:
    """Whoever reads late, on either side: every byte comes, in order."""
    process = rig.process()
    process.do("""
import hashlib, random
def fill(s, seed, digests):
    pick, digest = random.Random(seed), hashlib.sha256()
    for number in range(800):
        word = pick.randbytes(pick.choice((1, 7, 300, 3000)))
        digest.update(word)
        s.sendall(word)
        if number % 100 == 50:
            time.sleep(0.002)
    digests[seed] = digest.hexdigest()
    s.shutdown(socket.SHUT_WR)

def drain(s, seed, digests, pause):
    digest = hashlib.sha256()
    while more := s.recv(random.choice((1, 100, 4096, 65536))):
        digest.update(more)
        if pause and random.random() < pause:
            time.sleep(0.001)
    digests[-seed] = digest.hexdigest()
""")
    before = rig.ended(abi.EndReason.BULK)
    for number in range(12):
        pair_up(process)
        process.do("talk(20)")
        handed = sum(end.sends for end in rig.pairs()[0].ends)
        assert handed > 20
        process.do(f"""
digests = {{}}
jobs = [(fill, c, 1, digests), (drain, d, 1, digests, {0.05 * (number % 3)})]
if {number} % 2:
    jobs += [(fill, d, 2, digests), (drain, c, 2, digests, 0.02)]
else:
    # A word that nobody has read when the stream begins.
    d.sendall(b"left"); time.sleep(0.001)
t = [threading.Thread(target=job, args=arguments) for job, *arguments in jobs]
[each.start() for each in t]; [each.join(20) for each in t]
assert digests[1] == digests[-1]
if {number} % 2:
    assert digests[2] == digests[-2]
else:
    assert take(c, 4) == b"left"
c.close(); d.close(); l.close()
""")
        until(lambda: not rig.pairs())
    assert rig.ended(abi.EndReason.BULK) > before


def test_what_nobody_asked_for_is_left_alone(rig: Rig) -> None:
    process = rig.process()
    rig.write(same=0)
    before = rig.stat(abi.Stat.PAIRS)
    pair_up(process)
    process.do("talk(30)")
    assert rig.stat(abi.Stat.PAIRS) == before and rig.pairs() == []


def test_switched_off_and_on_live(rig: Rig) -> None:
    process = rig.process()
    pair_up(process)
    process.do("talk(20)")
    cookie = rig.pairs()[0].ends[0].cookie
    for changes, back in (
        ({"on": False}, {"on": True}),
        ({"classes": 0}, {"classes": 1}),
        ({"off": frozenset({cookie})}, {"off": frozenset()}),
    ):
        rig.write(**changes)
        sends = rig.pairs()[0].ends[0].sends
        process.do("talk(20)")
        assert rig.pairs()[0].ends[0].sends == sends
        rig.write(**back)
        process.do("talk(20)")
        assert rig.pairs()[0].ends[0].sends > sends + 10


def test_now_and_then_a_word_goes_by_tcp(rig: Rig) -> None:
    process = rig.process()
    rig.write(beat_s=0.2)
    pair_up(process)
    process.do("talk(20)")
    tcp = rig.pairs()[0].ends[0].tcp_sends
    process.do("""
for _ in range(10):
    time.sleep(0.05)
    talk(4)
""")
    assert tcp + 2 <= rig.pairs()[0].ends[0].tcp_sends + rig.pairs()[0].ends[1].tcp_sends
    assert rig.pairs()[0].ends[0].sends > 20


def test_who_does_not_read_is_left_to_tcp(rig: Rig) -> None:
    """Both speak by turns and neither reads: what waits unread has a limit, and arrives in order."""
    process = rig.process()
    pair_up(process)
    process.do("talk(20)")
    process.do("""
sent = 0
for _ in range(300):
    c.sendall(bytes([sent & 255]) * 1000); d.sendall(bytes([sent & 255]) * 1000); sent += 1
""")
    (pair,) = rig.pairs()
    assert pair.ended == abi.EndReason.BEHIND
    assert max(end.unread for end in pair.ends) <= rig.wanted.run_bytes + 1000 + MESSAGE
    process.do("""
for s in (c, d):
    got = take(s, 300_000)
    assert got == b"".join(bytes([number & 255]) * 1000 for number in range(300))
""")


@pytest.mark.parametrize("size", [1, 100])
def test_few_sends_wait_however_small(rig: Rig, size: int) -> None:
    """The kernel keeps a thousand bytes for each, which are nobody's."""
    process = rig.process()
    pair_up(process)
    process.do("talk(20)")
    before = rig.pairs()[0].ends[0].sends
    process.do(f"for number in range(2000): c.sendall(bytes([number & 255]) * {size})")
    (pair,) = rig.pairs()
    assert pair.ended == abi.EndReason.BEHIND
    assert 0 <= rig.wanted.run_bytes // (size + MESSAGE) - (pair.ends[0].sends - before) <= 1
    process.do(f"assert take(d, 2000 * {size}) == b''.join(bytes([number & 255]) * {size} for number in range(2000))")


def test_many_small_sends_that_are_read_in_time_stay_shortened(rig: Rig) -> None:
    """Some always wait: what waits is counted, not what has been sent."""
    process = rig.process()
    pair_up(process)
    process.do("talk(20)")
    process.do("""
for number in range(100): c.sendall(b"x")
for number in range(3000):
    c.sendall(b"x"); assert take(d, 1) == b"x"
assert take(d, 100) == bytes([120]) * 100
""")
    (pair,) = rig.pairs()
    assert not pair.ended and pair.ends[0].sends > 3100


def test_while_tcp_is_short_of_memory_nothing_is_handed_over(rig: Rig) -> None:
    """Pressure is what comes long before the limit, at which handing over would be an error."""
    process = rig.process()
    limits = Path("/proc/sys/net/ipv4/tcp_mem")
    before = limits.read_text()
    pair_up(process)
    process.do("talk(20)")
    sends = rig.pairs()[0].ends[0].sends
    try:
        limits.write_text(f"0 0 {before.split()[2]}")
        # Somebody has to notice it.
        process.do("""
a = socket.create_server(("127.0.0.1", 0)); b = socket.create_connection(a.getsockname()); e, _ = a.accept()
b.setblocking(False)
try:
    while True: b.send(bytes(65536))
except BlockingIOError: pass
talk(20)
""")
        pair = min(rig.pairs(), key=lambda each: each.made)
        assert not pair.ended and pair.ends[0].sends <= sends + 1
    finally:
        limits.write_text(before)
    process.do("e.close(); b.close(); a.close(); talk(20)")
    assert min(rig.pairs(), key=lambda each: each.made).ends[0].sends > sends + 10


def test_who_speaks_at_once_with_the_other_stays_shortened(rig: Rig) -> None:
    """As many streams in one connection do: turns overlap, but everything is read in time."""
    process = rig.process()
    pair_up(process)
    process.do("talk(20)")
    process.do("""
def pump(s):
    for number in range(2000):
        s.sendall(bytes([number & 255]) * 500)
        if number % 16 == 15:
            take(s, 8000)
t = [threading.Thread(target=pump, args=(s,)) for s in (c, d)]
[each.start() for each in t]; [each.join(20) for each in t]
""")
    (pair,) = rig.pairs()
    # Who finds much unread sends by TCP: fewer on one CPU, some 600 on two that have nothing else to do.
    assert not pair.ended and pair.ends[0].sends > 1000 and pair.ends[1].sends > 1000


def test_an_urgent_byte_is_one(rig: Rig) -> None:
    process = rig.process()
    pair_up(process)
    process.do("talk(20)")
    (pair,) = rig.pairs()
    assert pair.ends[0].sends and not pair.ended
    ended = rig.ended(abi.EndReason.SENDS)
    process.do("""
import select
c.sendall(b"before"); assert take(d, 6) == b"before"
c.send(b"!", socket.MSG_OOB); c.sendall(b"after")
assert select.select([], [], [d], 5)[2]
assert d.recv(1, socket.MSG_OOB) == b"!" and take(d, 5) == b"after"
""")
    assert rig.ended(abi.EndReason.SENDS) == ended + 1 and rig.pairs() == []
    process.do("talk(20)")
