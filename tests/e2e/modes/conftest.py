"""Labs of every mode; see modelab.py."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from modelab import NETWORK, ModeLab, lab


@pytest.fixture(scope="session")
def overlay() -> Iterator[ModeLab]:
    """Two nodes in overlay mode, both families everywhere, a pod each. Tests leave it as they found it."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with lab("--nodes", "2", "--pods", "1", *NETWORK) as made:
        yield made
