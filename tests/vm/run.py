"""Run tests in a virtual machine whose kernel has what this one's may lack: python -m tests.vm.run DIRECTORY TEST…

DIRECTORY: a kernel's, as scripts/vm-kernel.sh leaves it. The machine shares this one's file system, but what it writes is its
own. It is emulated, so that it runs where there is no KVM, and where there is one that does not work; with one CPU, because
emulated kernels that patch themselves do not survive with two.

Compiling BPF takes an emulated machine minutes. So it gives its kernel's type information, and what its tests load is compiled
here meanwhile, into the directory where it looks first (services/common/kernel/compiled.py).
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Final

from services.common.kernel import bpf, btf, load, loader
from services.sockaccel import install
from services.sockaccel.tls import programs

ROOT: Final = Path(__file__).resolve().parents[2]
BYTECODE: Final = ROOT / "build" / "pycache"
PATIENCE_S: Final = 300
PAIRS: Final = 64
"""Room for so many, where tests load socket acceleration."""
GUEST: Final = """
cd {root}
cat /sys/devices/system/cpu/possible > {out}/possible
cp /sys/kernel/btf/vmlinux {out}/btf~ && mv {out}/btf~ {out}/btf
mount -t bpf bpf /sys/fs/bpf
until [ -e {out}/compiled ]; do sleep 0.2; done
FIBRIL_VM=1 PYTHONDONTWRITEBYTECODE=1 PYTHONPYCACHEPREFIX={bytecode} FIBRIL_BPF_CACHE={out}/cache \
    {python} -m pytest -q -p no:cacheprovider --durations=3 {tests} > {out}/log 2>&1
echo $? > {out}/code
"""


def main(directory: Path, tests: list[str]) -> int:
    image = next((directory / "boot").glob("vmlinuz-*"))
    with tempfile.TemporaryDirectory(prefix="fibril-vm-") as made:
        out = Path(made)
        (out / "guest.sh").write_text(
            GUEST.format(root=ROOT, out=out, bytecode=BYTECODE, python=sys.executable, tests=" ".join(tests))
        )
        with (out / "console").open("wb") as console:
            vm = subprocess.Popen(
                [
                    *(Path(sys.executable).parent / "vng", "--run", image, "--cpus", "1", "--memory", "2G"),
                    *("--disable-microvm", "--force-9p", "--rwdir", out, "--append", "panic=-1", "--verbose"),
                    *("--disable-kvm", "--exec", f"sh {out}/guest.sh"),
                ],
                env={**os.environ, "PATH": f"{Path(sys.executable).parent}:/usr/sbin:{os.environ['PATH']}"},
                stdin=subprocess.DEVNULL,
                stdout=console,
                stderr=console,
                start_new_session=True,
            )
            try:
                began = time.monotonic()
                compile_python(tests)
                while not (out / "btf").exists() and vm.poll() is None and time.monotonic() - began < PATIENCE_S:
                    time.sleep(0.1)
                if (out / "btf").exists():
                    compile_for(out)
                    (out / "compiled").touch()
                vm.wait(PATIENCE_S)
            except subprocess.TimeoutExpired:
                print(f"the machine was still at it after {PATIENCE_S} s", file=sys.stderr)
            finally:
                if vm.poll() is None:
                    os.killpg(vm.pid, signal.SIGKILL)
                    vm.wait()
        for name in ("log",) if (out / "code").exists() else ("console", "log"):
            if (out / name).exists():
                print((out / name).read_text(errors="replace"), flush=True)
        return int((out / "code").read_text()) if (out / "code").exists() else 1


def compile_python(tests: list[str]) -> None:
    """What tests import, here where it takes moments."""
    env = {**os.environ, "FIBRIL_VM": "1", "PYTHONDONTWRITEBYTECODE": "", "PYTHONPYCACHEPREFIX": str(BYTECODE)}
    words = ("-m", "pytest", "-q", "-p", "no:cacheprovider", "--collect-only", *tests)
    subprocess.run([sys.executable, *words], env=env, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def compile_for(out: Path) -> None:
    """What tests load, for the kernel whose type information lies there."""
    library = btf._libbpf()
    library.btf__parse.restype = library.btf__load_vmlinux_btf.restype
    library.btf__load_vmlinux_btf = lambda: library.btf__parse(str(out / "btf").encode(), None)
    possible = int((out / "possible").read_text().strip().split("-")[-1]) + 1
    bpf.possible_cpus = lambda: possible
    os.environ.update(loader._environment(), FIBRIL_BPF_CACHE=str(out / "cache"))
    specs = [programs.spec(), programs.kernel_spec(), install.spec(PAIRS)]
    made = load.Loader(json.loads(loader._spec_json(specs, Path("/sys/fs/bpf"))))
    for unit in made.spec["units"]:
        made._prepare(unit)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]).resolve(), sys.argv[2:]))
