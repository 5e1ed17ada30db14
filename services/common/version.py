"""The version of Fibril, from the installed package or, in a bare checkout, from pyproject.toml beside it."""

from __future__ import annotations

from functools import cache


@cache
def version() -> str:
    """Version as `fibril --version` prints it; "unknown" when neither package metadata nor a checkout is
    found.
    """
    from importlib import metadata
    from pathlib import Path

    try:
        return metadata.version("fibril")
    except metadata.PackageNotFoundError:
        pass
    import tomllib

    try:
        text = (Path(__file__).parents[2] / "pyproject.toml").read_text(encoding="utf-8")
    except OSError:
        return "unknown"
    return str(tomllib.loads(text)["project"]["version"])
