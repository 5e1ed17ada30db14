"""Log lines: one a record, fields quoted where needed, JSON that parses."""

from __future__ import annotations

import io
import json
import logging
from collections.abc import Iterator

import pytest

from services.common import log
from services.common.errors import InvalidArgument


@pytest.fixture(autouse=True)
def restored_root() -> Iterator[None]:
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(cfg: log.LogConfig) -> io.StringIO:
    stream = io.StringIO()
    log.setup("ipam", cfg, stream)
    return stream


def test_text_has_level_logger_and_fields() -> None:
    stream = lines(log.LogConfig())
    logging.getLogger("services.ipam.endpoints").info(
        "created %s", "x", extra={"endpoint": 7, "why": "two words"}
    )
    stamp, _, rest = stream.getvalue().partition(" ")
    assert rest == 'INFO    ipam.endpoints: created x endpoint=7 why="two words"\n'
    assert len(stamp) == len("2026-01-02T03:04:05.678Z") and stamp.endswith("Z")


def test_json_parses_and_keeps_its_own_keys() -> None:
    stream = lines(log.LogConfig(format="json"))
    try:
        raise ValueError("broken")
    except ValueError:
        logging.getLogger("services.ipam").exception("failed", extra={"level": "mine", "path": {1}})
    entry = json.loads(stream.getvalue())
    assert (entry["level"], entry["service"], entry["logger"], entry["message"]) == (
        "error",
        "ipam",
        "ipam",
        "failed",
    )
    assert (entry["extra_level"], entry["path"]) == ("mine", "{1}")
    assert "ValueError: broken" in entry["exception"]


def test_a_newline_in_a_field_does_not_make_a_second_record() -> None:
    stream = lines(log.LogConfig())
    logging.getLogger("a").warning("m", extra={"text": "a\nb"})
    assert stream.getvalue().count("\n") == 1


def test_records_below_the_level_are_dropped() -> None:
    stream = lines(log.LogConfig(level="warning"))
    logging.getLogger("a").info("no")
    logging.getLogger("a").warning("yes")
    assert "yes" in stream.getvalue() and "no\n" not in stream.getvalue()


def test_setting_up_twice_logs_once() -> None:
    lines(log.LogConfig())
    stream = lines(log.LogConfig())
    logging.getLogger("a").info("once")
    assert stream.getvalue().count("once") == 1


@pytest.mark.parametrize("wrong", [{"level": "loud"}, {"format": "xml"}])
def test_an_unknown_level_or_format_is_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(InvalidArgument) as caught:
        log.LogConfig(**wrong)
    assert caught.value.field in wrong
