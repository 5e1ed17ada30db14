"""Structured logging on the standard library: one line a record on standard error, as text or as JSON.

Pass fields with `extra`: `log.info("endpoint created", extra={"endpoint": 7})` gives
`2026-01-02T03:04:05.678Z INFO  ipam.endpoints: endpoint created endpoint=7`. When a trace is active its ids
are added, so a log line leads to its span.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from dataclasses import dataclass, field
from typing import TextIO

from services.common.errors import InvalidArgument

LEVELS = ("debug", "info", "warning", "error")
FORMATS = ("text", "json")
# Attributes every LogRecord has; whatever else a record carries came from `extra`.
_STANDARD = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_PLAIN = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789_-.:/@%+,[]")


@dataclass(frozen=True)
class LogConfig:
    """How a process logs."""

    level: str = field(
        default="info", metadata={"help": "least severe level that is logged: debug, info, warning, error"}
    )
    format: str = field(default="text", metadata={"help": "text or json"})

    def __post_init__(self) -> None:
        if self.level not in LEVELS:
            raise InvalidArgument(
                f"log level {self.level!r} is unknown", field="level", fix=f"use one of {', '.join(LEVELS)}"
            )
        if self.format not in FORMATS:
            raise InvalidArgument(
                f"log format {self.format!r} is unknown", field="format", fix="use text or json"
            )


def setup(service: str, cfg: LogConfig | None = None, stream: TextIO | None = None) -> None:
    """Send every record of this process to `stream` (standard error when None). Calling it again replaces the
    set-up.
    """
    cfg = cfg or LogConfig()
    handler = logging.StreamHandler(stream or sys.stderr)
    handler.setFormatter(_Json(service) if cfg.format == "json" else _Text())
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(cfg.level.upper())
    # Chatty libraries: their debug output drowns ours and their info says nothing a user of Fibril can act
    # on.
    for name in ("asyncio", "grpc", "grpc._cython.cygrpc", "pyroute2", "opentelemetry"):
        logging.getLogger(name).setLevel(max(logging.WARNING, root.level))


def extras(record: logging.LogRecord) -> dict[str, object]:
    """The fields given with `extra`, then the ids of the active trace if there is one."""
    found = {key: value for key, value in vars(record).items() if key not in _STANDARD}
    trace = sys.modules.get("services.common.telemetry")
    if trace is not None:
        found.update(trace.trace_ids())
    return found


def _timestamp(record: logging.LogRecord) -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"


def _logger(record: logging.LogRecord) -> str:
    return record.name.removeprefix("services.")


def _quote(value: object) -> str:
    text = str(value)
    return text if text and _PLAIN.issuperset(text) else json.dumps(text, ensure_ascii=False)


class _Text(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        parts = [f"{_timestamp(record)} {record.levelname:<7} {_logger(record)}: {record.getMessage()}"]
        parts += [f"{key}={_quote(value)}" for key, value in extras(record).items()]
        line = " ".join(parts)
        if record.exc_info:
            line += "\n" + self.formatException(record.exc_info)
        if record.stack_info:
            line += "\n" + record.stack_info
        return line


class _Json(logging.Formatter):
    def __init__(self, service: str) -> None:
        super().__init__()
        self._service = service

    def format(self, record: logging.LogRecord) -> str:
        entry: dict[str, object] = {
            "time": _timestamp(record),
            "level": record.levelname.lower(),
            "service": self._service,
            "logger": _logger(record),
            "message": record.getMessage(),
        }
        # A field named like one of ours must not replace it.
        entry.update(
            {key if key not in entry else f"extra_{key}": value for key, value in extras(record).items()}
        )
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        if record.stack_info:
            entry["stack"] = record.stack_info
        return json.dumps(entry, ensure_ascii=False, default=str)
