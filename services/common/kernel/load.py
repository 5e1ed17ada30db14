"""The loader process: `python -m services.common.kernel.load`, spec JSON on stdin, result JSON on stdout.

It exists because a process that has compiled with BCC holds over 100 MB; this one pins everything and exits.
Use it through `services.common.kernel.loader`, which builds the spec and turns failures into typed errors.

A load is all or nothing. Everything is compiled, checked and loaded first; only then maps and programs
are pinned and program arrays updated, and a failure in that part takes back what it did. Loads below one
pin directory are serialised by a lock on the directory itself, but for the compiling.

What BCC made of a source is kept (see `compiled`), so mostly nothing is compiled at all.

Maps: each map the C code declares is created. If one is already pinned under the path the spec names and
has the same shape, its descriptor takes the new one's number (dup2) before any program is loaded, so
programs refer to the pinned map whatever its type. Otherwise the new map is pinned. A map the spec does
not name is private to the programs of its file.

Exit code 0 and {"ok": true, ...}, or 1 and {"ok": false, "code", "message", "fix", "log"}.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from services.common import errors
from services.common.kernel import bpf, btf, compiled
from services.common.kernel.source import SourceError, flatten

LOG_LINES = 40
_DATA = {"hash", "array", "percpu_hash", "percpu_array", "lru_hash", "lru_percpu_hash", "lpm_trie", "ringbuf"}


class LoadError(Exception):
    """A refusal with the gRPC status name it maps to, a remedy and compiler or verifier output."""

    def __init__(self, code: str, message: str, fix: str = "", log: str = "") -> None:
        super().__init__(message)
        self.code, self.message, self.fix, self.log = code, message, fix, log


@contextlib.contextmanager
def captured_stderr() -> Iterator[list[str]]:
    """Collect what libbcc's C code writes to descriptor 2; the list gets one item at exit."""
    out: list[str] = []
    sys.stderr.flush()
    saved = os.dup(2)
    with tempfile.TemporaryFile() as file:
        os.dup2(file.fileno(), 2)
        try:
            yield out
        finally:
            os.dup2(saved, 2)
            os.close(saved)
            file.seek(0)
            out.append(file.read().decode(errors="replace"))


def _tail(log: str) -> str:
    return "\n".join(log.strip().split("\n")[-LOG_LINES:])


@dataclass(frozen=True)
class Made:
    """A unit and its maps, by name."""

    unit: compiled.Unit
    fds: dict[str, int]
    digest: str


class Loader:
    """One run. `maps` is shared by all units, so that a map two files declare is one map."""

    def __init__(self, spec: dict[str, Any]) -> None:
        self.spec = spec
        self.pin_dir = Path(spec["pin_dir"])
        self.maps: dict[str, int] = {}
        self.new_maps: dict[str, int] = {}
        self.programs: dict[str, int] = {}
        self.slots: list[tuple[str, int, int]] = []
        self._modules: list[Any] = []
        self.seconds: dict[str, float] = {}

    def run(self) -> dict[str, Any]:
        existing = next(path for path in (self.pin_dir, *self.pin_dir.parents) if path.exists())
        if not bpf.is_bpffs(existing):
            raise LoadError(
                "FAILED_PRECONDITION",
                f"{self.pin_dir} is not on a bpf file system",
                "mount -t bpf bpf /sys/fs/bpf",
            )
        self.pin_dir.mkdir(parents=True, exist_ok=True, mode=0o700)
        # What takes long comes before the lock: services of a node start together.
        units = [self._prepare(unit) for unit in self.spec["units"]]
        lock = os.open(self.pin_dir, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX)
            for unit, made in zip(self.spec["units"], units, strict=True):
                self._load_unit(unit, made)
            start = time.monotonic()
            self._commit()
            self._forget_layouts()
            self.seconds["commit"] = round(time.monotonic() - start, 4)
        finally:
            os.close(lock)
        return {
            "ok": True,
            "seconds": self.seconds,
            "programs": {path: _summary(bpf.prog_info(fd)) for path, fd in self.programs.items()},
            "maps": {path: "created" if path in self.new_maps else "adopted" for path in self.maps},
        }

    def _prepare(self, unit: dict[str, Any]) -> Made:
        """A unit with maps of its own yet: as it was kept, else compiled and kept."""
        start = time.monotonic()
        source = Path(unit["source"])
        try:
            text = flatten(source, [Path(p) for p in self.spec["include"]])
        except (SourceError, OSError) as error:
            raise LoadError("INVALID_ARGUMENT", f"cannot read BPF source {source}: {error}") from error
        flags = [*self.spec["cflags"], *(f"-D{name}={value}" for name, value in unit["defines"].items())]
        digest = compiled.digest(text, flags, Path(os.environ["BCC_KERNEL_SOURCE"]))
        kept = compiled.read(digest)
        made = self._recall(kept, digest) if kept is not None else None
        if made is None:
            made = self._compile(source, text, flags, digest)
            self.seconds[f"compile {source.name}"] = round(time.monotonic() - start, 4)
        return made

    def _recall(self, unit: compiled.Unit, digest: str) -> Made | None:
        try:
            return Made(unit, unit.create_maps(), digest)
        except (OSError, LookupError, ValueError):
            compiled.forget(digest)
            return None

    def _compile(self, source: Path, text: str, flags: list[str], digest: str) -> Made:
        from bcc import BPF

        module = None
        # BCC reports with a bare Exception; what went wrong is on stderr.
        with captured_stderr() as log, contextlib.suppress(Exception):
            module = BPF(text=text.encode(), cflags=flags)
        if module is None:
            refused = "Operation not permitted" in log[0]
            raise LoadError(
                "PERMISSION_DENIED" if refused else "INTERNAL",
                f"cannot compile {source.name} or create its maps",
                "run as root with CAP_BPF and CAP_NET_ADMIN" if refused else "",
                _tail(log[0]),
            )
        if log[0].strip():
            print(log[0], file=sys.stderr)
        unit, fds = compiled.of_module(module, text)
        compiled.write(digest, unit)
        self._modules.append(module)  # whose end would close the maps
        return Made(unit, fds, digest)

    def _load_unit(self, unit: dict[str, Any], made: Made) -> None:
        source = Path(unit["source"])
        for name, path in unit["maps"].items():
            if name not in made.fds:
                raise LoadError("INVALID_ARGUMENT", f"{source.name} declares no map {name}")
            self._adopt(name, path, made.fds[name])
        start = time.monotonic()
        fds = {
            name: self._load_function(made, source, name, kind) for name, kind in unit["functions"].items()
        }
        self.seconds[f"verify {source.name}"] = round(time.monotonic() - start, 4)
        for name, fd in fds.items():
            self.programs[str(self.pin_dir / "prog" / unit["service"] / name)] = fd
        for array, entries in unit["slots"].items():
            path = unit["maps"].get(array)
            if path is None:
                raise LoadError("INVALID_ARGUMENT", f"program array {array} of {source.name} has no pin path")
            self.slots += [(path, int(index), fds[name]) for index, name in entries.items()]

    def _adopt(self, name: str, path: str, fd: int) -> None:
        """Let descriptor `fd`, which the code is to hold, be the map pinned at `path`."""
        mine = bpf.map_info(fd)
        known = self.maps.get(path)
        if known is None:
            try:
                known = bpf.get(path)
            except FileNotFoundError:
                self.maps[path] = self.new_maps[path] = os.dup(fd)
                return
        theirs = bpf.map_info(known)
        if mine.shape() != theirs.shape():
            raise LoadError(
                "FAILED_PRECONDITION",
                f"map {name}: {path} is pinned as ({theirs.shape()}) but the program wants ({mine.shape()})",
                "the ABI version belongs into the pin path: raise it, or remove the old pin with "
                "`fibril down`",
            )
        os.dup2(known, fd)
        self.maps[path] = known

    def _load_function(self, made: Made, source: Path, name: str, kind: str) -> int:
        kind, _, attach = kind.partition("/")
        target = 0
        if kind == "tp_btf":
            # Its arguments are the tracepoint's, with the kernel's own types.
            try:
                with btf.Btf() as types:
                    target = types.typedef(f"btf_trace_{attach}")
            except errors.FailedPrecondition as error:
                raise LoadError(
                    "FAILED_PRECONDITION",
                    f"this kernel has no tracepoint {attach}, which {name} of {source.name} is for: {error}",
                ) from None
            kind, attach = "tracing", "trace_raw_tp"
        if kind not in bpf.PROG_TYPES or (attach and attach not in bpf.ATTACH_TYPES):
            raise LoadError(
                "INVALID_ARGUMENT", f"{source.name}: {name} has unknown program type {kind}/{attach}"
            )
        if name not in made.unit.functions:
            raise LoadError("INVALID_ARGUMENT", f"{source.name} has no function {name}")
        code = made.unit.code(name, made.fds)
        try:
            return bpf.prog_load(kind, code, name, bpf.ATTACH_TYPES[attach] if attach else 0, target)
        except bpf.Refused as error:
            # Should what is kept be at fault, it is not the next time.
            compiled.forget(made.digest)
            if error.errno == errno.EPERM:
                raise LoadError(
                    "PERMISSION_DENIED",
                    f"may not load BPF program {name} of {source.name}",
                    "run as root with CAP_BPF and CAP_NET_ADMIN",
                    _tail(error.log),
                ) from None
            raise LoadError(
                "FAILED_PRECONDITION",
                f"the kernel refused program {name} of {source.name}: {error.strerror}",
                "",
                _tail(error.log),
            ) from None

    def _commit(self) -> None:
        with contextlib.ExitStack() as undo:
            for path, fd in self.new_maps.items():
                Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                bpf.pin(fd, path)
                undo.callback(os.unlink, path)
            for path, fd in self.programs.items():
                Path(path).parent.mkdir(parents=True, exist_ok=True, mode=0o700)
                # A loader killed here leaves such a name behind; the next one clears it.
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(path + "~")
                bpf.pin(fd, path + "~")
                undo.callback(_unlink_if_there, path + "~")
            for path, index, fd in self.slots:
                array = self.maps[path]
                try:
                    before = bpf.slot_get(array, index)
                    bpf.slot_set(array, index, fd)
                    undo.callback(_restore_slot, array, index, before)
                except OSError as error:
                    raise LoadError(
                        "FAILED_PRECONDITION",
                        f"slot {index} of {path} refused the program: {error}",
                        "all programs of one array must have the same type and attach type; an index "
                        "must be below the array's size",
                    ) from error
            for path in self.programs:
                os.rename(path + "~", path)
            undo.pop_all()

    def _forget_layouts(self) -> None:
        """Of each family of maps keep this version and the one before, for who goes back to it; what is older would hold
        its memory for as long as the node lives."""
        for layout in {Path(path).parent for path in self.maps}:
            older = [other for other in layout.parent.iterdir() if 0 < _version(other) < _version(layout)]
            for old in sorted(older, key=_version)[:-1]:
                # What cannot be removed is no reason to forward no packets.
                with contextlib.suppress(OSError):
                    _forget(old)


def _version(layout: Path) -> int:
    """The number of a directory such as "lb/v2"; 0 of any other."""
    found = re.fullmatch(r"v([1-9][0-9]*)", layout.name)
    return int(found[1]) if found else 0


def _forget(layout: Path) -> None:
    """Remove the pins of maps that only hold data: programs of that version, should some be attached still, go on with them.
    Others, of programs or sockets, lose their content with their last pin; they are small."""
    for path in layout.iterdir():
        fd = bpf.get(str(path))
        try:
            if bpf.map_info(fd).type in _DATA:
                path.unlink()
        finally:
            os.close(fd)
    layout.rmdir()


def _unlink_if_there(path: str) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)


def _summary(info: bpf.ProgInfo) -> dict[str, Any]:
    return {
        "id": info.id,
        "tag": info.tag,
        "type": info.type,
        "insns": info.verified_insns,
        "jited_bytes": info.jited_bytes,
    }


def _restore_slot(array: int, index: int, ident: int) -> None:
    if not ident:
        bpf.slot_clear(array, index)
        return
    fd = bpf.prog_fd_by_id(ident)
    try:
        bpf.slot_set(array, index, fd)
    finally:
        os.close(fd)


def main() -> int:
    try:
        answer = Loader(json.load(sys.stdin)).run()
    except LoadError as error:
        answer = {
            "ok": False,
            "code": error.code,
            "message": error.message,
            "fix": error.fix,
            "log": error.log,
        }
    except OSError as error:
        denied = error.errno in (errno.EPERM, errno.EACCES)
        answer = {
            "ok": False,
            "code": "PERMISSION_DENIED" if denied else "FAILED_PRECONDITION",
            "message": f"BPF object store: {error}",
            "log": "",
            "fix": "run as root with CAP_BPF and CAP_NET_ADMIN" if denied else "",
        }
    print(json.dumps(answer), flush=True)
    return 0 if answer["ok"] else 1


if __name__ == "__main__":
    # Not sys.exit: tearing LLVM down takes longer than loading did.
    os._exit(main())
