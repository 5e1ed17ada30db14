"""`fibril bpf`: what is in the kernel, read from the kernel: works with every service dead."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import click

from services.ctl.context import Ctl, pass_ctl
from services.ctl.render import columns, render

PROGRAMS = columns(
    "name",
    "type",
    "id",
    "pinned",
    "bytes",
    ("RUNS", lambda r: r["runs"] or ""),
    ("NS/RUN", lambda r: f"{r['nanoseconds'] / r['runs']:.0f}" if r["runs"] else ""),
)
MAPS = columns(
    "name",
    "type",
    "id",
    "pinned",
    ("USED", lambda r: "" if r["used"] is None else r["used"]),
    "max",
    ("FULL", lambda r: f"{100 * r['used'] / r['max']:.1f}%" if r["used"] is not None else ""),
)
ATTACHED = columns("interface", "hook", "program", "id")


@click.command(short_help="What is loaded, attached, how full.")
@click.option(
    "--runs",
    "seconds",
    type=click.FloatRange(min=0.1),
    metavar="SECONDS",
    help="Count runs and their time for so long first (costs about 20 ns a run meanwhile).",
)
@pass_ctl
def command(ctl: Ctl, seconds: float | None) -> None:
    """Show programs and maps of the node, where they are pinned and attached, and how full they are."""
    import time

    from services.common.kernel import progs

    if seconds is not None:
        with progs.statistics():
            time.sleep(seconds)
    instance = ctl.instance
    pinned = list(_pinned(instance.pin_dir))
    found: dict[str, list[dict[str, Any]]] = {
        "programs": [p for p in pinned if "runs" in p],
        "maps": [m for m in pinned if "max" in m],
        "attached": list(_attached(f"fb{instance.tag}")),
    }
    if ctl.output != "table":
        click.echo(render(found, ctl.output, []))
    elif not pinned:
        click.echo(f"nothing is pinned below {instance.pin_dir}")
    else:
        for part, cols in (("programs", PROGRAMS), ("maps", MAPS), ("attached", ATTACHED)):
            click.echo(f"{part}:\n{render(found[part], 'table', cols, '(none)')}\n")


def _pinned(root: Any) -> Iterator[dict[str, Any]]:
    """Every pinned program and map below a directory."""
    import os

    from services.common.kernel import bpf, progs

    for path in sorted(p for p in root.rglob("*") if p.is_file()):
        where = str(path.relative_to(root))
        fd = progs.open_prog(path)
        try:
            kind = os.readlink(f"/proc/self/fd/{fd}")
            if kind.endswith("bpf-map"):
                yield _map(fd, where)
            elif kind.endswith("bpf-prog"):
                info = bpf.prog_info(fd)
                yield {
                    "name": info.name,
                    "type": info.type,
                    "id": info.id,
                    "pinned": where,
                    "bytes": info.jited_bytes,
                    "runs": info.run_cnt,
                    "nanoseconds": info.run_time_ns,
                }
        finally:
            os.close(fd)


def _map(fd: int, where: str) -> dict[str, Any]:
    """One map; `used` is None where counting makes no sense (arrays are always full, ring buffers never)."""
    import ctypes
    import os

    from services.common.errors import FibrilError
    from services.common.kernel import bpf
    from services.common.kernel.maps import BpfMap

    info = bpf.map_info(fd)
    used = None
    if "hash" in info.type or info.type in ("lpm_trie", "prog_array"):
        key, value = ctypes.c_ubyte * info.key_size, ctypes.c_ubyte * info.value_size
        with BpfMap(os.dup(fd), key, value, where) as opened:
            try:
                used = opened.count()
            except FibrilError:
                used = None  # a type whose elements cannot be read from user space
    return {
        "name": info.name,
        "type": info.type,
        "id": info.id,
        "pinned": where,
        "used": used,
        "max": info.max_entries,
    }


def _attached(prefix: str) -> Iterator[dict[str, Any]]:
    """Every program on a hook of the node's interfaces, other people's included."""
    from services.common.errors import NotFound
    from services.common.kernel import attach
    from services.common.kernel.netlink import Rtnl

    directions: tuple[attach.Direction, ...] = ("ingress", "egress")
    with Rtnl() as rtnl:
        links = rtnl.links(prefix)
    for link in links:
        for direction in directions:
            try:
                entries = attach.attached(link.ifindex, direction)
            except (NotFound, OSError):
                continue  # the interface went meanwhile
            for entry in entries:
                yield {"interface": link.name, "hook": direction, "program": entry.name, "id": entry.prog_id}
