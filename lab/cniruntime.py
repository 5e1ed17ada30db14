"""A minimal container runtime's CNI half: runs a network configuration list for a network namespace.

What libcni does and no more: one plugin after the other with environment, configuration and prevResult; the
reverse order for DEL. Plugins run inside a node's network namespace, so that one machine carries many
nodes. It keeps each attachment's result in memory, as DEL and CHECK need it again.
"""

from __future__ import annotations

import ctypes
import json
import os
import subprocess
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any

_CLONE_NEWNET = 0x40000000
_libc = ctypes.CDLL(None, use_errno=True)


class PluginError(Exception):
    """A plugin ended with an error: its name and the CNI error code, message and details it printed."""

    def __init__(self, plugin: str, code: int, message: str, details: str) -> None:
        super().__init__(f"{plugin}: code {code}: {message}: {details}")
        self.plugin = plugin
        self.code = code
        self.message = message
        self.details = details


def enter_netns(path: str | Path) -> None:
    """Move this thread, and what it starts from now on, into a network namespace. OSError if it is gone."""
    descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        if _libc.setns(descriptor, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns: {os.strerror(ctypes.get_errno())}", str(path))
    finally:
        os.close(descriptor)


class CniRuntime:
    """Runs the plugins of `conflist`, found in `bin_dirs`, in the namespace `node` (None: this process's).

    Methods may be called from several threads. Use as a context manager, or call `close`.
    """

    def __init__(
        self,
        conflist: Mapping[str, Any],
        bin_dirs: Iterable[Path],
        node: Path | None = None,
        workers: int = 1,
        timeout: float = 120.0,
    ) -> None:
        self.conflist = dict(conflist)
        self.bin_dirs = [Path(path) for path in bin_dirs]
        self.timeout = timeout
        self._results: dict[tuple[str, str], dict[str, Any]] = {}
        # Children inherit the namespace of the thread that starts them; these threads live in the node's.
        enter = partial(enter_netns, node) if node else None
        self._threads = ThreadPoolExecutor(workers, "cni", initializer=enter)

    def __enter__(self) -> CniRuntime:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the threads."""
        self._threads.shutdown()

    def add(
        self,
        container_id: str,
        netns: str | Path,
        ifname: str = "eth0",
        *,
        args: str = "",
        runtime_config: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        """Attach; gives the last plugin's result. On PluginError the caller deletes, as a runtime does."""
        result: dict[str, Any] = {}
        for plugin in self.conflist["plugins"]:
            config = self._config(plugin, runtime_config, result)
            result = self.run("ADD", plugin["type"], config, container_id, str(netns), ifname, args)
        self._results[container_id, ifname] = result
        return result

    def delete(
        self,
        container_id: str,
        netns: str | Path = "",
        ifname: str = "eth0",
        *,
        args: str = "",
        runtime_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Detach."""
        previous = self._results.pop((container_id, ifname), None)
        for plugin in reversed(self.conflist["plugins"]):
            config = self._config(plugin, runtime_config, previous)
            self.run("DEL", plugin["type"], config, container_id, str(netns), ifname, args)

    def check(
        self,
        container_id: str,
        netns: str | Path,
        ifname: str = "eth0",
        *,
        runtime_config: Mapping[str, Any] | None = None,
    ) -> None:
        """Compare every plugin's part with the result of ADD."""
        previous = self._results.get((container_id, ifname))
        for plugin in self.conflist["plugins"]:
            config = self._config(plugin, runtime_config, previous)
            self.run("CHECK", plugin["type"], config, container_id, str(netns), ifname, "")

    def gc(self, valid: Sequence[tuple[str, str]]) -> None:
        """Tell the first plugin which (container, interface) pairs still exist."""
        listed = [{"containerID": container, "ifname": ifname} for container, ifname in valid]
        config = {**self._config(self.conflist["plugins"][0]), "cni.dev/valid-attachments": listed}
        self.run("GC", self.conflist["plugins"][0]["type"], config)

    def status(self) -> None:
        """Ask the first plugin whether it can serve ADD."""
        self.run("STATUS", self.conflist["plugins"][0]["type"], self._config(self.conflist["plugins"][0]))

    def _config(
        self,
        plugin: Mapping[str, Any],
        runtime_config: Mapping[str, Any] | None = None,
        previous: Mapping[str, Any] | None = None,
    ) -> dict[str, Any]:
        config = {key: value for key, value in plugin.items() if key != "capabilities"}
        config |= {"cniVersion": self.conflist["cniVersion"], "name": self.conflist["name"]}
        wanted = {
            key: value
            for key, value in (runtime_config or {}).items()
            if plugin.get("capabilities", {}).get(key)
        }
        if wanted:
            config["runtimeConfig"] = wanted
        if previous:
            config["prevResult"] = dict(previous)
        return config

    def find(self, plugin: str) -> Path:
        """The plugin's file; FileNotFoundError names where it was looked for."""
        for directory in self.bin_dirs:
            if (directory / plugin).exists():
                return directory / plugin
        raise FileNotFoundError(f"CNI plugin {plugin} is not in {', '.join(map(str, self.bin_dirs))}")

    def run(
        self,
        command: str,
        plugin: str,
        config: Mapping[str, Any] | bytes,
        container_id: str = "",
        netns: str = "",
        ifname: str = "",
        args: str = "",
    ) -> dict[str, Any]:
        """Run one plugin once; {} when it prints nothing."""
        environment = {
            "PATH": os.environ.get("PATH", "/usr/sbin:/usr/bin:/sbin:/bin"),
            "CNI_COMMAND": command,
            "CNI_PATH": ":".join(map(str, self.bin_dirs)),
        }
        optional = {
            "CNI_CONTAINERID": container_id,
            "CNI_NETNS": netns,
            "CNI_IFNAME": ifname,
            "CNI_ARGS": args,
        }
        environment |= {key: value for key, value in optional.items() if value}
        body = config if isinstance(config, bytes) else json.dumps(config).encode()
        done = self._threads.submit(
            subprocess.run,
            [self.find(plugin)],
            input=body,
            env=environment,
            capture_output=True,
            timeout=self.timeout,
        ).result()
        return _answer(plugin, done)


def _answer(plugin: str, done: subprocess.CompletedProcess[bytes]) -> dict[str, Any]:
    try:
        answer = json.loads(done.stdout) if done.stdout.strip() else {}
    except ValueError:
        raise PluginError(
            plugin, -1, "printed no JSON", (done.stdout + done.stderr).decode(errors="replace")
        ) from None
    if done.returncode:
        raise PluginError(
            plugin,
            int(answer.get("code", -1)),
            str(answer.get("msg", f"exit code {done.returncode}")),
            str(answer.get("details", "")) or done.stderr.decode(errors="replace"),
        )
    return dict(answer)
