"""YAML and JSON that people give, read strictly and within bounds, whatever it holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, Final

import yaml

from services.common.errors import InvalidArgument

DEPTH_MAX: Final = 64
NUMBER_MAX: Final = 40
_Base: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


class _Loader(_Base):  # type: ignore[misc]
    """Safe, and strict: no key twice, of which YAML itself would take the last without a word."""

    def construct_mapping(self, node: Any, deep: bool = False) -> Any:
        seen: set[Any] = set()
        for name, _ in node.value:
            key = self.construct_object(name, deep=True)
            if not isinstance(key, str | int | float | bool | None):
                raise yaml.YAMLError(f"line {name.start_mark.line + 1}: a key must be text")
            if key in seen:
                raise yaml.YAMLError(f"line {name.start_mark.line + 1}: {str(key)[:60]!r} is given twice")
            seen.add(key)
        return super().construct_mapping(node, deep)


def _number(make: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """No number is that long; YAML's sixties (1:30:00) take the square of their length to work out."""

    def made(loader: Any, node: Any) -> Any:
        if len(loader.construct_scalar(node)) > NUMBER_MAX:
            raise yaml.YAMLError(
                f"line {node.start_mark.line + 1}: a number of more than {NUMBER_MAX} characters"
            )
        return make(loader, node)

    return made


_Loader.add_constructor("tag:yaml.org,2002:int", _number(_Base.construct_yaml_int))
_Loader.add_constructor("tag:yaml.org,2002:float", _number(_Base.construct_yaml_float))


def read(text: str, field: str, values_max: int) -> list[Any]:
    """The documents, empty ones left out. InvalidArgument with `field`: no YAML or JSON, or more than so many values."""
    try:
        _check(text, values_max)
        documents = [doc for doc in yaml.load_all(text, Loader=_Loader) if doc is not None]
        # All of its text is Unicode.
        json.dumps(documents, ensure_ascii=False, default=str).encode()
    except (
        yaml.YAMLError,
        ArithmeticError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        # Values that do not fit a tag of their own (!!bool maybe) make the library stumble in all these ways.
        raise InvalidArgument(f"not YAML: {' '.join(str(error).split())[:300]}", field=field) from None
    return documents


def _check(text: str, values_max: int) -> None:
    """Before anything is made of it: nesting is what a parser in C runs out of stack by, and of aliases a few lines could make
    millions of values.
    """
    depth = 0
    for count, event in enumerate(yaml.parse(text, Loader=_Loader)):
        if count > values_max:
            raise yaml.YAMLError(f"more than {values_max} values")
        if isinstance(event, yaml.AliasEvent):
            line = event.start_mark.line + 1 if event.start_mark is not None else 0
            raise yaml.YAMLError(f"line {line}: aliases are not taken: write out what they stand for")
        if isinstance(event, yaml.CollectionStartEvent):
            depth += 1
            if depth > DEPTH_MAX:
                raise yaml.YAMLError(f"nested deeper than {DEPTH_MAX}")
        elif isinstance(event, yaml.CollectionEndEvent):
            depth -= 1
