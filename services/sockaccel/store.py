"""What is declared on this node, on its disk: classes, each with the bit it has in the kernel's masks, the main switch, and
whose TLS is looked into."""

from __future__ import annotations

import sqlite3
from pathlib import Path
from typing import Final

from fibril.sockaccel.v1 import sockaccel_pb2 as pb
from fibril.tls.v1 import tls_pb2
from services.common import db
from services.common.errors import NotFound, ResourceExhausted
from services.sockaccel import convert
from services.sockaccel.abi import CLASSES
from services.sockaccel.model import LOCAL_PROXIES, Class
from services.sockaccel.tls import model as tls

MIGRATIONS: Final = (
    # A new node's first class is in the same transaction: who is killed in between makes no node without it.
    f"""
    CREATE TABLE classes (bit INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE, declared BLOB NOT NULL);
    CREATE TABLE switch (everything INTEGER NOT NULL);
    INSERT INTO switch VALUES (1);
    INSERT INTO classes VALUES (
        0, '{LOCAL_PROXIES.name}', X'{convert.class_message(LOCAL_PROXIES).SerializeToString(deterministic=True).hex()}'
    );
    """,
    "CREATE TABLE tls_targets (name TEXT PRIMARY KEY, declared BLOB NOT NULL);",
    # A first class that nobody has touched is what it is on a new node. It was: on, SCOPE_POD, proxies_only.
    f"""
    UPDATE classes SET declared = X'{convert.class_message(LOCAL_PROXIES).SerializeToString(deterministic=True).hex()}'
    WHERE declared = X'0a0d6c6f63616c2d70726f7869657310011a01014001';
    """,
)


class Store:
    """Used from one event loop. A change is on the disk when the call returns; one that raises has changed nothing."""

    def __init__(self, path: Path) -> None:
        """FailedPrecondition when the file cannot be used."""
        self._db: sqlite3.Connection = db.open_db(
            path, MIGRATIONS, "restore it, or move it away and declare the classes anew"
        )
        self.on = bool(self._db.execute("SELECT everything FROM switch").fetchone()[0])
        self.classes: dict[str, tuple[int, Class]] = {}
        for bit, name, blob in self._db.execute("SELECT bit, name, declared FROM classes"):
            self.classes[name] = bit, convert.declared(pb.Class.FromString(blob), name)
        self.targets: dict[str, tls.Target] = {
            name: tls.declared(tls_pb2.Target.FromString(blob), name)
            for name, blob in self._db.execute("SELECT name, declared FROM tls_targets")
        }

    def close(self) -> None:
        self._db.close()

    def upsert(self, each: Class) -> bool:
        """Whether there was none of that name. ResourceExhausted: there are as many as there can be."""
        known = self.classes.get(each.name)
        bit = known[0] if known is not None else self._free_bit()
        blob = convert.class_message(each).SerializeToString(deterministic=True)
        with self._db:
            self._db.execute("INSERT OR REPLACE INTO classes VALUES (?, ?, ?)", (bit, each.name, blob))
        self.classes[each.name] = bit, each
        return known is None

    def delete(self, name: str) -> int:
        """The bit it had. NotFound."""
        bit = self.require(name)[0]
        with self._db:
            self._db.execute("DELETE FROM classes WHERE bit = ?", (bit,))
        del self.classes[name]
        return bit

    def require(self, name: str) -> tuple[int, Class]:
        """Bit and class of that name. NotFound."""
        if name not in self.classes:
            raise NotFound(f"there is no class {name!r}", field="name", fix="see: fibril sockaccel class ls")
        return self.classes[name]

    def switch(self, on: bool) -> None:
        """Everything off, or on."""
        with self._db:
            self._db.execute("UPDATE switch SET everything = ?", (int(on),))
        self.on = on

    def name_of(self, bit: int) -> str:
        """Name of the class with that bit; empty if it is gone."""
        return next((name for name, (number, _) in self.classes.items() if number == bit), "")

    def upsert_target(self, target: tls.Target) -> bool:
        """Whether there was none of that name. ResourceExhausted: there are as many as there can be."""
        created = target.name not in self.targets
        if created and len(self.targets) >= tls.TARGETS_MAX:
            raise ResourceExhausted(
                f"there are {tls.TARGETS_MAX} targets already, the limit is {tls.TARGETS_MAX}",
                field="target.name",
                fix="delete one",
            )
        blob = tls.message(target).SerializeToString(deterministic=True)
        with self._db:
            self._db.execute("INSERT OR REPLACE INTO tls_targets VALUES (?, ?)", (target.name, blob))
        self.targets[target.name] = target
        return created

    def delete_target(self, name: str) -> None:
        """NotFound."""
        if name not in self.targets:
            raise NotFound(f"there is no target {name!r}", field="name", fix="see: fibril tls target ls")
        with self._db:
            self._db.execute("DELETE FROM tls_targets WHERE name = ?", (name,))
        del self.targets[name]

    def _free_bit(self) -> int:
        taken = {bit for bit, _ in self.classes.values()}
        free = next((bit for bit in range(CLASSES) if bit not in taken), None)
        if free is None:
            raise ResourceExhausted(
                f"there are {CLASSES} classes already, the limit is {CLASSES}", field="declared.name", fix="delete one"
            )
        return free
