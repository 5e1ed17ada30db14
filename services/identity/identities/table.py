"""All identities of a cluster as this node knows them, and which numbers are free. Pure.

Told by a watch, which lags, and by this node's own reads and writes, which are ahead of it. Revisions say what is newer.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Collection, Iterator

from services.common import errors
from services.identity import numbers
from services.identity.identities.store import Record

_GUESSES = 64


class Table:
    """By number, and by labels."""

    def __init__(self, cluster_id: int, space: int) -> None:
        """space: how many numbers there are."""
        self._cluster_id = cluster_id
        self.space = space
        self._records: dict[int, Record] = {}
        self._active: dict[str, int] = {}
        self._retired: dict[str, int] = {}
        self._sorted: list[int] | None = None
        self._seen = 0

    # -- what is told

    def knows(self, number: int, revision: int) -> bool:
        """The watch tells of an identity at this revision: whether there is nothing new in it."""
        self._seen = max(self._seen, revision)
        record = self._records.get(number)
        return record is not None and record.revision >= revision

    def put(self, record: Record) -> bool:
        """The watch tells of an identity; whether that is news."""
        self._seen = max(self._seen, record.revision)
        return self._set(record)

    def delete(self, number: int, revision: int) -> bool:
        """The watch tells that a number is free; whether that is news."""
        self._seen = max(self._seen, revision)
        return self._forget(number, revision)

    def learn(self, record: Record) -> bool:
        """This node has read or written an identity; whether that is news. What the watch must have told already is
        none, since it may have told what came after.
        """
        return record.revision > self._seen and self._set(record)

    def learn_absent(self, key: str, revision: int) -> Record | None:
        """This node has read that there was nothing with these labels; what it took to be there."""
        number = self._active.get(key) or self._retired.get(key)
        if number is None or revision <= self._seen:
            return None
        record = self._records[number]
        return record if self._forget(number, revision) else None

    def renew(self) -> None:
        """Another etcd tells from now on: its revisions cannot be compared with those known."""
        self._seen = 0
        self._records = {number: record._replace(revision=0) for number, record in self._records.items()}

    def _set(self, record: Record) -> bool:
        old = self._records.get(record.number)
        if old is not None:
            if old.revision >= record.revision:
                return False
            self._unlink(old)
        if old is None:
            self._sorted = None
        self._records[record.number] = record
        (self._retired if record.retired else self._active)[record.key] = record.number
        return True

    def _forget(self, number: int, revision: int) -> bool:
        old = self._records.get(number)
        if old is None or old.revision > revision:
            return False
        del self._records[number]
        self._unlink(old)
        self._sorted = None
        return True

    def _unlink(self, record: Record) -> None:
        index = self._retired if record.retired else self._active
        if index.get(record.key) == record.number:
            del index[record.key]

    # -- what is known

    @property
    def used(self) -> int:
        """Identities somebody holds, or will be found to hold no more."""
        return len(self._active)

    @property
    def quarantined(self) -> int:
        """Numbers nobody holds that may not be used yet."""
        return len(self._records) - len(self._active)

    @property
    def taken(self) -> int:
        """Numbers that are not free: used and quarantined ones."""
        return len(self._records)

    def get(self, number: int) -> Record | None:
        """What has a number, if anything."""
        return self._records.get(number)

    def active(self, key: str) -> Record | None:
        """The identity of these labels."""
        number = self._active.get(key)
        return None if number is None else self._records[number]

    def retired(self, key: str) -> Record | None:
        """A number in quarantine that these labels had."""
        number = self._retired.get(key)
        return None if number is None else self._records[number]

    def actives(self, after: int = 0) -> Iterator[Record]:
        """Identities with numbers above `after`, by number. The table must not change meanwhile."""
        if self._sorted is None:
            self._sorted = sorted(self._records)
        for index in range(bisect.bisect_right(self._sorted, after), len(self._sorted)):
            record = self._records[self._sorted[index]]
            if not record.retired:
                yield record

    # -- numbers

    def pick(self, avoid: Collection[int] = ()) -> int:
        """A number not known to be used, at random: so nodes that pick at once rarely meet.

        ResourceExhausted when there is none.
        """
        for tried in range(_GUESSES + self.space):
            if len(self._records) >= self.space:
                break
            if tried <= _GUESSES:
                at = random.randrange(self.space)
            at = (at + 1) % self.space  # nearly full: whatever comes next
            number = numbers.make(self._cluster_id, at + 1)
            if number not in self._records and number not in avoid:
                return number
        raise errors.ResourceExhausted(
            f"all {self.space} identity numbers of the cluster are taken: {self.used} used, "
            f"{self.quarantined} in quarantine",
            fix="let fewer labels count (identities.exclude), or end workloads; quarantine ends by itself",
        )
