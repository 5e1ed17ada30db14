"""However a connection begins, what is said on it arrives, shortened or not, and nothing is left of it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from accelrig import A4, A6, B4, Rig, ip, until
from test_calls import KNOWS

from services.sockaccel import abi
from tests.e2e.lb.sockrig import Process

CONVERSE = """
import gc
def converse(c, d, rounds=30):
    # Who is who does not matter: both are here.
    for number in range(rounds):
        for one, other in ((c, d), (d, c)):
            word = pattern(1 + number * 37, number)
            one.sendall(word)
            assert exactly(other, len(word)) == word
    return "fine"
def sysctl(name, value):
    with open(f"/proc/sys/net/ipv4/{name}", "w") as file:
        file.write(str(value))
def bound_to(port=0, family=socket.AF_INET, host="127.0.0.1"):
    s = socket.socket(family)
    s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    s.bind((host, port))
    return s
"""


@pytest.fixture
def process(rig: Rig) -> Iterator[Process]:
    made = rig.process()
    made.do(KNOWS + CONVERSE)
    yield made
    made.do("c = d = l = None; gc.collect()")
    until(lambda: not rig.pairs())


def handed(rig: Rig) -> int:
    return rig.stat(abi.Stat.SENDS)


def test_a_client_speaks_before_it_is_accepted(rig: Rig, process: Process) -> None:
    """And connects without waiting."""
    before = handed(rig)
    assert process.do("""
l = bound_to(); l.listen()
c = socket.socket(); c.setblocking(False)
assert c.connect_ex(l.getsockname()) in (0, errno.EINPROGRESS)
assert ready(c, select.POLLOUT)
c.setblocking(True)
for number in range(50): c.sendall(b'%02d' % number)
time.sleep(PAUSE_S)
d, _ = l.accept()
""", "[exactly(d, 100) == b''.join(b'%02d' % number for number in range(50)), converse(c, d)]") == [True, "fine"]  # fmt: skip
    assert handed(rig) > before + 40


def test_a_server_that_waits_for_the_first_word(rig: Rig, process: Process) -> None:
    """TCP_DEFER_ACCEPT: the last packet of the handshake is not looked at."""
    before = handed(rig)
    assert process.do("""
l = bound_to(); l.setsockopt(socket.IPPROTO_TCP, socket.TCP_DEFER_ACCEPT, 1); l.listen()
c = socket.create_connection(l.getsockname()); c.sendall(b"first")
d, _ = l.accept()
""", "[got(d), converse(c, d)]") == ["first", "fine"]  # fmt: skip
    assert handed(rig) == before or handed(rig) > before + 40


@pytest.mark.parametrize("value", [2, 1])
def test_a_server_under_syn_cookies(rig: Rig, process: Process, value: int) -> None:
    """2: always. It has kept nothing of the client until the last packet of the handshake."""
    before = handed(rig)
    process.do(f"sysctl('tcp_syncookies', {value})")
    try:
        assert process.do("""
l = bound_to(); l.listen()
c = socket.create_connection(l.getsockname()); d, _ = l.accept()
""", "converse(c, d)") == "fine"  # fmt: skip
    finally:
        process.do("sysctl('tcp_syncookies', 1)")
    assert handed(rig) > before + 40


def test_the_first_word_comes_with_the_first_packet(rig: Rig, process: Process) -> None:
    """TCP_FASTOPEN: the server answers before the client is connected."""
    process.do("sysctl('tcp_fastopen', 3)")
    try:
        for _ in range(3):  # the first has no cookie yet
            assert process.do("""
l = bound_to(7799); l.setsockopt(socket.IPPROTO_TCP, socket.TCP_FASTOPEN, 5); l.listen()
c = socket.socket(); c.sendto(b"first", socket.MSG_FASTOPEN, l.getsockname())
d, _ = l.accept()
found = [got(d)]
d.sendall(b"second"); found += [got(c), converse(c, d), bool(d.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 104)[5] & 32)]
c.close(); d.close(); l.close()
""", "found")[:3] == ["first", "second", "fine"]  # fmt: skip
        assert process.give("found[3]"), "no data with the first packet"
    finally:
        process.do("sysctl('tcp_fastopen', 1)")


def test_a_socket_that_is_connected_to_itself(rig: Rig, process: Process) -> None:
    before = rig.stat(abi.Stat.PAIRS)
    assert process.do("""
c = bound_to(); c.connect(c.getsockname()); found = []
for number in range(20):
    c.sendall(b'%02d' % number); found.append(exactly(c, 2) == b'%02d' % number)
""", "all(found)")  # fmt: skip
    assert rig.stat(abi.Stat.PAIRS) == before


def test_a_listener_that_closes_with_clients_it_has_not_accepted(rig: Rig, process: Process) -> None:
    for on in (False, True):
        rig.write(on=on)
        found = process.do("""
l = bound_to(); l.listen(64)
them = [socket.create_connection(l.getsockname()) for _ in range(20)]
for each in them[::2]: each.sendall(b"hello")
l.close(); time.sleep(PAUSE_S)
found = [[got(each), tell(lambda: each.send(b"."))] for each in them]
for each in them: each.close()
""", "found")  # fmt: skip
        assert found == [["ECONNRESET", "EPIPE"]] * 20
    until(lambda: not rig.pairs())


def test_the_same_ports_again_and_again(rig: Rig, process: Process) -> None:
    """Nothing of an earlier connection is met in a later one of the same addresses and ports, whatever was left unread."""
    before = handed(rig)
    assert process.do("""
l = bound_to(7798); l.listen()
for number in range(15):
    c = bound_to(7797); c.connect(l.getsockname()); d, _ = l.accept()
    assert converse(c, d, 8) == "fine"
    c.sendall(b"left %d" % number); d.sendall(b"left %d" % number)
    for s in (c, d)[:: 1 if number % 2 else -1]:
        linger(s, 0); s.close()
l.close()
""", "'fine'") == "fine"  # fmt: skip
    assert handed(rig) > before + 15 * 8


@pytest.mark.parametrize("moved", [False, True])
def test_an_end_that_moves_to_another_control_group(rig: Rig, process: Process, moved: bool) -> None:
    """A socket belongs to the group that it was made in."""
    process.do("l = bound_to(); l.listen(); c = socket.create_connection(l.getsockname()); d, _ = l.accept()")
    process.do("converse(c, d, 10)")
    if moved:
        root = rig.group.parent
        (root / "cgroup.procs").write_text(str(process.pid))
    before = handed(rig)
    assert process.give("converse(c, d)") == "fine"
    assert handed(rig) == before + 60


def test_pods_of_one_node_begin_at_once(rig: Rig) -> None:
    """A hundred clients at a time: everybody finds its own server."""
    server, client = rig.process(1), rig.process(0)
    for each in (server, client):
        each.do(KNOWS + CONVERSE)
    port = server.do(f"""
l = bound_to(0, host={B4!r}); l.listen(256)
def serve():
    while True:
        d, _ = l.accept()
        threading.Thread(target=echo, args=(d,), daemon=True).start()
def echo(d):
    while word := d.recv(99):
        d.sendall(word)
    d.close()
threading.Thread(target=serve, daemon=True).start()
""", "l.getsockname()[1]")  # fmt: skip
    before = rig.stat(abi.Stat.SHORTENED)
    assert client.do(f"""
wrong = []
def one(number):
    c = socket.create_connection(({B4!r}, {port}))
    for turn in range(20):
        word = b"%d.%d" % (number, turn)
        c.sendall(word)
        if exactly(c, len(word)) != word: wrong.append(word)
    c.close()
them = [threading.Thread(target=one, args=(number,)) for number in range(100)]
for each in them: each.start()
for each in them: each.join(20)
""", "[wrong, sum(each.is_alive() for each in them)]") == [[], 0]  # fmt: skip
    assert rig.stat(abi.Stat.SHORTENED) > before + 80
    until(lambda: not rig.pairs())


# Addresses nobody has: what is sent there meets the rules of a mesh.
ELSEWHERE = {"ip": "198.51.100.7", "ip6": "2001:db8:7::7"}
TO = "{family} daddr {to} tcp dport 80"
RULES = {
    "redirect": f"chain out {{{{ type nat hook output priority -100; {TO} redirect to :15001; }}}}",
    "dnat": f"chain out {{{{ type nat hook output priority -100; {TO} dnat {{family}} to {{home}}:15001; }}}}",
    "tproxy": f"chain out {{{{ type route hook output priority -150; {TO} meta mark set 1; }}}}\n"
    f"chain pre {{{{ type filter hook prerouting priority -150; {TO} tproxy {{family}} to :15001; }}}}",
}


@pytest.fixture(params=list(ELSEWHERE))
def rerouted(rig: Rig, request: pytest.FixtureRequest) -> Iterator[str]:
    """Family of addresses; what has mark 1 is for this host."""
    family: str = request.param
    space, flag = rig.spaces[0].name, {"ip": "-4", "ip6": "-6"}[family]
    ways = [
        ("rule", "fwmark", "1", "table", "100"),
        ("route", "local", "default", "dev", "lo", "table", "100"),
        ("route", ELSEWHERE[family], "dev", "east"),
    ]
    for what, *words in ways:
        ip("-n", space, flag, what, "add", *words)
    try:
        yield family
    finally:
        for what, *words in reversed(ways):
            ip("-n", space, flag, what, "del", *words)


@pytest.mark.parametrize("way", list(RULES))
def test_a_proxy_that_is_given_connections_to_others(rig: Rig, process: Process, rerouted: str, way: str) -> None:
    """The two ends disagree about who speaks with whom: they are found by their sequence numbers."""
    family, home = ("AF_INET", A4) if rerouted == "ip" else ("AF_INET6", f"[{A6}]")
    chains = RULES[way].format(family=rerouted, to=ELSEWHERE[rerouted], home=home)
    rules = f"table inet mesh {{\n{chains}\n}}"
    before = handed(rig)
    rig.write(proxies=1, ports={15001: (1, True)})  # who listens there is seen to be a proxy
    try:
        assert process.do(f"""
import subprocess
subprocess.run(["nft", {rules!r}], check=True)
l = bound_to(15001, socket.{family}, "")
if {way == "tproxy"}:
    l.setsockopt(*{{"AF_INET": (socket.SOL_IP, 19), "AF_INET6": (socket.IPPROTO_IPV6, 75)}}["{family}"], 1)  # transparent
l.listen()
c = socket.socket(socket.{family}); c.connect(({ELSEWHERE[rerouted]!r}, 80)); d, _ = l.accept()
""", "[c.getpeername()[:2] == d.getsockname()[:2], converse(c, d)]") == [way == "tproxy", "fine"]  # fmt: skip
        assert handed(rig) - before > 40
        (pair,) = rig.pairs()
        assert pair.ends[0].netns == pair.ends[1].netns == rig.cookies[0]
    finally:
        rig.write(proxies=0, ports={})
        process.do('c = d = l = None; gc.collect(); subprocess.run(["nft", "delete table inet mesh"], check=True)')
