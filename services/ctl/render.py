"""Turns protobuf messages (or plain dicts) into a table, JSON or YAML: the one place that does.

JSON and YAML show every field under its name in the contract, enums by their contract's name, 64-bit
numbers as numbers. Tables show chosen columns, enums shortened ("ENDPOINT_STATE_READY" -> "ready").
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final, TextIO

Record = Mapping[str, Any]
# How contracts end the name of a field that is a point in time.
_WHEN: Final = "_unix_seconds"


@dataclass(frozen=True)
class Column:
    """One column of a table: its heading, and a field (dotted path) or a function of the record."""

    head: str
    field: str | Callable[[Record], object]

    def text(self, record: Record) -> str:
        """The cell; "-" when there is nothing to show."""
        if callable(self.field):
            return cell(self.field(record))
        value: Any = record
        for part in self.field.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
        return cell(value)


def columns(*specs: str | tuple[str, str | Callable[[Record], object]]) -> list[Column]:
    """Columns from field names ("pool" is headed POOL) or (heading, field or function)."""
    return [
        Column(s.rpartition(".")[2].upper().replace("_", " "), s) if isinstance(s, str) else Column(*s)
        for s in specs
    ]


def cell(value: object) -> str:
    """A value as text of a table cell."""
    if value is None or value == "" or value == [] or value == {}:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ",".join(f"{k}={v}" for k, v in sorted(value.items()))
    if isinstance(value, (list, tuple)):
        return ",".join(cell(v) for v in value)
    if isinstance(value, float):
        return f"{value:g}"
    return str(value)


def short(name: object, prefix: str) -> str:
    """An enum's name for people: short("HEALTH_OK", "HEALTH_") is "ok"."""
    return str(name).removeprefix(prefix).lower().replace("_", "-")


def age(unix_seconds: object, now: float | None = None) -> str:
    """How long ago that was, in one unit: "12s", "5m", "3h", "9d"; "" for 0."""
    if not isinstance(unix_seconds, (int, float)) or unix_seconds <= 0:
        return ""
    seconds = max(0.0, (time.time() if now is None else now) - unix_seconds)
    for unit, size in (("d", 86400), ("h", 3600), ("m", 60)):
        if seconds >= 2 * size:
            return f"{int(seconds // size)}{unit}"
    return f"{int(seconds)}s"


def clock(unix_seconds: float) -> str:
    """A point in time here; "-" for 0."""
    return f"{datetime.fromtimestamp(unix_seconds):%Y-%m-%d %H:%M:%S}" if unix_seconds > 0 else "-"


def to_record(message: Any) -> dict[str, Any]:
    """A protobuf message as a dict with every field (unset sub-messages and oneof members left out)."""
    record: dict[str, Any] = {}
    for field in message.DESCRIPTOR.fields:
        value = getattr(message, field.name)
        if field.is_repeated:
            if field.message_type is not None and field.message_type.GetOptions().map_entry:
                record[field.name] = dict(value)
            else:
                record[field.name] = [_plain(field, item) for item in value]
        elif field.has_presence and not message.HasField(field.name):
            continue
        else:
            record[field.name] = _plain(field, value)
    return record


def _plain(field: Any, value: Any) -> Any:
    if field.enum_type is not None:
        known = field.enum_type.values_by_number.get(value)
        return known.name if known is not None else value
    if field.message_type is not None:
        return to_record(value)
    if isinstance(value, bytes):
        return value.hex()
    return value


def table(records: Sequence[Record], cols: Sequence[Column]) -> str:
    """A table with headings, columns as wide as they need; numbers to the right."""
    rows = [[c.text(r) for c in cols] for r in records]
    widths = [max([len(c.head), *(len(row[i]) for row in rows)]) for i, c in enumerate(cols)]
    right = [_numeric([row[i] for row in rows]) for i in range(len(cols))]

    def line(cells: Sequence[str]) -> str:
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right, strict=True))
        return "  ".join(padded).rstrip()

    return "\n".join([line([c.head for c in cols]), *map(line, rows)])


def _numeric(cells: Sequence[str]) -> bool:
    """Whether a column holds numbers, and nothing else but gaps."""
    filled = [text for text in cells if text != "-"]
    return bool(filled) and all(text.replace(".", "", 1).isdigit() for text in filled)


def dump_yaml(value: Any) -> str:
    """YAML in the order of the fields."""
    import yaml

    text: str = yaml.safe_dump(value, sort_keys=False, default_flow_style=False, allow_unicode=True)
    return text


def render(records: Sequence[Record] | Record, output: str, cols: Sequence[Column], empty: str = "") -> str:
    """A whole answer as text. One record alone makes one object in JSON and YAML, a sequence makes a list.

    `empty` is what a table of nothing says."""
    if output == "json":
        return json.dumps(records if isinstance(records, Mapping) else list(records), indent=2)
    if output == "yaml":
        return dump_yaml(dict(records) if isinstance(records, Mapping) else list(records)).rstrip()
    many = [records] if isinstance(records, Mapping) else records
    return table(many, cols) if many or not empty else empty


def details(record: Record, output: str) -> str:
    """One record for reading: a `field: value` line each, or JSON, or YAML."""
    if output != "table":
        return render(record, output, [])
    lines = [_detail(name, value) for name, value in record.items()]
    width = max((len(name) for name, _ in lines), default=0)
    return "\n".join(f"{name.ljust(width)}  {text}" for name, text in lines)


def _detail(name: str, value: object) -> tuple[str, str]:
    words = name.replace("_", " ")
    if name.endswith(_WHEN) and isinstance(value, (int, float)):
        return words.removesuffix(" unix seconds"), clock(value)
    return words, cell(value)


class Stream:
    """Prints records as they come: aligned lines with headings once, JSON lines, or YAML documents."""

    def __init__(self, out: TextIO, output: str, cols: Sequence[Column], widths: Iterable[int] = ()) -> None:
        self._out = out
        self._output = output
        self._cols = cols
        self._widths = list(widths) or [max(12, len(c.head)) for c in cols]
        self._headed = False

    def put(self, record: Record) -> None:
        """Print one record and flush, so that a pipe's reader sees it at once."""
        if self._output == "json":
            self._line(json.dumps(record))
        elif self._output == "yaml":
            self._line("---\n" + dump_yaml(dict(record)).rstrip())
        else:
            if not self._headed:
                self._headed = True
                self._cells([c.head for c in self._cols])
            self._cells([c.text(record) for c in self._cols])

    def _cells(self, cells: Sequence[str]) -> None:
        # A column that once needed more room keeps it, so that later lines stay aligned.
        self._widths = [max(w, len(c)) for w, c in zip(self._widths, cells, strict=True)]
        self._line("  ".join(c.ljust(w) for c, w in zip(cells, self._widths, strict=True)).rstrip())

    def _line(self, text: str) -> None:
        self._out.write(text + "\n")
        self._out.flush()
