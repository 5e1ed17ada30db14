"""Objects of a document, read field by field: what nobody has asked for is refused at the end, with its path."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Final, TypeVar

from services.common.errors import InvalidArgument

T = TypeVar("T")
LIST_MAX: Final = 20_000


class Fields:
    """An object at a path of a document."""

    def __init__(self, value: object, where: str, path: str) -> None:
        """where: what people call the document."""
        self.where, self.path = where, path
        if not isinstance(value, Mapping):
            raise self.refuse("", f"an object is expected, not {_kind(value)}")
        self._left: dict[Any, Any] = dict(value)

    def refuse(self, name: str, why: str, fix: str = "") -> InvalidArgument:
        """An error that names a field."""
        return InvalidArgument(f"{self.where}: {self.at(name)} {why}", field=self.at(name), fix=fix)

    def at(self, name: str) -> str:
        """Path of a field."""
        return ".".join(part for part in (self.path, name) if part) or "document"

    def __contains__(self, name: str) -> bool:
        return self._left.get(name) is not None

    def peek(self, name: str) -> object:
        """A field as it is; it is still to be taken."""
        return self._left.get(name)

    def take(self, name: str, kind: type[T], default: T) -> T:
        """A field's value; null is the default."""
        value = self._left.pop(name, None)
        if value is None:
            return default
        if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
            raise self.refuse(name, f"is {_kind(value)}, not {_KINDS[kind]}")
        return value

    def child(self, name: str) -> Fields | None:
        """An object in it; None if it is not there."""
        value = self._left.pop(name, None)
        return None if value is None else Fields(value, self.where, self.at(name))

    def children(self, name: str) -> Iterator[Fields]:
        """Objects of a list."""
        for number, value in enumerate(self.items(name)):
            yield Fields(value, self.where, f"{self.at(name)}[{number}]")

    def items(self, name: str) -> list[Any]:
        """A list; none if it is not there."""
        found = self.take(name, list, [])
        if len(found) > LIST_MAX:
            raise self.refuse(name, f"has {len(found)} items", f"give at most {LIST_MAX}")
        return found

    def texts(self, name: str) -> list[str]:
        """A list of strings."""
        found = self.items(name)
        for number, value in enumerate(found):
            if not isinstance(value, str):
                raise self.refuse(f"{name}[{number}]", f"is {_kind(value)}, not text")
        return found

    def pairs(self) -> list[tuple[str, str]]:
        """All of it, as names and texts."""
        found = []
        for name, value in self._left.items():
            # What looks like a number or a truth to YAML was meant as text.
            for each in (name, value):
                if not isinstance(each, str):
                    raise self.refuse(str(name)[:60], f"has {_kind(each)} where text is due", "put it into quotes")
            found.append((name, value))
        self._left = {}
        return found

    def ignore(self, *names: str) -> None:
        """What says nothing about policy."""
        for name in names:
            self._left.pop(name, None)

    def unsupported(self, *names: str) -> None:
        """What would matter, and is not there yet."""
        for name in names:
            if self._left.get(name) is not None:
                raise self.refuse(name, "is not supported yet", "leave it out; nothing was changed")

    def done(self) -> None:
        """All else is refused."""
        for name in self._left:
            raise self.refuse(str(name)[:60], "is not known here", "look for a typing error")


_KINDS: Final[Mapping[Any, str]] = {str: "text", int: "a number", bool: "true or false", list: "a list", dict: "an object"}


def _kind(value: object) -> str:
    return "null" if value is None else _KINDS.get(type(value), type(value).__name__)
