"""Kernel parameters this node changed and what they were before, kept in the state directory for `teardown`.

Recorded before it is changed, so a process killed in between at worst restores what never differed. A
record of an earlier boot is worth nothing: the kernel has forgotten those changes.
"""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Final

from services.common import errors
from services.common.instance import Instance
from services.common.kernel import sysctl

log = logging.getLogger(__name__)

_BOOT_ID: Final = Path("/proc/sys/kernel/random/boot_id")


class Sysctls:
    """Parameters below net/ are of the calling thread's namespace: netlink thread."""

    def __init__(self, instance: Instance) -> None:
        self._file = instance.state_dir / "sysctl.json"

    def ensure(self, name: str, value: int) -> None:
        """Set a parameter, remembering the former value of the first time. Errors as sysctl.ensure."""
        before = sysctl.read(name)
        if before is None or before == str(value):
            return
        remembered = self._load()
        if name not in remembered:
            self._save({**remembered, name: before})
        sysctl.ensure(name, value)

    def restore(self) -> list[str]:
        """Put everything back; names of what was. A parameter that went (with its interface) is passed
        over.
        """
        restored = []
        for name, value in self._load().items():
            try:
                if sysctl.ensure(name, value) is not None:
                    restored.append(name)
            except errors.NotFound:
                continue
            except errors.FibrilError as error:
                log.warning(
                    "a kernel parameter stays changed", extra={"parameter": name, "cause": str(error)}
                )
        self._file.unlink(missing_ok=True)
        return restored

    def _load(self) -> dict[str, str]:
        try:
            content = json.loads(self._file.read_text())
            if content["boot"] == _BOOT_ID.read_text().strip():
                return {str(name): str(value) for name, value in content["before"].items()}
        except FileNotFoundError:
            pass
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            log.warning(
                "unreadable record of kernel parameters", extra={"file": self._file, "cause": repr(error)}
            )
        return {}

    def _save(self, before: dict[str, str]) -> None:
        self._file.parent.mkdir(parents=True, exist_ok=True)
        temporary = self._file.with_name(f".{self._file.name}")
        temporary.write_text(json.dumps({"boot": _BOOT_ID.read_text().strip(), "before": before}))
        os.rename(temporary, self._file)
