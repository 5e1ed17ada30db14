"""The ipam service's part of the data path."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import progs
from services.common.pipeline import abi, datapath, install


class Datapath(datapath.Datapath):
    """Addresses are given out without it; pods need it."""

    def __init__(
        self,
        instance: Instance,
        use: Callable[[], Awaitable[None]],
        lost: Callable[[errors.FibrilError], None],
    ) -> None:
        super().__init__(instance, datapath.Parts(install.SERVICE, install.install, complete), use, lost)


def complete(instance: Instance) -> bool:
    """Whether all programs and maps are pinned and the slots filled."""
    paths = [install.program_path(instance, name) for name in install.PROGRAMS]
    paths += [install.map_path(instance, name) for name in install.spec().maps]
    if not all(path.exists() for path in paths):
        return False
    return set(map(int, install.SLOTS)) <= set(progs.slots(install.map_path(instance, abi.SLOTS_MAP)))
