"""A node to test on; see ctlnode.py."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from ctlnode import Node

from services.common.kernel import netns


@pytest.fixture
def node() -> Iterator[Node]:
    """A namespace with loopback up, in which nothing has been started yet."""
    if os.geteuid() != 0:
        pytest.skip("needs root")
    # Short, for the sake of unix sockets' path limit.
    root = Path(tempfile.mkdtemp(prefix="fibril-"))
    made = Node(root)
    netns.add(made.netns)
    try:
        made.run("ip", "link", "set", "lo", "up")
        yield made
    finally:
        made.fibril("down", code=None)
        made.kill_all()
        netns.remove(made.netns)
        shutil.rmtree(root, ignore_errors=True)
