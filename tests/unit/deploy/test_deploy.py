"""The files people copy from deploy/ say what the code says."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import yaml

from services.common import command, config, sections
from services.common.errors import InvalidArgument
from services.ctl.children import SERVICES
from services.identity.config import IdentityConfig
from services.ipam.config import IpamConfig
from services.lb.config import LbConfig
from services.policy.config import PolicyConfig
from services.sockaccel.config import SockAccelConfig

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"
CONFIGS: dict[str, type[Any]] = {
    "ipam": IpamConfig, "identity": IdentityConfig, "lb": LbConfig, "policy": PolicyConfig,
    "sockaccel": SockAccelConfig,
}  # fmt: skip


def test_every_service_is_here() -> None:
    assert list(CONFIGS) == list(SERVICES)


def test_sections_are_those_of_the_services_dataclasses() -> None:
    own = {name: tuple(field.name for field in dataclasses.fields(cls)) for name, cls in CONFIGS.items()}
    assert dict(sections.SECTIONS) == own
    # A section of one name is one and the same thing wherever it is read.
    for section in sections.SHARED:
        (_,) = {config.sample(next(f.default_factory for f in dataclasses.fields(cls) if f.name == section))
                for cls in CONFIGS.values()}  # fmt: skip
    exclusive = [set(names) - set(sections.SHARED) for names in own.values()]
    assert sum(map(len, exclusive)) == len(set().union(*exclusive))


def test_the_sample_configuration_lists_every_option_with_its_default() -> None:
    text = (DEPLOY / "config" / "fibril.yaml").read_text()
    assert text.split("\n", 1)[1] == config.sample(*CONFIGS.values())


@pytest.mark.parametrize("name", CONFIGS)
def test_the_sample_configuration_is_accepted_and_changes_nothing(name: str) -> None:
    cls = CONFIGS[name]
    assert command.load(name, cls, DEPLOY / "config" / "fibril.yaml", {}) == cls()


@pytest.mark.parametrize("name", CONFIGS)
def test_the_configuration_in_the_kubernetes_manifest_is_accepted(name: str, tmp_path: Path) -> None:
    file = tmp_path / "fibril.yaml"
    file.write_text(manifest("ConfigMap")["data"]["fibril.yaml"])
    loaded = command.load(name, CONFIGS[name], file, {})
    assert loaded.etcd.endpoints == ("http://127.0.0.1:2379",)


def test_processes_of_one_file_listen_on_ports_of_their_own(tmp_path: Path) -> None:
    file = tmp_path / "fibril.yaml"
    tls = "tls_ca: a, tls_cert: b, tls_key: c"
    file.write_text(
        f'host: {{rpc: {{tcp: "[::1]:7400", {tls}}}, telemetry: {{prometheus: "127.0.0.1:9464"}}}}\n'
    )
    loaded = [command.load(name, cls, file, {}).host for name, cls in CONFIGS.items()]
    assert [host.rpc.tcp for host in loaded] == [f"[::1]:{port}" for port in range(7400, 7405)]
    assert [host.telemetry.prometheus for host in loaded] == [
        "127.0.0.1:9464",
        "127.0.0.1:9465",
        "127.0.0.1:9466",
        "127.0.0.1:9467",
        "127.0.0.1:9468",
    ]
    any_free = command.load(
        "identity", CONFIGS["identity"], None, {"host.telemetry.prometheus": "127.0.0.1:0"}
    )
    assert any_free.host.telemetry.prometheus == "127.0.0.1:0"


def test_a_section_nobody_knows_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "fibril.yaml"
    file.write_text("poolz: {}\n")
    for name, cls in CONFIGS.items():
        with pytest.raises(InvalidArgument, match="poolz") as refused:
            command.load(name, cls, file, {})
        assert "pools" in refused.value.fix


def test_every_service_is_run_wherever_nodes_are() -> None:
    containers = {
        container["name"]: container
        for container in manifest("DaemonSet")["spec"]["template"]["spec"]["containers"]
    }
    assert set(containers) == set(SERVICES)
    for name, module in SERVICES.items():
        assert containers[name]["command"][1:3] == ["-m", module]
        unit = (DEPLOY / "systemd" / f"fibril-{name}@.service").read_text()
        assert f"-m {module} --instance %i --config /etc/fibril/%i/fibril.yaml" in unit


def manifest(kind: str) -> Any:
    documents = yaml.safe_load_all((DEPLOY / "kubernetes" / "fibril.yaml").read_text())
    return next(document for document in documents if document["kind"] == kind)
