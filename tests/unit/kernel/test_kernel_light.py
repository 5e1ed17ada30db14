"""The adapters must not drag compilers or whole protocol libraries into services and command line."""

import subprocess
import sys

MODULES = (
    "maps",
    "progs",
    "ringbuf",
    "loader",
    "attach",
    "features",
    "netns",
    "netlink",
    "podlink",
    "events",
    "cgroup",
    "sysctl",
    "nft",
)


def test_importing_the_adapters_loads_neither_bcc_nor_pyroute2_nor_grpc() -> None:
    script = (
        f"import sys\nfrom services.common.kernel import {', '.join(MODULES)}\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'bcc', 'pyroute2', 'grpc'}))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_message_classes_come_without_the_rest_of_pyroute2() -> None:
    script = (
        "import sys\nfrom services.common.kernel import netlink\n"
        "netlink.link_up(1).encode(1, 0)\n"
        "print(len([m for m in sys.modules if m.startswith('pyroute2')]), 'pyroute2.ndb' in sys.modules)\n"
        "import pyroute2\nprint(pyroute2.IPRoute.__name__)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    modules, rest = done.stdout.split("\n")[0].split()
    assert int(modules) < 60
    assert rest == "False"
    # Somebody else in the process may still want the real package.
    assert "IPRoute" in done.stdout.split("\n")[1]


def test_the_message_classes_can_be_wanted_by_several_threads_at_once() -> None:
    script = (
        "import sys, threading\nfrom services.common.kernel import rtnl\nsys.setswitchinterval(1e-6)\n"
        "threads = [threading.Thread(target=rtnl.preload) for _ in range(4)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stderr == ""
