"""Private container runtimes for interop tests: an image made here, podman and containerd with nothing
shared.

Each runtime keeps all of its state below one directory and is torn down with it; the machine's own podman and
containerd, if any, are not touched.
"""

from __future__ import annotations

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
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import grpc

BUSYBOX = Path("/usr/bin/busybox")
IMAGE = "localhost/fibril-test:1"
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
    """Write an OCI archive of a one-layer image: busybox as /bin/busybox and /bin/sh, sleeping by default."""
    layer = io.BytesIO()
    with tarfile.open(fileobj=layer, mode="w") as tar:
        for directory in ("bin", "tmp", "etc", "www"):
            entry = tarfile.TarInfo(directory)
            entry.type, entry.mode = tarfile.DIRTYPE, 0o755
            tar.addfile(entry)
        entry = tarfile.TarInfo("bin/busybox")
        content = BUSYBOX.read_bytes()
        entry.size, entry.mode = len(content), 0o755
        tar.addfile(entry, io.BytesIO(content))
        entry = tarfile.TarInfo("bin/sh")
        entry.type, entry.linkname = tarfile.SYMTYPE, "busybox"
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
        "config": {"Cmd": ["/bin/busybox", "sleep", "100000"], "Env": ["PATH=/bin"]},
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


class Podman:
    """podman with its CNI backend and runc, on the CNI configuration in `conf_dir`."""

    NEEDS = ("podman", "runc", "conmon")

    def __init__(self, directory: Path, bin_dir: Path, conf_dir: Path, network: str) -> None:
        self.network = network
        self.directory = directory
        directory.mkdir()
        config = directory / "containers.conf"
        config.write_text(
            "[network]\n"
            'network_backend = "cni"\n'
            f"cni_plugin_dirs = {json.dumps([str(bin_dir)])}\n"
            f"network_config_dir = {json.dumps(str(conf_dir))}\n"
            f"default_network = {json.dumps(network)}\n"
            "[engine]\n"
            'events_logger = "file"\n'
        )
        self.environment = {**os.environ, "CONTAINERS_CONF": str(config)}
        self.base = [
            "podman", "--root", str(directory / "root"), "--runroot", str(directory / "runroot"),
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
        self("run", "-d", "--name", name, *limits, "--network", self.network, *options, IMAGE, *command)

    def close(self) -> None:
        """Remove the containers and everything below the directory."""
        self("rm", "--all", "--force", "--time", "0", check=False)
        # vfs and the pause mount: nothing may stay mounted below the directory when it goes.
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            target = line.split()[1]
            if target.startswith(str(self.directory)):
                subprocess.run(["umount", "-l", target], check=False)
        shutil.rmtree(self.directory, ignore_errors=True)


class Containerd:
    """containerd with its CRI plugin as the only front door, on the CNI configuration in `conf_dir`."""

    NEEDS = ("containerd", "ctr", "runc", "containerd-shim-runc-v2")

    def __init__(self, directory: Path, bin_dir: Path, conf_dir: Path) -> None:
        self.directory = directory
        directory.mkdir()
        self.socket = directory / "containerd.sock"
        config = directory / "config.toml"
        config.write_text(
            CONTAINERD_CONFIG.format(directory=directory, image=IMAGE, bin_dir=bin_dir, conf_dir=conf_dir)
        )
        self.log = (directory / "log").open("wb")
        self.process = subprocess.Popen(["containerd", "--config", config], stdout=self.log, stderr=self.log)
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
            linux=self.messages.LinuxPodSandboxConfig(cgroup_parent=f"/{self.directory.name}-{name}"),
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
            shutil.rmtree(self.directory, ignore_errors=True)
