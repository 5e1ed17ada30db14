"""Every run of tests knows what it makes, and leaves nothing; see session.py."""

from __future__ import annotations

from hypothesis import HealthCheck, settings

from tests import session

# How long an example takes, and how easily it is found, says something of the machine and of chance, not of what is tested.
settings.register_profile(
    "fibril",
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much, HealthCheck.data_too_large],
)
settings.load_profile("fibril")


def pytest_configure() -> None:
    session.begin()


def pytest_unconfigure() -> None:
    session.end()
