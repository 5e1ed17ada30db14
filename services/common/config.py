"""Configuration as one frozen dataclass with a default for everything, filled from a YAML file, then the
environment, then flags; later wins.

    @dataclass(frozen=True)
    class Pools:
        block: int = field(default=24, metadata={"help": "prefix length of a node's block"})
        def __post_init__(self) -> None: ...   # bounds; raises InvalidArgument(field="block")

A key is written `pools: {block: 25}` in the file, FIBRIL_POOLS_BLOCK=25 in the environment and pools.block as
a flag. Fields may be bool, int, float, str, Path, Literal, enums, optionals of these, tuples, mappings with
text keys, and dataclasses of them all. An unknown key is an error that names the nearest known one.
"""

from __future__ import annotations

import dataclasses
import difflib
import enum
import os
import types
import typing
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar, Union

from services.common.errors import InvalidArgument, NotFound

T = TypeVar("T")
_TRUE = frozenset({"1", "true", "yes", "on"})
_FALSE = frozenset({"0", "false", "no", "off"})
_ABSENT = frozenset({"", "null", "none"})


def load(
    cls: type[T],
    *,
    file: Path | None = None,
    env_prefix: str = "FIBRIL",
    overrides: Mapping[str, str] | None = None,
    env: Mapping[str, str] | None = None,
    others: Collection[str] = (),
) -> T:
    """Fill `cls`. `overrides` maps dotted paths to text; `env` is the process's environment when None. `others`:
    sections of file and overrides that are somebody else's to read and to check.

    Raises NotFound for a missing file, InvalidArgument (field = dotted path) for an unknown key, a wrong type
    or whatever a __post_init__ refuses.
    """
    tree: dict[str, Any] = {}
    if file is not None:
        content = {key: value for key, value in _read(file).items() if key not in others}
        tree = _check_keys(cls, content, "", str(file), others)
    for path, text in _from_env(cls, env_prefix, os.environ if env is None else env):
        _put(tree, path, _Text(text))
    for path, text in (overrides or {}).items():
        if path.partition(".")[0] not in others:
            _find(cls, path, "flag", others)
            _put(tree, path, _Text(text))
    return typing.cast(T, _build(cls, tree, ""))


class _Text(str):
    """A value that comes as text whatever its type: from the environment or a flag."""


def sample(*classes: type[Any], indent: str = "") -> str:
    """Every option as YAML with its help as comment, all commented out at their defaults; what several classes
    share is shown once.
    """
    lines: list[str] = []
    fields = {name: found for cls in classes for name, found in _fields(cls).items()}
    for spec, kind in fields.values():
        if dataclasses.is_dataclass(kind):
            lines += [
                f"{indent}{spec.name}:",
                sample(typing.cast("type[Any]", kind), indent=indent + "  ").rstrip("\n"),
            ]
            continue
        if text := spec.metadata.get("help"):
            lines.append(f"{indent}# {text}")
        lines.append(f"{indent}# {spec.name}: {_yaml(_default(spec))}")
    return "\n".join(lines) + "\n"


def _yaml(value: Any) -> str:
    import json

    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = dataclasses.asdict(value)
    if isinstance(value, enum.Enum):
        value = value.value
    if isinstance(value, tuple):
        return "[" + ", ".join(_yaml(item) for item in value) + "]"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_yaml(item)}" for key, item in value.items()) + "}"
    return json.dumps(str(value) if isinstance(value, Path) else value)


def _default(spec: dataclasses.Field[Any]) -> Any:
    if spec.default_factory is not dataclasses.MISSING:
        return spec.default_factory()
    return None if spec.default is dataclasses.MISSING else spec.default


def _read(file: Path) -> Mapping[str, Any]:
    import yaml

    try:
        content = yaml.safe_load(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise NotFound(f"configuration file {file} does not exist", fix="create it or leave it out") from None
    except OSError as error:
        raise InvalidArgument(f"configuration file {file} cannot be read: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InvalidArgument(f"configuration file {file} is not YAML: {error}") from error
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise InvalidArgument(
            f"configuration file {file} must hold a mapping, not a {type(content).__name__}"
        )
    return content


def _fields(cls: Any) -> dict[str, tuple[dataclasses.Field[Any], Any]]:
    """Field and resolved type by name."""
    hints = typing.get_type_hints(cls)
    return {spec.name: (spec, hints[spec.name]) for spec in dataclasses.fields(cls) if spec.init}


def _paths(cls: Any, prefix: str = "") -> Iterator[str]:
    """Dotted paths of all leaves."""
    for name, (_, kind) in _fields(cls).items():
        if dataclasses.is_dataclass(kind):
            yield from _paths(kind, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _unknown(key: str, known: list[str], where: str) -> InvalidArgument:
    # Compared by the whole path and by its last part: `pools.blok`, and `blok` whose section was forgotten.
    near = difflib.get_close_matches(key, known, 1, 0.6)
    if not near:
        last = {name.rpartition(".")[2]: name for name in known}
        near = [last[hit] for hit in difflib.get_close_matches(key.rpartition(".")[2], last, 1, 0.6)]
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(sorted(known))}"
    return InvalidArgument(f"unknown key {key} in {where}", field=key, fix=hint)


def _check_keys(
    cls: Any, tree: Mapping[Any, Any], prefix: str, where: str, others: Collection[str] = ()
) -> dict[str, Any]:
    """A copy of `tree` with every key known. Values are checked when they are converted."""
    fields = _fields(cls)
    result: dict[str, Any] = {}
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if key not in fields:
            known = [f"{prefix}{name}" for name in fields] if prefix else [*fields, *others, *_paths(cls)]
            raise _unknown(path, known, where)
        kind = fields[key][1]
        if dataclasses.is_dataclass(kind):
            if value is None:
                continue
            if not isinstance(value, Mapping):
                raise InvalidArgument(f"{path} is a section, not a {_kind_of(value)}", field=path)
            value = _check_keys(kind, value, f"{path}.", where)
        result[key] = value
    return result


def _from_env(cls: Any, prefix: str, env: Mapping[str, str]) -> Iterator[tuple[str, str]]:
    """Path and text of every variable that names an option. One that names a section but no option of it is
    refused; others with the same prefix belong to somebody else (FIBRIL_RUN_ROOT).
    """
    known = {f"{prefix}_{path.replace('.', '_').upper()}": path for path in _paths(cls)}
    sections = tuple(
        f"{prefix}_{name.upper()}_"
        for name, (_, kind) in _fields(cls).items()
        if dataclasses.is_dataclass(kind)
    )
    for key, text in env.items():
        if key in known:
            yield known[key], text
        elif sections and key.startswith(sections):
            raise _unknown(key, list(known), "the environment")


def _find(cls: Any, path: str, where: str, others: Collection[str]) -> None:
    known = list(_paths(cls))
    if path not in known:
        raise _unknown(path, [*known, *others], where)


def _put(tree: dict[str, Any], path: str, value: Any) -> None:
    *sections, leaf = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[leaf] = value


def _build(cls: Any, tree: Mapping[str, Any], prefix: str) -> Any:
    values: dict[str, Any] = {}
    for name, (spec, kind) in _fields(cls).items():
        path = f"{prefix}{name}"
        if dataclasses.is_dataclass(kind):
            # Always built, so that a section's own bounds hold for its defaults too.
            section = tree.get(name)
            if section is not None or (
                spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING
            ):
                values[name] = _build_section(kind, section or {}, path)
        elif name in tree:
            values[name] = _convert(kind, tree[name], path)
        elif spec.default is dataclasses.MISSING and spec.default_factory is dataclasses.MISSING:
            raise InvalidArgument(f"{path} must be given", field=path)
    try:
        return cls(**values)
    except InvalidArgument as error:
        raise type(error)(error.message, field=f"{prefix}{error.field}".rstrip("."), fix=error.fix) from error


def _build_section(kind: Any, value: Any, path: str) -> Any:
    if not isinstance(value, Mapping):
        raise InvalidArgument(f"{path} must be a mapping, not a {_kind_of(value)}", field=path)
    return _build(kind, _check_keys(kind, value, f"{path}.", "the configuration"), f"{path}.")


def _convert(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = typing.get_origin(kind), typing.get_args(kind)
    if origin in (Union, types.UnionType):
        rest = [argument for argument in arguments if argument is not type(None)]
        if value is None or (isinstance(value, _Text) and value.lower() in _ABSENT):
            return None
        return _convert(rest[0], value, path)
    if origin is Literal:
        if value not in arguments:
            raise _wrong(path, value, "one of " + ", ".join(map(str, arguments)))
        return str(value) if isinstance(value, _Text) else value
    if origin is tuple:
        items: Any = value
        if isinstance(value, _Text):
            items = [_Text(part.strip()) for part in value.split(",") if part.strip()]
        if not isinstance(items, list):
            raise _wrong(path, value, "a list")
        return tuple(_convert(arguments[0], item, f"{path}[{index}]") for index, item in enumerate(items))
    if origin in (dict, Mapping):
        return _convert_mapping(arguments[1], value, path)
    if dataclasses.is_dataclass(kind):
        if isinstance(value, _Text):
            raise InvalidArgument(
                f"{path} cannot be given as text", field=path, fix="use the configuration file"
            )
        return _build_section(kind, value, path)
    return _convert_scalar(kind, value, path)


def _convert_mapping(kind: Any, value: Any, path: str) -> dict[str, Any]:
    items: Any = value
    if isinstance(value, _Text):
        pairs = [part.partition("=") for part in value.split(",") if part.strip()]
        if any(not middle for _, middle, _ in pairs):
            raise _wrong(path, value, "key=value,key=value")
        items = {key.strip(): _Text(item.strip()) for key, _, item in pairs}
    if not isinstance(items, Mapping) or any(not isinstance(key, str) for key in items):
        raise _wrong(path, value, "a mapping with text keys")
    return {key: _convert(kind, item, f"{path}.{key}") for key, item in items.items()}


def _convert_scalar(kind: Any, value: Any, path: str) -> Any:
    text = value if isinstance(value, _Text) else None
    if kind is bool:
        if text is not None and text.lower() in _TRUE | _FALSE:
            return text.lower() in _TRUE
        if isinstance(value, bool):
            return value
        raise _wrong(path, value, "true or false")
    if kind in (int, float):
        if text is not None:
            try:
                return int(text, 0) if kind is int else float(text)
            except ValueError:
                raise _wrong(path, value, "a whole number" if kind is int else "a number") from None
        # YAML's true is an int to Python, and 3 is a good float.
        if isinstance(value, bool) or not isinstance(value, int if kind is int else int | float):
            raise _wrong(path, value, "a whole number" if kind is int else "a number")
        return kind(value)
    if isinstance(kind, type) and issubclass(kind, enum.Enum):
        for member in kind:
            if value in (member.value, member.name) or str(value) == str(member.value):
                return member
        raise _wrong(path, value, "one of " + ", ".join(str(member.value) for member in kind))
    if kind in (str, Path):
        if not isinstance(value, str):
            raise _wrong(path, value, "text", fix="put it in quotes")
        return kind(str(value))
    raise TypeError(f"{path}: configuration fields cannot be {kind}")


def _wrong(path: str, value: Any, wanted: str, fix: str = "") -> InvalidArgument:
    return InvalidArgument(f"{path} must be {wanted}, not {value!r}", field=path, fix=fix)


def _kind_of(value: Any) -> str:
    return {"str": "text", "list": "list", "int": "number", "float": "number", "bool": "truth value"}.get(
        type(value).__name__, type(value).__name__
    )
