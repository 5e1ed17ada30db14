"""Remembers where an instance's CNI plugin was installed, so that it is found again without being told."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from services.common.instance import Instance

Place = tuple[Path, Path]  # plugins, configurations


def _file(instance: Instance) -> Path:
    return instance.state_dir / "cni.json"


def known(instance: Instance) -> list[Place]:
    """Where it was installed, the default directories included."""
    from services.ipam.cni import install

    places = [(bins, install.CONF_DIR) for bins in install.BIN_DIRS]
    return places + [p for p in _read(instance) if p not in places]


def remember(instance: Instance, bin_dir: Path, conf_dir: Path) -> None:
    """Note a place; one that is noted already is fine."""
    place = (bin_dir.absolute(), conf_dir.absolute())
    places = _read(instance)
    if place not in places:
        _write(instance, [*places, place])


def forget(instance: Instance, gone: Sequence[Place]) -> None:
    """Strike places out."""
    struck = {(bins.absolute(), confs.absolute()) for bins, confs in gone}
    _write(instance, [p for p in _read(instance) if p not in struck])


def _read(instance: Instance) -> list[Place]:
    try:
        return [(Path(bins), Path(confs)) for bins, confs in json.loads(_file(instance).read_text())]
    except (FileNotFoundError, ValueError):
        return []


def _write(instance: Instance, places: Sequence[Place]) -> None:
    from services.ctl.supervisor import write_atomically

    if not places:
        _file(instance).unlink(missing_ok=True)
        return
    write_atomically(_file(instance), json.dumps([[str(b), str(c)] for b, c in places]))
