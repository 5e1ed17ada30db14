"""Targets: what is refused, what is kept, whom they are about."""

from __future__ import annotations

from pathlib import Path

import pytest

from fibril.tls.v1 import tls_pb2 as pb
from services.common.errors import InvalidArgument, NotFound, ResourceExhausted
from services.sockaccel.store import Store
from services.sockaccel.tls import model


@pytest.mark.parametrize(
    ("wrong", "field"),
    [
        (pb.Target(name="a b", pods=["p"]), "target.name"),
        (pb.Target(name="a"), "target.pods"),
        (pb.Target(name="a", pods=[""]), "target.pods[0]"),
        (pb.Target(name="a", pods=["p"] * 65), "target.pods"),
        (pb.Target(name="a", pods=["p"], headers=["x-a", "b c"]), "target.headers[1]"),
        (pb.Target(name="a", pods=["p"], headers=["Authorization"]), "target.headers[0]"),
        (pb.Target(name="a", pods=["p"], headers=["x-a", "X-Gitlab-Token"]), "target.headers[1]"),
        (pb.Target(name="a", pods=["p"], kernel_ports=[443, 0]), "target.kernel_ports[1]"),
        (pb.Target(name="a", pods=["p"], kernel_ports=[65536]), "target.kernel_ports[0]"),
        (pb.Target(name="a", pods=["p"], kernel_ports=range(1, 66)), "target.kernel_ports"),
        (pb.Target(name="a", labels={"": "x"}), "target.labels"),
        (pb.Target(name="a", labels={"k": "x" * 254}), "target.labels"),
    ],
)
def test_what_is_wrong_is_named(wrong: pb.Target, field: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        model.declared(wrong, "target")
    assert refused.value.field == field


def test_a_target_is_about_pods_by_name_or_by_all_labels() -> None:
    target = model.declared(pb.Target(name="a", pods=["shop/cart"], labels={"app": "db", "tier": "x"}), "target")
    assert target.is_about("shop/cart", {})
    assert target.is_about("other", {"app": "db", "tier": "x", "more": "y"})
    assert not target.is_about("other", {"app": "db"})
    assert not model.declared(pb.Target(name="a", pods=["p"]), "target").is_about("q", {"app": "db"})


def test_targets_are_kept_and_forgotten(tmp_path: Path) -> None:
    store = Store(tmp_path / "s.db")
    target = model.declared(pb.Target(name="a", pods=["p"], headers=["X-Kind"], query=True), "target")
    assert store.upsert_target(target) and not store.upsert_target(target)
    store.close()
    again = Store(tmp_path / "s.db")
    assert again.targets == {"a": target}
    again.delete_target("a")
    with pytest.raises(NotFound):
        again.delete_target("a")
    for number in range(model.TARGETS_MAX):
        again.upsert_target(model.declared(pb.Target(name=f"t{number}", pods=["p"]), "target"))
    with pytest.raises(ResourceExhausted):
        again.upsert_target(target)
    assert len(again.targets) == model.TARGETS_MAX
    again.close()
