"""Configuration section `identities`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Final

from services.common.errors import InvalidArgument
from services.identity.identities.filter import EXCLUDE, INCLUDE, LabelFilter

WARN_AT: Final = 0.8
"""Share of the numbers in use from which on status warns."""


@dataclass(frozen=True)
class IdentitiesConfig:
    """The same on all nodes of a cluster."""

    include: tuple[str, ...] = field(
        default=INCLUDE,
        metadata={
            "help": "label keys that count, * stands for anything; of all patterns the longest decides"
        },
    )
    exclude: tuple[str, ...] = field(
        default=EXCLUDE,
        metadata={"help": "label keys that do not: what differs between pods, or changes with a rollout"},
    )
    lease_s: int = field(
        default=30, metadata={"help": "seconds after which a silent node is taken for lost, 2 to 600"}
    )
    quarantine_s: int = field(
        default=900,
        metadata={
            "help": "seconds a number that nobody holds is kept from other labels, at least twice lease_s"
        },
    )

    def __post_init__(self) -> None:
        self.filter()
        if not 2 <= self.lease_s <= 600:
            raise InvalidArgument(f"{self.lease_s} is outside 2..600", field="lease_s")
        if not 2 * self.lease_s <= self.quarantine_s <= 86_400:
            raise InvalidArgument(
                f"{self.quarantine_s} is outside {2 * self.lease_s}..86400",
                field="quarantine_s",
                fix="packets and nodes cut off may carry the number for a while after nobody holds it",
            )

    def filter(self) -> LabelFilter:
        """Which labels count."""
        return LabelFilter(self.include, self.exclude)
