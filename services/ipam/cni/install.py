"""Install the CNI plugin and its network configuration for one instance, and take them away again.

Every file is written beside its place and renamed into it, the plugin before the configuration that names
it, so a runtime watching the directory never sees half of either. Removal goes the other way round and
touches nothing that does not carry Fibril's mark.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.instance import Instance

SOURCE = Path(__file__).with_name("plugin.py")
# Directories in which Debian and the upstream packages put plugins.
BIN_DIRS = (Path("/usr/lib/cni"), Path("/opt/cni/bin"))
CONF_DIR = Path("/etc/cni/net.d")
# Plugins that may follow ours, with the capability a runtime fills in for each.
CHAINED = {"portmap": "portMappings", "bandwidth": "bandwidth"}

_MARK = b"fibril-cni: the CNI plugin a container runtime executes."
_NETWORK = re.compile(r"[a-zA-Z0-9][a-zA-Z0-9_.\-]{0,127}")


@dataclass(frozen=True)
class Installed:
    """What `install` wrote."""

    plugin: Path
    conflist: Path
    # Plugins of the chain, ours first.
    chain: tuple[str, ...]


def plugin_name(instance: Instance) -> str:
    """The plugin's type: "fibril-cni" for the instance "node", else with the instance's name behind."""
    return "fibril-cni" if instance.name == "node" else f"fibril-cni-{instance.name}"


def default_bin_dir() -> Path:
    """The first usual directory that already holds plugins, else upstream's."""
    return next((path for path in BIN_DIRS if (path / "loopback").exists()), BIN_DIRS[-1])


def conflist_path(instance: Instance, conf_dir: Path) -> Path:
    """Where the configuration goes; "10-" lets it win over what distributions ship as 87- or 99-."""
    return conf_dir / f"10-{plugin_name(instance).replace('fibril-cni', 'fibril')}.conflist"


def install(
    instance: Instance,
    bin_dir: Path,
    conf_dir: Path,
    *,
    network: str = "",
    pool: str = "",
    mtu: int = 0,
    chained: Sequence[str] = tuple(CHAINED),
) -> Installed:
    """Write plugin and configuration; again is an update.

    Of `chained`, plugins that `bin_dir` lacks are left out, since a runtime refuses a chain it cannot run.
    `network` defaults to "fibril" (or "fibril-<instance>"); `mtu` in bytes, 0 for the uplink's.
    InvalidArgument: unknown chained plugin or malformed name. FailedPrecondition: a file of somebody
    else's is in the way, or a directory cannot be written.
    """
    name = plugin_name(instance)
    network = network or name.replace("fibril-cni", "fibril")
    if not _NETWORK.fullmatch(network):
        raise InvalidArgument(f"network name {network!r} is malformed", field="network")
    if unknown := set(chained) - set(CHAINED):
        raise InvalidArgument(
            f"unknown chained plugin {', '.join(sorted(unknown))}",
            field="chained",
            fix=f"known: {', '.join(CHAINED)}",
        )
    plugin, conflist = bin_dir / name, conflist_path(instance, conf_dir)
    for path, ours in ((plugin, _is_plugin), (conflist, _names(name))):
        if path.exists() and not ours(path):
            raise FailedPrecondition(
                f"{path} is not Fibril's", fix="move it away, or choose another directory"
            )
    present = [other for other in CHAINED if other in chained and (bin_dir / other).exists()]
    try:
        bin_dir.mkdir(parents=True, exist_ok=True)
        conf_dir.mkdir(parents=True, exist_ok=True)
        _write(plugin, _plugin_source(instance), 0o755)
        _write(conflist, _conflist(name, network, pool, mtu, present, bin_dir), 0o644)
    except OSError as error:
        raise FailedPrecondition(f"cannot install the CNI plugin: {error}", fix="run as root") from error
    return Installed(plugin, conflist, (name, *present))


def uninstall(instance: Instance, bin_dir: Path, conf_dir: Path) -> list[Path]:
    """Remove what `install` wrote; gives what was removed. Nothing there is success."""
    name = plugin_name(instance)
    removed = []
    for path, ours in ((conflist_path(instance, conf_dir), _names(name)), (bin_dir / name, _is_plugin)):
        if path.exists() and ours(path):
            path.unlink()
            removed.append(path)
    return removed


def _is_plugin(path: Path) -> bool:
    return _MARK in path.read_bytes()[:512]


class _names:
    """Whether a configuration names our plugin."""

    def __init__(self, plugin: str) -> None:
        self.plugin = plugin

    def __call__(self, path: Path) -> bool:
        return f'"{self.plugin}"'.encode() in path.read_bytes()


def _plugin_source(instance: Instance) -> bytes:
    """plugin.py with this instance's socket and this machine's interpreter."""
    source = SOURCE.read_text()
    written, count = re.subn(
        r"^SOCKET = .*$", f"SOCKET = {str(instance.cni_socket)!r}", source, flags=re.MULTILINE
    )
    assert count == 1
    if not os.access("/usr/bin/python3", os.X_OK):
        interpreter = os.path.realpath(getattr(sys, "_base_executable", sys.executable))
        written = written.replace("#!/usr/bin/python3 ", f"#!{interpreter} ", 1)
    return written.encode()


def _conflist(name: str, network: str, pool: str, mtu: int, chained: Sequence[str], bin_dir: Path) -> bytes:
    # "bandwidth" is declared for us too: the data path leaves room for the qdisc that plugin will make.
    capabilities = {"ips": True, "cgroupPath": True, "bandwidth": True}
    ours: dict[str, object] = {"type": name, "capabilities": capabilities}
    if pool:
        ours["pool"] = pool
    if mtu:
        ours["mtu"] = mtu
    plugins = [ours]
    for other in chained:
        entry: dict[str, object] = {"type": other, "capabilities": {CHAINED[other]: True}}
        if other == "portmap":
            entry["snat"] = True
        plugins.append(entry)
    # Runtimes older than CNI 1.1 read cniVersion only; newer ones choose from cniVersions, which every
    # plugin of the chain has to know.
    config: dict[str, object] = {"cniVersion": "1.0.0", "name": network, "plugins": plugins}
    if all("1.1.0" in _supported(bin_dir / other) for other in chained):
        config["cniVersions"] = ["0.4.0", "1.0.0", "1.1.0"]
    return json.dumps(config, indent=2).encode() + b"\n"


def _supported(plugin: Path) -> list[str]:
    """Versions a plugin says it knows; none if it cannot be asked."""
    try:
        answer = subprocess.run(
            [plugin],
            input=b'{"cniVersion": "1.0.0"}',
            env={"CNI_COMMAND": "VERSION"},
            capture_output=True,
            timeout=10,
            check=True,
        )
        versions = json.loads(answer.stdout)["supportedVersions"]
        return [str(version) for version in versions]
    except (OSError, subprocess.SubprocessError, ValueError, KeyError, TypeError):
        return []


def _write(path: Path, content: bytes, mode: int) -> None:
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, mode)
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(descriptor, mode)
            file.write(content)
            file.flush()
            os.fsync(descriptor)
        os.rename(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
