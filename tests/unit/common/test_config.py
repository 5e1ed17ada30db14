"""Configuration: defaults, file, environment, flags in that order; nothing unknown or of the wrong type."""

from __future__ import annotations

import enum
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import pytest
import yaml

from services.common import config
from services.common.errors import InvalidArgument, NotFound
from services.common.host import HostConfig


class Mode(enum.Enum):
    ROUTED = "routed"
    OVERLAY = "overlay"


@dataclass(frozen=True)
class Pool:
    cidr: str
    block: int = 24

    def __post_init__(self) -> None:
        if not 8 <= self.block <= 30:
            raise InvalidArgument(f"{self.block} is outside 8..30", field="block", fix="use 24")


@dataclass(frozen=True)
class Etcd:
    endpoints: tuple[str, ...] = ()
    timeout_s: float = field(default=3.0, metadata={"help": "seconds"})
    tls: bool = False
    ca: Path | None = None


@dataclass(frozen=True)
class Root:
    mode: Mode = Mode.ROUTED
    level: Literal["low", "high"] = "low"
    size: int = field(default=7, metadata={"help": "how many"})
    etcd: Etcd = field(default_factory=Etcd)
    first: Pool = field(default_factory=lambda: Pool("10.0.0.0/8"))
    pools: tuple[Pool, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)


def load(tmp_path: Path, text: str = "", env: Mapping[str, str] | None = None, **flags: str) -> Root:
    file = tmp_path / "fibril.yaml"
    file.write_text(text)
    overrides = {key.replace("__", "."): value for key, value in flags.items()}
    return config.load(Root, file=file, env_prefix="FIBRIL", env=env or {}, overrides=overrides)


def test_sections_of_others_are_left_alone_and_known(tmp_path: Path) -> None:
    file = tmp_path / "fibril.yaml"
    file.write_text("size: 3\nlb: {any: thing}\n")
    given = {"lb.any": "x", "etcd.timeout_s": "1"}
    loaded = config.load(Root, file=file, overrides=given, env={}, others={"lb"})
    assert (loaded.size, loaded.etcd.timeout_s) == (3, 1.0)
    for text, key in (("lbb: {}", "lbb"), ("x: 1", "x")):
        file.write_text(text)
        with pytest.raises(InvalidArgument) as refused:
            config.load(Root, file=file, env={}, others={"lb"})
        assert refused.value.field == key and "lb" in refused.value.fix
    with pytest.raises(InvalidArgument):
        config.load(Root, overrides={"lb.any": "x"}, env={})


def test_without_anything_defaults_hold() -> None:
    assert config.load(Root, env={}) == Root()


def test_later_sources_win(tmp_path: Path) -> None:
    text = "size: 1\netcd: {timeout_s: 1, tls: true}\nmode: overlay\n"
    env = {"FIBRIL_SIZE": "2", "FIBRIL_ETCD_TIMEOUT_S": "2.5", "HOME": "/root", "FIBRIL_RUN_ROOT": "/run"}
    loaded = load(tmp_path, text, env, size="0x3")
    assert (loaded.size, loaded.mode) == (3, Mode.OVERLAY)
    assert (loaded.etcd.timeout_s, loaded.etcd.tls, loaded.etcd.ca) == (2.5, True, None)


def test_lists_mappings_and_nested_items(tmp_path: Path) -> None:
    loaded = load(
        tmp_path,
        "pools: [{cidr: 10.1.0.0/16}, {cidr: 'fd00::/48', block: 30}]\nlabels: {a: b}\netcd: {ca: /x}\n",
        {"FIBRIL_ETCD_ENDPOINTS": "a:1, b:2"},
        labels="c=d,e=f",
    )
    assert loaded.pools == (Pool("10.1.0.0/16"), Pool("fd00::/48", 30))
    assert loaded.labels == {"c": "d", "e": "f"}
    assert loaded.etcd == Etcd(("a:1", "b:2"), ca=Path("/x"))


@pytest.mark.parametrize(
    ("text", "path", "hint"),
    [
        ("sise: 1", "sise", "did you mean size?"),
        ("etcd: {endpoint: []}", "etcd.endpoint", "did you mean etcd.endpoints?"),
        ("timeout_s: 1", "timeout_s", "did you mean etcd.timeout_s?"),
        ("pools: [{cidr: a, blok: 1}]", "pools[0].blok", "did you mean pools[0].block?"),
        ("qqqqqq: 1", "qqqqqq", "known are"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest(tmp_path: Path, text: str, path: str, hint: str) -> None:
    with pytest.raises(InvalidArgument, match="unknown key") as caught:
        load(tmp_path, text)
    assert caught.value.field == path
    assert hint in caught.value.fix


def test_an_unknown_variable_of_a_section_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match="did you mean FIBRIL_ETCD_TIMEOUT_S"):
        load(tmp_path, env={"FIBRIL_ETCD_TIMEOUT": "1"})


def test_an_unknown_flag_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument, match=r"did you mean etcd\.tls"):
        load(tmp_path, etcd__tsl="1")


@pytest.mark.parametrize(
    ("text", "path"),
    [
        ("size: true", "size"),
        ("size: 1.5", "size"),
        ("size: '1'", "size"),
        ("etcd: {timeout_s: soon}", "etcd.timeout_s"),
        ("etcd: {tls: 1}", "etcd.tls"),
        ("etcd: {endpoints: a}", "etcd.endpoints"),
        ("etcd: {endpoints: [1]}", "etcd.endpoints[0]"),
        ("etcd: 5", "etcd"),
        ("mode: fast", "mode"),
        ("level: middle", "level"),
        ("labels: {1: a}", "labels"),
        ("pools: [5]", "pools[0]"),
        ("pools: [{block: 24}]", "pools[0].cidr"),
    ],
)
def test_a_wrong_type_is_refused_by_path(tmp_path: Path, text: str, path: str) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load(tmp_path, text)
    assert caught.value.field == path


@pytest.mark.parametrize(
    ("key", "text"),
    [
        ("FIBRIL_SIZE", "many"),
        ("FIBRIL_ETCD_TLS", "maybe"),
        ("FIBRIL_LABELS", "a"),
        ("FIBRIL_POOLS", "10.0.0.0/8"),
    ],
)
def test_text_that_is_no_value_is_refused(tmp_path: Path, key: str, text: str) -> None:
    with pytest.raises(InvalidArgument):
        load(tmp_path, env={key: text})


def test_bounds_name_the_whole_path(tmp_path: Path) -> None:
    with pytest.raises(InvalidArgument) as caught:
        load(tmp_path, "pools: [{cidr: a}, {cidr: b, block: 31}]")
    assert (caught.value.field, caught.value.fix) == ("pools[1].block", "use 24")
    with pytest.raises(InvalidArgument) as caught:
        load(tmp_path, "first: {cidr: a, block: 31}")
    assert caught.value.field == "first.block"


def test_a_missing_file_is_not_found(tmp_path: Path) -> None:
    with pytest.raises(NotFound):
        config.load(Root, file=tmp_path / "none.yaml", env={})


@pytest.mark.parametrize("text", ["a: [", "- a", "just text"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidArgument, match="configuration file"):
        load(tmp_path, text)


def test_the_sample_uncommented_gives_the_defaults() -> None:
    text = config.sample(HostConfig)
    uncommented = "\n".join(
        line.replace("# ", "", 1)
        if line.strip().partition("# ")[2].partition(": ")[0].isidentifier()
        else line
        for line in text.splitlines()
    )
    tree = yaml.safe_load(uncommented)
    assert tree["rpc"]["max_message_bytes"] == 4 << 20
    assert tree["telemetry"]["otlp"] == ""
    assert "# largest request or answer, bytes" in text


def test_every_option_of_the_host_has_help() -> None:
    text = config.sample(HostConfig).splitlines()
    options = [
        i for i, line in enumerate(text) if line.strip().partition("# ")[2].partition(": ")[0].isidentifier()
    ]
    assert len(options) > 10
    assert all(text[index - 1].strip().startswith("# ") for index in options)
