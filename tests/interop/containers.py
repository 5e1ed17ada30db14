"""Private container runtimes for interop tests: an image made here, podman and containerd with nothing
shared.

Each runtime keeps all of its state below one directory and is torn down with it; the machine's own podman and
containerd, if any, are not touched.
"""

from __future__ import annotations

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import platform
import shutil
import signal
import subprocess
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import grpc

from bench.node import node
from fibril.endpoint.v1.endpoint_pb2 import Endpoint, ListEndpointsRequest
from fibril.endpoint.v1.endpoint_pb2_grpc import EndpointServiceStub
from services.common.instance import Instance
from services.ipam.cni.install import install
from tests import session

BUSYBOX = Path("/usr/bin/busybox")
IMAGE = "localhost/fibril-test:1"
GREETING = "hello from a pod"
SLEEP = (str(BUSYBOX), "sleep", "100000")
WEB_SERVER = (str(BUSYBOX), "httpd", "-f", "-p", "80", "-h", "/www")
WEB_PORT = 80
# A container here may not raise its limits beyond the machine's (no CAP_SYS_RESOURCE): ask for little.
ULIMITS = ("nofile=1024:1024", "nproc=1000:1000")

CONTAINERD_CONFIG = """
version = 2
root = "{directory}/root"
state = "{directory}/state"
[grpc]
address = "{directory}/containerd.sock"
[plugins."io.containerd.internal.v1.opt"]
path = "{directory}/opt"
[plugins."io.containerd.grpc.v1.cri"]
sandbox_image = "{image}"
restrict_oom_score_adj = true
netns_mounts_under_state_dir = true
[plugins."io.containerd.grpc.v1.cri".containerd]
snapshotter = "native"
[plugins."io.containerd.grpc.v1.cri".cni]
bin_dir = "{bin_dir}"
conf_dir = "{conf_dir}"
"""


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 20.0) -> None:
    """Poll; AssertionError names what did not come."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"{what} did not happen within {seconds:g} s"
        time.sleep(0.02)


def build_image(path: Path) -> None:
    """Write an OCI archive of a one-layer image: busybox where the host has it and as /bin/sh."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for directory in ("bin", "etc", "tmp", "usr", "usr/bin", "www"):
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        for name, content in (
            (str(BUSYBOX)[1:], BUSYBOX.read_bytes()),
            ("www/index.html", GREETING.encode()),
        ):
            entry = tarfile.TarInfo(name)
            entry.size, entry.mode = len(content), 0o755
            tar.addfile(entry, io.BytesIO(content))
        entry = tarfile.TarInfo("bin/sh")
        entry.type, entry.linkname = tarfile.SYMTYPE, str(BUSYBOX)
        tar.addfile(entry)
    plain = layer.getvalue()
    packed = gzip.compress(plain, 1, mtime=0)
    blobs: dict[str, bytes] = {}

    def blob(content: bytes, media_type: str) -> dict[str, Any]:
        digest = hashlib.sha256(content).hexdigest()
        blobs[digest] = content
        return {"mediaType": media_type, "digest": f"sha256:{digest}", "size": len(content)}

    architecture = {"x86_64": "amd64", "aarch64": "arm64"}.get(platform.machine(), platform.machine())
    config = {
        "architecture": architecture,
        "os": "linux",
        "config": {"Cmd": list(SLEEP), "Env": ["PATH=/bin"]},
        "rootfs": {"type": "layers", "diff_ids": [f"sha256:{hashlib.sha256(plain).hexdigest()}"]},
    }
    manifest = {
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": blob(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"),
        "layers": [blob(packed, "application/vnd.oci.image.layer.v1.tar+gzip")],
    }
    entry_in_index = blob(json.dumps(manifest).encode(), manifest["mediaType"])  # type: ignore[arg-type]
    entry_in_index["annotations"] = {
        "org.opencontainers.image.ref.name": IMAGE,
        "io.containerd.image.name": IMAGE,
    }
    index = {"schemaVersion": 2, "manifests": [entry_in_index]}
    with tarfile.open(path, "w") as tar:
        files = {"oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": json.dumps(index).encode()}
        files |= {f"blobs/sha256/{digest}": content for digest, content in blobs.items()}
        for name, content in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            tar.addfile(entry, io.BytesIO(content))


@dataclass(frozen=True)
class CniNode:
    """A running Fibril node with its CNI plugin installed beside Debian's, and the namespace of its world."""

    name: str
    bin_dir: Path
    conf_dir: Path
    network: str
    socket: Path
    world: str

    @property
    def enter(self) -> list[str]:
        """The command prefix that runs something in the node's namespace."""
        return ["nsenter", f"--net=/run/netns/{self.name}"]

    def endpoints(self) -> list[Endpoint]:
        """What the node says it has."""
        with grpc.insecure_channel(f"unix:{self.socket}") as channel:
            stub = EndpointServiceStub(channel)
            return list(stub.ListEndpoints(ListEndpointsRequest(), timeout=10).endpoints)


# Addresses of documentation: the node's towards the world, and the world's.
NODE4, WORLD4, NODE6, WORLD6 = "192.0.2.1", "192.0.2.2", "2001:db8:7::1", "2001:db8:7::2"


@contextlib.contextmanager
def cni_node() -> Iterator[CniNode]:
    """Bring a node up in a namespace of its own. The world is one veth away and has no route to the pods."""
    with node(session.name()) as fresh:
        world = f"{fresh.name}w"
        bin_dir, conf_dir = fresh.root / "bin", fresh.root / "net.d"
        bin_dir.mkdir()
        for name in ("portmap", "bandwidth", "loopback"):
            (bin_dir / name).symlink_to(Path("/usr/lib/cni") / name)
        subprocess.run(["ip", "netns", "add", world], check=True)
        try:
            _link(fresh.name, world)
            fresh.fibril("up")
            instance = Instance(fresh.name, fresh.root / "run", fresh.root / "state")
            installed = install(instance, bin_dir, conf_dir)
            network = json.loads(installed.conflist.read_text())["name"]
            yield CniNode(fresh.name, bin_dir, conf_dir, network, instance.socket("ipam"), world)
        finally:
            subprocess.run(["ip", "netns", "del", world], check=False)


def _link(inner: str, outer: str) -> None:
    """Join node and world by a veth pair, with the node's default routes through it."""
    ip = lambda *words: subprocess.run(["ip", *words], check=True)  # noqa: E731
    ip("-n", inner, "link", "add", "uplink", "type", "veth", "peer", "name", "node0", "netns", outer)
    for name, device, ipv4, ipv6 in ((inner, "uplink", NODE4, NODE6), (outer, "node0", WORLD4, WORLD6)):
        ip("-n", name, "addr", "add", f"{ipv4}/24", "dev", device)
        ip("-n", name, "addr", "add", f"{ipv6}/64", "dev", device, "nodad")
        ip("-n", name, "link", "set", device, "up")
        ip("-n", name, "link", "set", "lo", "up")
    ip("-n", inner, "route", "add", "default", "via", WORLD4)
    ip("-n", inner, "route", "add", "default", "via", WORLD6)


@contextlib.contextmanager
def web_server(netns: str, root: Path) -> Iterator[None]:
    """A web server on port 80 of all addresses of a namespace, answering with the greeting."""
    (root / "index.html").write_text(GREETING)
    command = [
        "nsenter",
        f"--net=/run/netns/{netns}",
        str(BUSYBOX),
        "httpd",
        "-f",
        "-p",
        str(WEB_PORT),
        "-h",
        str(root),
    ]
    process = subprocess.Popen(command)
    try:
        wait_until(lambda: fetch(netns, "127.0.0.1") == GREETING, "the web server's start")
        yield
    finally:
        process.kill()
        process.wait()


def url(address: str, port: int = WEB_PORT) -> str:
    """The URL of an address of either family."""
    return f"http://[{address}]:{port}/" if ":" in address else f"http://{address}:{port}/"


def fetching(address: str, port: int = WEB_PORT) -> list[str]:
    """The command that fetches a page. (wget's own -T crashes in Debian 12's static busybox.)"""
    return [str(BUSYBOX), "timeout", "10", str(BUSYBOX), "wget", "-qO-", url(address, port)]


def fetch(netns: str, address: str, port: int = WEB_PORT) -> str:
    """What a web server says to a client in a namespace; the reason if it says nothing."""
    command = ["nsenter", f"--net=/run/netns/{netns}", *fetching(address, port)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    return done.stdout if done.returncode == 0 else f"failed: {done.stderr.strip()}"


def missing_tools(*names: str) -> str:
    """The reason to skip a test; empty if every program is there."""
    missing = [name for name in (*names, str(BUSYBOX)) if shutil.which(name) is None]
    return f"not installed: {', '.join(missing)} (`make install`)" if missing else ""


def remove_cgroups(name: str) -> None:
    """Remove the cgroup `name` and what is below it, in every hierarchy, once the processes in it are gone."""

    def gone(directory: Path) -> bool:
        with contextlib.suppress(FileNotFoundError):
            try:
                directory.rmdir()
            except OSError as error:
                if error.errno != errno.EBUSY:
                    raise
        return not directory.exists()

    mounts = [line.split() for line in Path("/proc/self/mounts").read_text().splitlines()]
    for target in (Path(fields[1]) for fields in mounts if fields[2] in ("cgroup", "cgroup2")):
        # Some go by themselves meanwhile.
        for directory, _, _ in os.walk(target / name, topdown=False):
            wait_until(partial(gone, Path(directory)), f"the end of the processes of {directory}")


class Podman:
    """podman with its CNI backend and runc, on the CNI configuration in `conf_dir`."""

    NEEDS = ("podman", "runc", "conmon")

    def __init__(self, directory: Path, on: CniNode) -> None:
        self.network = on.network
        self.directory = directory
        directory.mkdir()
        config = directory / "containers.conf"
        config.write_text(
            "[network]\n"
            'network_backend = "cni"\n'
            f"cni_plugin_dirs = {json.dumps([str(on.bin_dir)])}\n"
            f"network_config_dir = {json.dumps(str(on.conf_dir))}\n"
            f"default_network = {json.dumps(on.network)}\n"
            "[engine]\n"
            'events_logger = "file"\n'
        )
        self.environment = {**os.environ, "CONTAINERS_CONF": str(config)}
        self.base = [
            *on.enter, "podman", "--root", str(directory / "root"), "--runroot", str(directory / "runroot"),
            "--tmpdir", str(directory / "tmp"), "--storage-driver", "vfs", "--runtime",
            shutil.which("runc") or "runc", "--cgroup-manager", "cgroupfs",
        ]  # fmt: skip

    def __call__(self, *arguments: str, check: bool = True) -> str:
        """Run a podman command; its standard output."""
        done = subprocess.run(
            [*self.base, *arguments], env=self.environment, capture_output=True, text=True, timeout=120
        )
        if check and done.returncode:
            raise AssertionError(f"podman {' '.join(arguments)}: {done.stderr}{done.stdout}")
        return done.stdout

    def start(self, name: str, *options: str, command: Sequence[str] = ()) -> None:
        """Run a container in the background."""
        limits = [part for limit in ULIMITS for part in ("--ulimit", limit)]
        private = ("--network", self.network, "--cgroup-parent", f"/{self.directory.name}")
        self("run", "-d", "--name", name, *limits, *private, *options, IMAGE, *command)

    def addresses(self, name: str) -> list[str]:
        """A container's addresses as podman reports them."""
        settings = json.loads(self("inspect", name))[0]["NetworkSettings"]["Networks"][self.network]
        return [settings["IPAddress"], settings["GlobalIPv6Address"]]

    def fetch(self, name: str, address: str, port: int = WEB_PORT) -> str:
        """What a web server says to a container; the reason if it says nothing."""
        try:
            return self("exec", name, *fetching(address, port))
        except AssertionError as error:
            return f"failed: {error}"

    def close(self) -> None:
        """Remove the containers and everything below the directory."""
        self("rm", "--all", "--force", "--time", "0", check=False)
        # vfs and the pause mount: nothing may stay mounted below the directory when it goes.
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            target = line.split()[1]
            if target.startswith(str(self.directory)):
                subprocess.run(["umount", "-l", target], check=False)
        remove_cgroups(self.directory.name)
        shutil.rmtree(self.directory, ignore_errors=True)


class Containerd:
    """containerd with its CRI plugin as the only front door, on the CNI configuration in `conf_dir`."""

    NEEDS = ("containerd", "ctr", "runc", "containerd-shim-runc-v2")

    def __init__(self, directory: Path, on: CniNode) -> None:
        self.directory = directory
        directory.mkdir()
        self.socket = directory / "containerd.sock"
        config = directory / "config.toml"
        config.write_text(
            CONTAINERD_CONFIG.format(
                directory=directory, image=IMAGE, bin_dir=on.bin_dir, conf_dir=on.conf_dir
            )
        )
        self.log = (directory / "log").open("wb")
        self.process = subprocess.Popen(
            [*on.enter, "containerd", "--config", config], stdout=self.log, stderr=self.log
        )
        try:
            wait_until(self._answers, "containerd's start")
        except BaseException:
            self.close()
            raise
        messages, services = grpc.protos_and_services("tests/interop/cri.proto")
        self.messages: Any = messages
        self.channel = grpc.insecure_channel(f"unix:{self.socket}")
        self.runtime: Any = services.RuntimeServiceStub(self.channel)
        self.sandboxes: list[str] = []

    def _answers(self) -> bool:
        assert self.process.poll() is None, f"containerd ended: {self.output()}"
        return self.socket.exists() and self.ctr("version", check=False) != ""

    def output(self) -> str:
        """What containerd logged."""
        return (self.directory / "log").read_text(errors="replace")[-4000:]

    def ctr(self, *arguments: str, check: bool = True) -> str:
        """Run a ctr command in CRI's namespace; its standard output."""
        done = subprocess.run(
            ["ctr", "--address", str(self.socket), "--namespace", "k8s.io", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
        )
        if check and done.returncode:
            raise AssertionError(f"ctr {' '.join(arguments)}: {done.stderr}\n{self.output()}")
        return done.stdout if done.returncode == 0 else ""

    def sandbox_config(self, name: str, ports: Sequence[tuple[int, int]] = ()) -> Any:
        """A pod; `ports` are (host, container) of TCP."""
        logs = self.directory / "logs" / name
        logs.mkdir(parents=True)
        return self.messages.PodSandboxConfig(
            metadata=self.messages.PodSandboxMetadata(name=name, uid=f"uid-{name}", namespace="interop"),
            hostname=name,
            log_directory=str(logs),
            port_mappings=[
                self.messages.PortMapping(host_port=host, container_port=container)
                for host, container in ports
            ],
            linux=self.messages.LinuxPodSandboxConfig(cgroup_parent=f"/{self.directory.name}"),
        )

    def run_pod(
        self, name: str, command: Sequence[str], ports: Sequence[tuple[int, int]] = ()
    ) -> tuple[str, str]:
        """A pod of one container; gives (sandbox id, container id)."""
        config = self.sandbox_config(name, ports)
        try:
            sandbox = self.runtime.RunPodSandbox(
                self.messages.RunPodSandboxRequest(config=config), timeout=60
            ).pod_sandbox_id
        except grpc.RpcError as error:
            raise AssertionError(f"{error}\n{self.output()}") from error
        self.sandboxes.append(sandbox)
        container = self.runtime.CreateContainer(
            self.messages.CreateContainerRequest(
                pod_sandbox_id=sandbox,
                config=self.messages.ContainerConfig(
                    metadata=self.messages.ContainerMetadata(name=name),
                    image=self.messages.ImageSpec(image=IMAGE),
                    command=command,
                ),
                sandbox_config=config,
            ),
            timeout=60,
        ).container_id
        self.runtime.StartContainer(self.messages.StartContainerRequest(container_id=container), timeout=60)
        return sandbox, container

    def addresses(self, sandbox: str) -> list[str]:
        """The pod's addresses as CRI reports them."""
        request = self.messages.PodSandboxStatusRequest(pod_sandbox_id=sandbox)
        network = self.runtime.PodSandboxStatus(request, timeout=20).status.network
        return [network.ip, *(entry.ip for entry in network.additional_ips)]

    def execute(self, container: str, *command: str) -> tuple[int, str]:
        """Run a command in a container; gives (exit code, output of both streams)."""
        request = self.messages.ExecSyncRequest(container_id=container, cmd=command, timeout=20)
        answer = self.runtime.ExecSync(request, timeout=30)
        return answer.exit_code, (answer.stdout + answer.stderr).decode(errors="replace")

    def remove(self, sandbox: str) -> None:
        """Stop and remove a pod."""
        self.runtime.StopPodSandbox(self.messages.StopPodSandboxRequest(pod_sandbox_id=sandbox), timeout=60)
        self.runtime.RemovePodSandbox(
            self.messages.RemovePodSandboxRequest(pod_sandbox_id=sandbox), timeout=60
        )
        self.sandboxes.remove(sandbox)

    def close(self) -> None:
        """Remove the pods, end the daemon, take away its directory."""
        try:
            for sandbox in list(getattr(self, "sandboxes", ())):
                self.remove(sandbox)
        finally:
            if hasattr(self, "channel"):
                self.channel.close()
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()
            self.log.close()
            remove_cgroups(self.directory.name)
            shutil.rmtree(self.directory, ignore_errors=True)
