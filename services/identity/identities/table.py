"""All identities of a cluster as this node knows them, and which numbers are free. Pure.

Told by a watch, which lags, and by this node's own reads and writes, which are ahead of it. Revisions say what is newer.
"""

from __future__ import annotations

import bisect
import random
from collections.abc import Collection, Iterator, Sequence

from services.common import errors
from services.identity import numbers
from services.identity.identities.store import Record

_GUESSES = 64

Change = tuple[int, Record | None, Record | None]
"""A number, what was known of it before, and what is now."""


class Table:
    """By number, and by the name of the labels, of which each has one of the other."""

    def __init__(self, cluster_id: int, space: int) -> None:
        """space: how many numbers there are."""
        self._cluster_id = cluster_id
        self.space = space
        self._records: dict[int, Record] = {}
        self._numbers: dict[str, int] = {}
        self._used = 0
        self._sorted: list[int] | None = None
        self._seen = 0

    # -- what is told

    def knows(self, name: str, revision: int) -> bool:
        """The watch tells of labels at this revision: whether there is nothing new in it."""
        self._seen = max(self._seen, revision)
        number = self._numbers.get(name)
        return number is not None and self._records[number].revision >= revision

    def put(self, record: Record) -> Sequence[Change]:
        """The watch tells of an identity."""
        self._seen = max(self._seen, record.revision)
        return self._set(record)

    def delete(self, name: str, revision: int) -> Sequence[Change]:
        """The watch tells that labels have no identity any more."""
        self._seen = max(self._seen, revision)
        return self._forget(name, revision)

    def learn(self, record: Record) -> Sequence[Change]:
        """This node has read or written an identity. What the watch must have told already is no news, since it may have
        told what came after.
        """
        return self._set(record) if record.revision > self._seen else ()

    def learn_absent(self, name: str, revision: int) -> Sequence[Change]:
        """This node has read that there was nothing with these labels."""
        return self._forget(name, revision) if revision > self._seen else ()

    def renew(self) -> None:
        """Another etcd tells from now on: its revisions cannot be compared with those known."""
        self._seen = 0
        self._records = {number: record._replace(revision=0) for number, record in self._records.items()}

    def _set(self, record: Record) -> Sequence[Change]:
        old = self._records.get(record.number)
        if old is not None and old.revision >= record.revision:
            return ()
        changes: list[Change] = [(record.number, old, record)]
        if old is not None:
            self._remove(old)
        elsewhere = self._numbers.get(record.name)
        if elsewhere is not None:
            # These labels had another number, whose end the watch has yet to tell.
            changes.insert(0, self._end(elsewhere))
        if old is None or elsewhere is not None:
            self._sorted = None
        self._records[record.number] = record
        self._numbers[record.name] = record.number
        self._used += not record.retired
        return changes

    def _forget(self, name: str, revision: int) -> Sequence[Change]:
        number = self._numbers.get(name)
        if number is None or self._records[number].revision > revision:
            return ()
        self._sorted = None
        return (self._end(number),)

    def _end(self, number: int) -> Change:
        old = self._records[number]
        self._remove(old)
        return number, old, None

    def _remove(self, record: Record) -> None:
        del self._records[record.number], self._numbers[record.name]
        self._used -= not record.retired

    # -- what is known

    @property
    def used(self) -> int:
        """Identities somebody holds, or will be found to hold no more."""
        return self._used

    @property
    def quarantined(self) -> int:
        """Numbers nobody holds that may not be used yet."""
        return len(self._records) - self._used

    @property
    def taken(self) -> int:
        """Numbers that are not free: used and quarantined ones."""
        return len(self._records)

    def get(self, number: int) -> Record | None:
        """What has a number, if anything."""
        return self._records.get(number)

    def of(self, name: str) -> Record | None:
        """What these labels have, if anything."""
        number = self._numbers.get(name)
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
