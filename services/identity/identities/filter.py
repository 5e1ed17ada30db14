"""Which labels count for an identity. A value: it can be replaced at run time, compared and printed.

The fewer labels count, the fewer identities there are. By default everything counts but what is known to differ between
the pods of one workload, or to change with every rollout: such labels make an identity a pod.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Final

from services.common.errors import InvalidArgument

INCLUDE: Final = ("*", "io.kubernetes.pod.namespace")
EXCLUDE: Final = (
    # What container runtimes and the API's own machinery add.
    "io.kubernetes.*",
    "kubernetes.io/*",
    "k8s.io/*",
    "*.beta.kubernetes.io/*",
    "annotation.*",
    "etcd_node",
    # A rollout, a job run.
    "pod-template-hash",
    "pod-template-generation",
    "controller-revision-hash",
    "rollouts-pod-template-hash",
    "controller-uid",
    "job-name",
    "batch.kubernetes.io/*",
    "helm.sh/chart",
    # One pod.
    "statefulset.kubernetes.io/pod-name",
    "apps.kubernetes.io/pod-index",
    # Where the scheduler has put it.
    "topology.kubernetes.io/*",
)
_REMEMBERED: Final = 4096


@dataclass(frozen=True)
class LabelFilter:
    """Patterns of label keys; `*` stands for any characters, "/" and "." too.

    Of the patterns that match a key the longest decides, not counting its asterisks; excluded if both lists have one of
    that length. A key that nothing matches does not count.
    """

    include: tuple[str, ...] = INCLUDE
    exclude: tuple[str, ...] = EXCLUDE
    _rules: tuple[tuple[re.Pattern[str], bool], ...] = field(init=False, repr=False, compare=False)
    _known: dict[str, bool] = field(default_factory=dict, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        """InvalidArgument for an empty pattern."""
        for name in ("include", "exclude"):
            for index, pattern in enumerate(getattr(self, name)):
                if not pattern:
                    raise InvalidArgument("a label pattern is empty", field=f"{name}[{index}]")
        rules = [(pattern, False) for pattern in self.exclude] + [(pattern, True) for pattern in self.include]
        rules.sort(key=lambda rule: -len(rule[0].replace("*", "")))  # stable: exclude before include
        object.__setattr__(self, "_rules", tuple((_compiled(pattern), counts) for pattern, counts in rules))

    def counts(self, key: str) -> bool:
        """Whether labels with this key count."""
        known = self._known.get(key)
        if known is None:
            known = next((counts for pattern, counts in self._rules if pattern.fullmatch(key)), False)
            if len(self._known) < _REMEMBERED:
                self._known[key] = known
        return known

    def apply(self, labels: Mapping[str, str]) -> dict[str, str]:
        """The labels that count."""
        return {key: value for key, value in labels.items() if self.counts(key)}


def _compiled(pattern: str) -> re.Pattern[str]:
    return re.compile(".*".join(map(re.escape, re.split(r"\*+", pattern))), re.DOTALL)
