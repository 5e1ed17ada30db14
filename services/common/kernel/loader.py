"""Compile and load BPF programs in a child process (see `load`), from a service's event loop."""

from __future__ import annotations

import asyncio
import json
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from services.common import errors

log = logging.getLogger(__name__)

ROOT: Final = Path(__file__).resolve().parents[3]
TIMEOUT_S: Final = 60.0


def bpf_root() -> Path:
    """The directory of the BPF sources: FIBRIL_BPF_SOURCE, else `bpf` beside the `services` package."""
    return Path(os.environ.get("FIBRIL_BPF_SOURCE", ROOT / "bpf"))


@dataclass(frozen=True)
class ProgramSpec:
    """One translation unit. Each costs about 0.2 s to compile, a further function only its verification."""

    source: Path
    """The C file; a relative path is below bpf_root()."""
    functions: Mapping[str, str]
    """C function -> program type (names of bpf.PROG_TYPES), with "/attach type" where the kernel wants it at
    load time, e.g. "cgroup_sock_addr/cgroup_inet4_connect"."""
    service: str
    """Owner: programs are pinned as <pin_dir>/prog/<service>/<function>."""
    maps: Mapping[str, str] = field(default_factory=dict)
    """C map -> pin path, relative to pin_dir or absolute: adopted or created.

    Others are private to the unit.
    """
    slots: Mapping[str, Mapping[int, str]] = field(default_factory=dict)
    """C program array (named in `maps`) -> {index: C function}, installed after every unit has loaded."""
    defines: Mapping[str, str | int] = field(default_factory=dict)


@dataclass(frozen=True)
class LoadedProgram:
    id: int
    tag: str
    type: str
    insns: int
    """Instructions the verifier walked through (limit: 1,000,000)."""
    jited_bytes: int


@dataclass(frozen=True)
class LoadResult:
    programs: Mapping[str, LoadedProgram]
    """By pin path."""
    maps: Mapping[str, str]
    """Pin path -> "created" or "adopted"."""
    seconds: Mapping[str, float]


def _spec_json(specs: Sequence[ProgramSpec], pin_dir: Path) -> bytes:
    root = bpf_root()
    triplet = f"{os.uname().machine}-linux-gnu"
    return json.dumps(
        {
            "pin_dir": str(pin_dir),
            "include": [str(root)],
            "cflags": [f"-I{root}", "-I/usr/include", f"-I/usr/include/{triplet}"],
            "units": [
                {
                    "source": str(root / spec.source),
                    "service": spec.service,
                    "functions": dict(spec.functions),
                    "maps": {name: str(pin_dir / path) for name, path in spec.maps.items()},
                    "slots": {array: dict(entries) for array, entries in spec.slots.items()},
                    "defines": {name: str(value) for name, value in spec.defines.items()},
                }
                for spec in specs
            ],
        }
    ).encode()


def _environment() -> dict[str, str]:
    path = os.environ.get("PYTHONPATH")
    return {
        **os.environ,
        "BCC_KERNEL_SOURCE": str(bpf_root() / "headers"),
        "LC_ALL": "C",
        "PYTHONPATH": os.pathsep.join([str(ROOT), *([path] if path else [])]),
    }


def _parse(stdout: bytes, stderr: bytes, returncode: int | None) -> LoadResult:
    try:
        answer = json.loads(stdout)
    except ValueError:
        tail = stderr.decode(errors="replace").strip().split("\n")[-10:]
        missing = any("No module named 'bcc'" in line for line in tail)
        raise errors.FailedPrecondition(
            f"the BPF loader process failed ({returncode}): " + "\n".join(tail),
            fix="install Debian's python3-bpfcc and let this Python see it" if missing else "",
        ) from None
    if answer["ok"]:
        return LoadResult(
            {path: LoadedProgram(**info) for path, info in answer["programs"].items()},
            answer["maps"],
            answer["seconds"],
        )
    message = answer["message"] + ("\n" + answer["log"] if answer["log"] else "")
    kind = {
        "PERMISSION_DENIED": errors.PermissionDenied,
        "INVALID_ARGUMENT": errors.InvalidArgument,
        "FAILED_PRECONDITION": errors.FailedPrecondition,
    }.get(answer["code"], errors.Internal)
    raise kind(message, fix=answer["fix"])


async def load(specs: Sequence[ProgramSpec], pin_dir: Path) -> LoadResult:
    """Compile, check, load and pin; all or nothing, serialised per pin_dir.

    Raises FailedPrecondition (verifier refusal, or a pinned map of another shape), PermissionDenied,
    InvalidArgument (no such map, function or file), DeadlineExceeded after 60 s; messages carry the
    verifier's last lines.
    """
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "services.common.kernel.load",
        env=_environment(),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(TIMEOUT_S):
            stdout, stderr = await process.communicate(_spec_json(specs, pin_dir))
    except TimeoutError:
        raise errors.DeadlineExceeded(f"loading BPF programs took over {TIMEOUT_S:.0f} s") from None
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    result = _parse(stdout, stderr, process.returncode)
    if stderr.strip():
        log.warning("BPF compiler: %s", stderr.decode(errors="replace").strip())
    log.info("BPF programs loaded", extra={"programs": len(result.programs), "seconds": dict(result.seconds)})
    return result
