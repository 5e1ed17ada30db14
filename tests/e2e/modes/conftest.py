"""Labs of every mode; see modelab.py."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from modelab import NETWORK, ModeLab, lab


@pytest.fixture(scope="session")
def overlay() -> Iterator[ModeLab]:
    """Two nodes in overlay mode, both families everywhere, a pod each. Tests leave it as they found it."""
    with lab("--nodes", "2", "--pods", "1", *NETWORK) as made:
        yield made
