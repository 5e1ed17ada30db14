"""Classes: what is refused, what is kept, what the tables hold for them."""

from __future__ import annotations

from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fibril.sockaccel.v1 import sockaccel_pb2 as pb
from services.common import db
from services.common.errors import InvalidArgument, NotFound, ResourceExhausted
from services.sockaccel import convert
from services.sockaccel.abi import CLASSES
from services.sockaccel.config import SockAccelSection
from services.sockaccel.model import LOCAL_PROXIES, Class, Scope
from services.sockaccel.plan import Host, Pod, plan
from services.sockaccel.store import MIGRATIONS, Store

HOST = Host(7, frozenset({ip_address("192.0.2.1")}))
PODS = [
    Pod(1, "shop/cart", 101, {"app": "cart", "tier": "web"}, 5001, frozenset({ip_address("10.0.0.1")})),
    Pod(2, "shop/db", 102, {"app": "db"}, 5002, frozenset({ip_address("10.0.0.2")})),
]


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "state" / "sockaccel.db"


# ---- what is refused ----------------------------------------------------------------------------------------
@pytest.mark.parametrize(("message", "field"), [
    (pb.Class(scopes=[pb.SCOPE_POD]), "declared.name"),
    (pb.Class(name="a b", scopes=[pb.SCOPE_POD]), "declared.name"),
    (pb.Class(name="x" * 64, scopes=[pb.SCOPE_POD]), "declared.name"),
    (pb.Class(name="a"), "declared.scopes"),
    (pb.Class(name="a", scopes=[pb.SCOPE_UNSPECIFIED]), "declared.scopes[0]"),
    (pb.Class(name="a", scopes=[pb.SCOPE_POD, 99]), "declared.scopes[1]"),  # type: ignore[list-item]
    (pb.Class(name="a", scopes=[pb.SCOPE_POD], ports=[pb.PortRange()]), "declared.ports[0].first"),
    (pb.Class(name="a", scopes=[pb.SCOPE_POD], ports=[pb.PortRange(first=70000)]), "declared.ports[0].first"),
    (pb.Class(name="a", scopes=[pb.SCOPE_POD], ports=[pb.PortRange(first=9, last=8)]), "declared.ports[0].last"),
    (pb.Class(name="a", scopes=[pb.SCOPE_POD], ports=[pb.PortRange(first=1, last=5000)]), "declared.ports"),
    (pb.Class(name="a", scopes=[pb.SCOPE_POD], client_labels={"": "x"}), "declared.client_labels"),
    (pb.Class(name="a", scopes=[pb.SCOPE_POD], server_labels={"k": "v" * 254}), "declared.server_labels"),
    (pb.Class(name="a", scopes=[pb.SCOPE_POD], cgroups=["/"]), "declared.cgroups[0]"),
    (pb.Class(name="a", scopes=[pb.SCOPE_POD], cgroups=["a/../b"]), "declared.cgroups[0]"),
    (pb.Class(name="a", scopes=[pb.SCOPE_POD], cgroups=["x"] * 65), "declared.cgroups"),
])  # fmt: skip
def test_what_is_no_class_is_named_by_its_field(message: pb.Class, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        convert.declared(message, "declared")
    assert refused.value.field == field


names = st.from_regex(r"\A[A-Za-z0-9_.-]{1,63}\Z")
texts = st.text(min_size=1, max_size=20)
some_classes = st.builds(
    Class,
    names,
    st.booleans(),
    st.frozensets(st.sampled_from(Scope), min_size=1),
    st.lists(st.tuples(st.integers(1, 32000), st.integers(0, 100)), max_size=5).map(
        lambda found: tuple(sorted({(first, first + more) for first, more in found}))
    ),
    st.dictionaries(texts, texts, max_size=3),
    st.dictionaries(texts, texts, max_size=3),
    st.just(()),
    st.booleans(),
    st.booleans(),
)


@given(some_classes)
def test_a_class_is_the_same_after_a_journey(each: Class) -> None:
    assert convert.declared(pb.Class.FromString(convert.class_message(each).SerializeToString()), "declared") == each


# ---- what is kept -------------------------------------------------------------------------------------------
def test_a_new_node_has_local_proxies_and_what_was_deleted_stays_so(path: Path) -> None:
    store = Store(path)
    assert store.on and store.classes == {"local-proxies": (0, LOCAL_PROXIES)}
    store.delete("local-proxies")
    store.switch(False)
    store.close()
    store = Store(path)
    assert not store.on and store.classes == {}
    store.close()


@pytest.mark.parametrize("touched", [False, True])
def test_a_first_class_of_an_older_node_is_todays_unless_somebody_has_changed_it(path: Path, touched: bool) -> None:
    older = pb.Class(name="local-proxies", enabled=not touched, scopes=[pb.SCOPE_POD], proxies_only=True)
    with db.open_db(path, MIGRATIONS[:2], "") as made:
        made.execute("UPDATE classes SET declared = ?", (older.SerializeToString(deterministic=True),))
    made.close()
    store = Store(path)
    assert store.classes["local-proxies"][1].nonblocking_only is not touched
    store.close()


@pytest.mark.parametrize("reached", ["a name", "tables"])
def test_who_was_killed_making_the_store_finds_local_proxies(path: Path, reached: str) -> None:
    path.parent.mkdir()
    if reached == "a name":
        path.touch()
    else:
        db.open_db(path, MIGRATIONS, "").close()
    store = Store(path)
    assert store.on and store.classes == {"local-proxies": (0, LOCAL_PROXIES)}
    store.close()


def test_bits_are_kept_and_there_are_only_so_many(path: Path) -> None:
    store = Store(path)
    mine = [Class(f"c{number}", True, frozenset({Scope.PODS})) for number in range(CLASSES)]
    for each in mine[: CLASSES - 1]:
        assert store.upsert(each)
    with pytest.raises(ResourceExhausted, match="32"):
        store.upsert(mine[-1])
    assert not store.upsert(Class("c3", False, frozenset({Scope.HOST})))
    bits = {name: bit for name, (bit, _) in store.classes.items()}
    assert sorted(bits.values()) == list(range(CLASSES))
    freed = store.delete("c7")
    assert store.upsert(mine[-1]) and store.classes["c31"][0] == freed == bits["c7"]
    with pytest.raises(NotFound):
        store.delete("c7")
    store.close()
    again = Store(path)
    assert {name: bit for name, (bit, _) in again.classes.items()} == {
        **{name: bit for name, bit in bits.items() if name != "c7"}, "c31": freed,
    }  # fmt: skip
    assert again.name_of(freed) == "c31" and again.name_of(99) == ""
    again.close()


# ---- what the tables hold -----------------------------------------------------------------------------------
def planned(*classes: Class):  # type: ignore[no-untyped-def]
    groups = {"shop.slice": 900}
    return plan(
        True, list(enumerate(classes)), PODS, HOST, SockAccelSection(), lambda path: groups.get(path, 0), frozenset()
    )


def test_labels_choose_the_spaces() -> None:
    wanted, amiss = planned(
        Class("all", True, frozenset({Scope.POD})),
        Class("to-db", True, frozenset({Scope.PODS}), client_labels={"app": "cart"}, server_labels={"app": "db"}),
        Class("probes", True, frozenset({Scope.HOST_POD}), server_labels={"tier": "web"}),
    )
    assert amiss == {}
    assert wanted.spaces == {101: (0b111, 0b101, 1), 102: (0b101, 0b011, 2), 7: (0b100, 0, 0)}
    assert (wanted.same, wanted.pods, wanted.host, wanted.within) == (0b001, 0b010, 0b100, 0)


def test_ports_groups_and_proxies_are_masks() -> None:
    wanted, amiss = planned(
        Class("proxies", True, frozenset({Scope.POD}), proxies_only=True, nonblocking_only=True),
        Class("redis", True, frozenset({Scope.PODS}), ports=((6379, 6380),), cgroups=("shop.slice",)),
        Class("lost", False, frozenset({Scope.PODS}), ports=((6380, 6380),), cgroups=("gone.slice",)),
    )
    assert wanted.classes == 0b011 and wanted.any_port == 0b001 and wanted.any_group == 0b001 and wanted.proxies == 0b001
    assert wanted.nonblocking == 0b001
    assert wanted.ports[6379] == (0b010, False) and wanted.ports[6380] == (0b110, False) and wanted.ports[15001] == (0, True)
    assert wanted.groups == {900: 0b010} and amiss == {"lost": "there is no control group gone.slice"}


def test_nothing_declared_is_no_space_at_all() -> None:
    wanted, _ = planned()
    assert wanted.spaces == {} and wanted.classes == 0


def test_all_endpoints_of_a_space_are_known_and_no_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of two interfaces of a pod, as well."""
    second = Pod(3, "shop/cart", 101, PODS[0].labels, 5001, frozenset({ip_address("10.1.0.1")}))
    monkeypatch.setitem(globals(), "PODS", [*PODS, second])
    web = {"tier": "web"}
    wanted, _ = planned(Class("web", True, frozenset({Scope.POD}), client_labels=web, server_labels=web))
    assert set(wanted.spaces) == {101} and wanted.endpoints == {1, 3}
