"""What a damaged, locked or unwritable database is to those who use it."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from services.common import db, errors

TABLES = ("CREATE TABLE things (name TEXT PRIMARY KEY);",)


@pytest.fixture
def opened(tmp_path: Path) -> sqlite3.Connection:
    made = db.open_db(tmp_path / "state" / "some.db", TABLES, "move it away")
    made.execute("PRAGMA busy_timeout = 10")
    return made


def put(opened: sqlite3.Connection) -> None:
    with opened:
        opened.execute("INSERT INTO things VALUES ('a')")


def test_a_file_somebody_else_has_locked_is_unavailable_for_now(
    opened: sqlite3.Connection, tmp_path: Path
) -> None:
    other = sqlite3.connect(tmp_path / "state" / "some.db")
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(errors.Unavailable, match="locked"):
        put(opened)
    other.close()
    put(opened)


def test_a_file_that_cannot_be_written_fails_as_a_precondition(opened: sqlite3.Connection) -> None:
    opened.execute("PRAGMA query_only = 1")
    with pytest.raises(errors.FailedPrecondition, match="readonly"):
        put(opened)
    opened.execute("PRAGMA query_only = 0")
    put(opened)


def test_a_full_disk_is_exhausted(opened: sqlite3.Connection) -> None:
    opened.execute("PRAGMA max_page_count = 1")
    with pytest.raises(errors.ResourceExhausted, match="full"), opened:
        opened.executemany("INSERT INTO things VALUES (?)", [(f"{n:0500}",) for n in range(100)])
    assert opened.execute("SELECT count(*) FROM things").fetchone()[0] == 0


def test_a_mistake_in_a_statement_stays_one(opened: sqlite3.Connection) -> None:
    with pytest.raises(sqlite3.OperationalError, match="no such table"):
        opened.execute("SELECT * FROM missing")


def test_what_is_no_database_is_refused_with_its_path(tmp_path: Path) -> None:
    (tmp_path / "some.db").write_bytes(b"no database" * 1000)
    with pytest.raises(errors.FailedPrecondition, match=r"some\.db cannot be used") as caught:
        db.open_db(tmp_path / "some.db", TABLES, "move it away")
    assert "move it away" in str(caught.value)
