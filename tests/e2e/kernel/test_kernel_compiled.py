"""What the compiler made is kept, and used only when it is of use."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from kernel_programs import load_counter

from services.common.kernel import compiled, loader, progs
from services.common.kernel.loader import LoadResult
from services.sockaccel import install as sockets

PACKET = b"\2" * 64


@pytest.fixture
def kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty directory for what is kept."""
    path = tmp_path / "kept" / "bpf"
    monkeypatch.setenv("FIBRIL_BPF_CACHE", str(path))
    yield path


def was_compiled(result: LoadResult) -> bool:
    return any(name.startswith("compile ") for name in result.seconds)


def counted(pin_dir: Path) -> None:
    with progs.opened(pin_dir / "prog/test/count_packets") as fd:
        progs.test_run(fd, PACKET)


async def test_a_source_is_compiled_once_and_again_when_it_differs(pin_dir: Path, kept: Path) -> None:
    first = await load_counter(pin_dir / "a")
    assert was_compiled(first) and len(list(kept.iterdir())) == 1
    second = await load_counter(pin_dir / "b")
    assert not was_compiled(second)
    # The same instructions, but for what the kernel puts in.
    assert [each.jited_bytes for each in first.programs.values()] == [each.jited_bytes for each in second.programs.values()]
    counted(pin_dir / "b")
    assert was_compiled(await load_counter(pin_dir / "c", defines={"STEP": 6}))
    assert len(list(kept.iterdir())) == 2


@pytest.mark.parametrize("content", [b"", b"{}", b"no JSON", b'{"maps": 3, "functions": {}}'])
async def test_what_is_of_no_use_is_compiled_anew(pin_dir: Path, kept: Path, content: bytes) -> None:
    await load_counter(pin_dir / "a")
    (file,) = kept.iterdir()
    good = file.read_bytes()
    file.write_bytes(content)
    assert was_compiled(await load_counter(pin_dir / "b"))
    counted(pin_dir / "b")
    assert file.read_bytes() == good


async def test_others_cannot_put_code_there(pin_dir: Path, kept: Path) -> None:
    await load_counter(pin_dir / "a")
    kept.chmod(0o777)
    assert was_compiled(await load_counter(pin_dir / "b"))
    kept.chmod(0o700)
    assert not was_compiled(await load_counter(pin_dir / "c"))
    (file,) = kept.iterdir()
    os.chown(file, 65534, 65534)
    assert was_compiled(await load_counter(pin_dir / "d"))


async def test_without_a_directory_all_works_as_before(pin_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FIBRIL_BPF_CACHE", "")
    assert was_compiled(await load_counter(pin_dir / "a")) and was_compiled(await load_counter(pin_dir / "b"))
    monkeypatch.setenv("FIBRIL_BPF_CACHE", "/proc/no/such/place")
    assert was_compiled(await load_counter(pin_dir / "c"))


async def test_those_not_used_for_longest_go(kept: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "KEPT_MAX", 3)
    for number in range(5):
        compiled.write(f"{number}", compiled.Unit((), {"f": b"12345678"}))
        await asyncio.sleep(0.01)
        assert compiled.read("0") is not None
    assert sorted(path.name for path in kept.iterdir()) == ["0", "3", "4"]


async def test_storage_of_sockets_keeps_its_types(pin_dir: Path, kept: Path) -> None:
    """The one kind of map that cannot be made without."""
    spec = await asyncio.to_thread(sockets.spec, 64)
    assert was_compiled(await loader.load([spec], pin_dir / "a"))
    again = await loader.load([spec], pin_dir / "b")
    assert not was_compiled(again) and len(again.programs) == len(spec.functions)
