"""What people type about services and the prefilter."""

from __future__ import annotations

from pathlib import Path

import click
import pytest

from services.common.errors import InvalidArgument
from services.ctl import balancing
from services.ctl.commands.prefilter import Ttl


@pytest.mark.parametrize(
    "text", ["10.0.0.1", "10.0.0.1:", "10.0.0.1:\u00b2", "10.0.0.1:99999999999", "fd00::1:80"]
)
def test_what_is_no_endpoint_is_refused(text: str) -> None:
    with pytest.raises(InvalidArgument) as refused:
        balancing.endpoint(text, "vip")
    assert refused.value.field == "vip"


@pytest.mark.parametrize("weight", ["", "x", "\u00b2", "-1", "99999999999"])
def test_what_is_no_weight_is_refused(weight: str) -> None:
    with pytest.raises(InvalidArgument):
        balancing.backend(f"10.0.0.1:80={weight}")


def test_numbers_are_left_to_the_service() -> None:
    assert balancing.endpoint("[fd00::1]:70000", "vip") == ("fd00::1", 70000)


def test_what_is_no_text_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"\xff\xfe")
    with pytest.raises(InvalidArgument):
        balancing.read([str(tmp_path / "x")])


@pytest.mark.parametrize("text", ["0s", "", "1w", "999999999d"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter):
        Ttl().convert(text, None, None)
