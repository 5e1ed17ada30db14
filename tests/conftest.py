"""Every run of tests knows what it makes, and leaves nothing; see session.py."""

from __future__ import annotations

from tests import session


def pytest_configure() -> None:
    session.begin()


def pytest_unconfigure() -> None:
    session.end()
