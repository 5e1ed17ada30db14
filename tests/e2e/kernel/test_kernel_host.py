"""nftables, cgroups, and what is said on a host that lacks something."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from pathlib import Path

import pytest

from services.common import errors
from services.common.kernel import cgroup, features, nft
from services.common.kernel.netlink import Netlink
from services.common.kernel.netns import NetNs


async def test_a_table_is_replaced_in_one_transaction(netlink: Netlink, pod: Path) -> None:
    def work() -> None:
        with NetNs.open(pod) as ns, ns.entered():
            for address in ("192.0.2.1", "192.0.2.2"):
                nft.apply(
                    "table inet test {}\ndelete table inet test\n"
                    f"table inet test {{ set s {{ type ipv4_addr; elements = {{ {address} }}; }}; }}"
                )
            text = nft.table("test")
            assert text is not None
            assert "192.0.2.2" in text
            assert "192.0.2.1" not in text
            with pytest.raises(errors.FailedPrecondition, match="No such file"):
                nft.apply("table inet test { set t { type ipv4_addr; }; }\nadd rule inet test nochain accept")
            assert "set t" not in (nft.table("test") or "")
            assert nft.delete_table("test") is True
            assert nft.delete_table("test") is False

    await netlink.run(work)


async def test_a_group_with_processes_goes_only_when_they_may_be_killed(prefix: str) -> None:
    group = cgroup.create(f"fibril-test-{prefix}/inner")
    process = await asyncio.create_subprocess_exec("sleep", "60")
    try:
        cgroup.move(group, process.pid)
        assert cgroup.of_process(process.pid) == group
        assert cgroup.processes(group.parent) == [process.pid]
        with pytest.raises(errors.FailedPrecondition, match=str(process.pid)):
            await cgroup.remove(group.parent)
    finally:
        assert await cgroup.remove(group.parent, kill=True) is True
        await process.wait()
    assert await cgroup.remove(group.parent) is False
    assert cgroup.of_process(process.pid) is None
    with pytest.raises(errors.NotFound):
        cgroup.cgroup_id(group)


def test_this_host_has_what_is_required() -> None:
    features.probe().require()


def run(prefix: list[str], script: str) -> str:
    done = subprocess.run(
        [*prefix, sys.executable, "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_a_missing_capability_is_named() -> None:
    said = run(
        [
            "setpriv",
            "--bounding-set",
            "-net_admin,-bpf",
            "--inh-caps",
            "-net_admin,-bpf",
        ],
        "from services.common.kernel import features\n"
        "from services.common import errors\n"
        "try: features.probe().require()\n"
        "except errors.PermissionDenied as e: print(e)",
    )
    assert "CAP_NET_ADMIN" in said
    assert "CAP_BPF" in said
    assert "run it as root" in said


def test_bpffs_that_is_not_mounted_is_named_and_can_be_mounted() -> None:
    """In a mount namespace of its own, so the host's stays."""
    said = run(
        ["unshare", "--mount"],
        "import subprocess\n"
        "from services.common.kernel import features\n"
        "subprocess.run('while umount /sys/fs/bpf; do :; done 2>/dev/null', shell=True)\n"
        "print(features.probe()['bpffs'].message, '/', features.probe()['bpffs'].fix)\n"
        "print(features.ensure_bpffs(), features.ensure_bpffs(), features.probe()['bpffs'].ok)",
    )
    assert said.split("\n") == [
        "/sys/fs/bpf is not a bpf file system / mount -t bpf bpf /sys/fs/bpf",
        "True False True",
    ]


def test_a_helper_the_kernel_lacks_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "_REDIRECT_PEER", 9999)
    feature = features.probe()["redirect_peer"]
    assert not feature.ok
    assert "kernel 5.10" in feature.fix
