"""One node for a module's tests."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.node import node
from tests import session
from tests.e2e.cni.netkit import UP, Fibril


@pytest.fixture(scope="module")
def fibril() -> Iterator[Fibril]:
    with node(session.name()) as fresh:
        fresh.fibril(*UP)
        made = Fibril(fresh)
        try:
            yield made
        finally:
            made.close()
