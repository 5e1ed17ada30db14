"""Declarations of this node, in a real database."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from ipaddress import ip_address, ip_network
from pathlib import Path

import pytest

from services.common import errors
from services.identity.db import open_db
from services.identity.ipcache.local import LocalEntries
from services.identity.ipcache.model import ALL_IPV4, prefix_key
from services.identity.ipcache.table import Table

NET = prefix_key(ip_network("198.51.100.0/24"))
ONE = prefix_key(ip_network("198.51.100.1/32"))
V6 = prefix_key(ip_network("::/0"))


@pytest.fixture
def db(tmp_path: Path) -> Iterator[sqlite3.Connection]:
    made = open_db(tmp_path / "state" / "identity.db")
    yield made
    made.close()


def content(table: Table) -> dict[bytes, int]:
    return {entry.key: entry.identity for entry in table.entries()}


def test_declarations_outlast_the_process(db: sqlite3.Connection) -> None:
    first = LocalEntries(db, Table("n"))
    first.put("policy/a", {NET: 100, ONE: 101})
    first.put("policy/b", {NET: 100})
    first.delete("policy/a", [ONE])
    table = Table("n")
    again = LocalEntries(db, table)
    assert content(table) == {NET: 100}
    assert again.delete("policy/a", None) == 1
    assert content(table) == {NET: 100}
    assert again.delete("policy/b", None) == 1
    assert content(table) == {}
    assert list(db.execute("SELECT * FROM local_entries")) == []


def test_owners_must_agree_and_nothing_is_done_when_they_do_not(db: sqlite3.Connection) -> None:
    table = Table("n")
    local = LocalEntries(db, table)
    local.put("a", {NET: 100})
    with pytest.raises(errors.FailedPrecondition, match=r"198\.51\.100\.0/24 has been declared by 'a'"):
        local.put("b", {ONE: 7, NET: 101})
    assert content(table) == {NET: 100}
    local.put("a", {NET: 101})  # alone with it
    local.put("b", {NET: 101})
    with pytest.raises(errors.FailedPrecondition):
        local.put("a", {NET: 102})
    assert content(table) == {NET: 101}


def test_taking_back_what_was_never_declared_is_fine(db: sqlite3.Connection) -> None:
    local = LocalEntries(db, Table("n"))
    local.put("a", {NET: 100})
    assert local.delete("b", None) == 0
    assert local.delete("b", [NET]) == 0
    assert local.delete("a", [ONE]) == 0
    assert len(local) == 1


def test_all_of_ipv6_says_nothing_of_ipv4(db: sqlite3.Connection) -> None:
    """Programs look IPv4 up as a part of IPv6."""
    table = Table("n")
    local = LocalEntries(db, table)
    local.put("a", {V6: 100})
    assert content(table) == {V6: 100, ALL_IPV4: 2}
    found = table.lookup(ip_address("192.0.2.1"))
    assert found is not None and found.identity == 2
    local.put("a", {ALL_IPV4: 7})
    assert content(table) == {V6: 100, ALL_IPV4: 7}
    local.delete("a", [ALL_IPV4])
    assert content(table) == {V6: 100, ALL_IPV4: 2}
    local.delete("a", [V6])
    assert content(table) == {}
