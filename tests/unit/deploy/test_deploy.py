"""The files people copy from deploy/ say what the code says."""

from __future__ import annotations

from pathlib import Path

import yaml

from services.common import config
from services.ipam.config import IpamConfig

DEPLOY = Path(__file__).resolve().parents[3] / "deploy"


def test_the_sample_configuration_lists_every_option_with_its_default() -> None:
    text = (DEPLOY / "config" / "ipam.yaml").read_text()
    assert text.split("\n", 1)[1] == config.sample(IpamConfig)


def test_the_configuration_in_the_kubernetes_manifest_is_accepted(tmp_path: Path) -> None:
    documents = list(yaml.safe_load_all((DEPLOY / "kubernetes" / "fibril.yaml").read_text()))
    text = next(d for d in documents if d["kind"] == "ConfigMap")["data"]["ipam.yaml"]
    file = tmp_path / "ipam.yaml"
    file.write_text(text)
    assert config.load(IpamConfig, file=file, env_prefix="FIBRIL", overrides={}).pools.ipv4 == "10.244.0.0/16"
