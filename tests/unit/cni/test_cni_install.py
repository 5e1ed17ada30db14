"""Installing the plugin and its configuration, and taking them away."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from services.common.errors import FailedPrecondition, InvalidArgument
from services.common.instance import Instance
from services.ipam.cni.install import install, plugin_name, uninstall

NODE = Instance("node")
OTHER = Instance("other", run_root=Path("/run/elsewhere"))


@pytest.fixture
def places(tmp_path: Path) -> tuple[Path, Path]:
    return tmp_path / "bin", tmp_path / "net.d"


def fake_plugin(path: Path, *versions: str) -> None:
    """A plugin that answers VERSION."""
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\necho '{json.dumps({'supportedVersions': versions})}'\n")
    path.chmod(0o755)


def test_a_node_gets_an_executable_plugin_for_its_socket(places: tuple[Path, Path]) -> None:
    done = install(NODE, *places)
    assert done.plugin == places[0] / "fibril-cni"
    assert "SOCKET = '/run/fibril/node/cni.sock'\n" in done.plugin.read_text()
    answer = subprocess.run(
        [done.plugin], input=b"{}", env={"CNI_COMMAND": "VERSION"}, capture_output=True, check=True
    )
    assert "1.1.0" in json.loads(answer.stdout)["supportedVersions"]


def test_instances_do_not_meet(places: tuple[Path, Path]) -> None:
    first, second = install(NODE, *places), install(OTHER, *places)
    assert second.plugin.name == plugin_name(OTHER) == "fibril-cni-other"
    assert "'/run/elsewhere/other/cni.sock'" in second.plugin.read_text()
    names = [json.loads(done.conflist.read_text())["name"] for done in (first, second)]
    assert names == ["fibril", "fibril-other"]
    assert uninstall(NODE, *places) == [first.conflist, first.plugin]
    assert second.plugin.exists() and second.conflist.exists()


def test_plugins_that_are_there_are_chained(places: tuple[Path, Path]) -> None:
    fake_plugin(places[0] / "portmap", "1.0.0")
    done = install(NODE, *places)
    config = json.loads(done.conflist.read_text())
    assert done.chain == ("fibril-cni", "portmap")
    assert [plugin["type"] for plugin in config["plugins"]] == ["fibril-cni", "portmap"]
    assert config["plugins"][1]["capabilities"] == {"portMappings": True}
    assert config["plugins"][0]["capabilities"]["ips"] is True
    # A runtime would choose 1.1.0 for the whole chain, which this portmap does not know.
    assert config["cniVersion"] == "1.0.0" and "cniVersions" not in config


def test_the_newest_version_is_offered_when_all_know_it(places: tuple[Path, Path]) -> None:
    fake_plugin(places[0] / "portmap", "1.0.0", "1.1.0")
    assert "1.1.0" in json.loads(install(NODE, *places).conflist.read_text())["cniVersions"]


def test_again_is_an_update(places: tuple[Path, Path]) -> None:
    install(NODE, *places)
    done = install(NODE, *places, network="shop", pool="blue", mtu=1400)
    config = json.loads(done.conflist.read_text())
    assert (config["name"], config["plugins"][0]["pool"], config["plugins"][0]["mtu"]) == (
        "shop",
        "blue",
        1400,
    )
    assert sorted(os.listdir(places[0])) == ["fibril-cni"] and len(os.listdir(places[1])) == 1


def test_other_peoples_files_stay(places: tuple[Path, Path]) -> None:
    done = install(NODE, *places)
    done.plugin.write_text("#!/bin/sh\n")
    done.conflist.write_text("{}")
    with pytest.raises(FailedPrecondition, match="not Fibril's"):
        install(NODE, *places)
    assert uninstall(NODE, *places) == []
    assert done.plugin.exists() and done.conflist.exists()


def test_uninstalling_nothing_is_success(places: tuple[Path, Path]) -> None:
    assert uninstall(NODE, *places) == []


def test_bad_options_are_refused_before_anything_is_written(places: tuple[Path, Path]) -> None:
    with pytest.raises(InvalidArgument, match="firewall"):
        install(NODE, *places, chained=("firewall",))
    with pytest.raises(InvalidArgument, match="malformed"):
        install(NODE, *places, network="a/b")
    assert not places[0].exists() and not places[1].exists()
