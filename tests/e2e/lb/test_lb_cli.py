"""What people type: `fibril service`, `backend`, `lb` against a real node."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

from tests.e2e.modes.modelab import ModeLab, lab, wait_for

NODE = "c1n1"


@pytest.fixture(scope="module")
def landscape() -> Iterator[ModeLab]:
    if os.geteuid() != 0:
        pytest.skip("needs root")
    with lab("--nodes", "1", "--pods", "1") as made:
        yield made


def manifest(*addresses: str, slice_name: str = "web-a") -> list[dict[str, object]]:
    service = {
        "apiVersion": "v1", "kind": "Service", "metadata": {"name": "web", "namespace": "shop"},
        "spec": {"clusterIP": "10.96.7.1", "ports": [{"name": "http", "port": 80, "nodePort": 30707}]},
    }  # fmt: skip
    endpoints = {
        "apiVersion": "discovery.k8s.io/v1", "kind": "EndpointSlice", "addressType": "IPv4",
        "metadata": {"name": slice_name, "namespace": "shop", "labels": {"kubernetes.io/service-name": "web"}},
        "ports": [{"name": "http", "port": 8080}],
        "endpoints": [{"addresses": [address]} for address in addresses],
    }  # fmt: skip
    return [service, endpoints]


def test_kubernetes_objects_are_applied_as_they_are(landscape: ModeLab, tmp_path: Path) -> None:
    def run(*words: str, code: int = 0) -> str:
        done = landscape.command("-i", landscape.instance(NODE).name, *words, code=code)
        return done.stdout if code == 0 else done.stderr

    def results(*words: str) -> dict[str, str]:
        return {each["name"]: each["result"] for each in landscape.json(NODE, *words)}

    file = tmp_path / "shop.yaml"
    file.write_text(yaml.safe_dump_all(manifest("10.1.0.1", "10.1.0.2")))
    assert results("service", "apply", "--dry-run", "-f", str(file)) == {"shop/web:http": "would be created"}
    assert results("service", "apply", "-f", str(file)) == {"shop/web:http": "created"}
    wait_for(
        lambda: landscape.json(NODE, "service", "get", "shop/web:http")["status"]["programmed"], "the service"
    )
    assert results("service", "apply", "-f", str(file)) == {"shop/web:http": "unchanged"}
    # A slice alone, and another beside it.
    file.write_text(yaml.safe_dump(manifest("10.1.0.2", "10.1.0.3")[1]))
    assert results("service", "apply", "-f", str(file)) == {"shop/web:http": "changed"}
    file.write_text(yaml.safe_dump(manifest("10.1.0.9", slice_name="web-b")[1]))
    results("service", "apply", "-f", str(file))
    wait_for(
        lambda: (
            {b["address"] for b in landscape.json(NODE, "backend", "ls", "shop/web:http")}
            == {"10.1.0.2", "10.1.0.3", "10.1.0.9"}
        ),
        "both slices' backends",
    )
    run("backend", "drain", "10.1.0.9:8080")
    run("backend", "add", "shop/web:http", "10.1.0.4:8080=3", "--zone", "z1")
    run("backend", "rm", "shop/web:http", "10.1.0.2:8080")

    def states() -> dict[str, str]:
        return {b["address"]: b["state"] for b in landscape.json(NODE, "backend", "ls", "shop/web:http")}

    wait_for(
        lambda: len(states()) == 3 and states()["10.1.0.9"] == "BACKEND_STATE_TERMINATING", "the changes"
    )
    assert "shop/web:http" in run("service", "ls")
    assert "*:30707/tcp" in run("service", "ls", "shop/")
    trace = landscape.json(NODE, "service", "trace", "203.0.113.9:4444", "172.30.1.1:30707")
    assert trace["service"] == "shop/web:http" and trace["backend"]["address"] in ("10.1.0.3", "10.1.0.4")
    assert trace["translation"] == "snat"
    possible = run("service", "trace", landscape.pod(NODE, "p1")["ipv4"], "172.30.1.1:30707")
    assert "it may be 10.1.0.3:" in possible and "it may be 10.1.0.4:" in possible
    assert run("service", "trace", "p1", "172.30.1.1:30707") == possible
    assert "there is no endpoint 'p9'" in run("service", "trace", "p9:4444", "172.30.1.1:30707", code=1)
    assert "is no frontend" in run("service", "trace", "203.0.113.9", "10.96.7.1:81")
    usage = landscape.json(NODE, "lb", "usage")
    assert next(each for each in usage["tables"] if each["name"] == "services")["used"] == 1
    # What cannot be, with the remedy.
    assert "belongs to service shop/web:http" in run("service", "add", "b", "--vip", "10.96.7.1:80", code=1)
    file.write_text(
        json.dumps({**manifest()[0], "spec": {"clusterIP": "10.96.7.1", "ports": [{"port": 99999999}]}})
    )
    assert "documents[0].spec.ports[0].port" in run("service", "apply", "-f", str(file), code=1)
    # One that is refused for another's sake is named, and the others are written.
    renamed = manifest("10.1.0.3")
    renamed[0]["spec"] = {"clusterIP": "10.96.7.1", "ports": [{"name": "web", "port": 80}]}
    renamed[1]["ports"] = [{"name": "web", "port": 8080}]
    other = {**manifest()[0], "metadata": {"name": "other", "namespace": "shop"}}
    other["spec"] = {"clusterIP": "10.96.7.1", "ports": [{"name": "http", "port": 80}]}
    file.write_text(yaml.safe_dump_all([*renamed, other]))
    assert results("service", "apply", "--dry-run", "-f", str(file)) == {
        "shop/web:http": "would be removed", "shop/web:web": "would be created", "shop/other:http": "would be created",
    }  # fmt: skip
    told = run("service", "apply", "-f", str(file), code=1)
    assert "belongs to service shop/" in told and ("shop/other:http: " in told or "shop/web:web: " in told)
    assert {each["name"] for each in landscape.json(NODE, "service", "ls")} in ({"shop/web:web"}, {"shop/other:http"})
    file.write_text(yaml.safe_dump_all([*manifest("10.1.0.3"), {**other, "spec": {"clusterIP": "x", "ports": [{"port": 80}]}}]))
    assert "shop/other:80: 'x' is no address" in run("service", "apply", "-f", str(file), code=1)
    assert len(landscape.json(NODE, "service", "ls")) == 1
    for each in landscape.json(NODE, "service", "ls"):
        run("service", "rm", each["name"])
    file.write_text(yaml.safe_dump_all(manifest("10.1.0.3")))
    results("service", "apply", "-f", str(file))
    assert "cannot read" in run("service", "apply", "-f", str(tmp_path / "none"), code=1)
    assert "there is no service" in run("service", "get", "nope", code=1)
    assert "there is 'shop/web:http'" in run("service", "get", "shop/web", code=1)
    assert "there is 'shop/web:http'" in run("backend", "add", "shop/web", "10.1.0.4:8080", code=1)
    assert json.loads(run("service", "get", "shop/web:http", "-o", "json"))["name"] == "shop/web:http"
    lines = [line.split() for line in run("service", "get", "shop/web:http").splitlines()]
    assert ["algorithm", "maglev"] in lines and not any("UNSPECIFIED" in word for line in lines for word in line)
    assert [line[2:4] for line in lines if line[:1] == ["shop/web:http"]] == [["1", "active"]]
    run("service", "rm", "shop/web:http")
    wait_for(lambda: landscape.json(NODE, "service", "ls") == [], "nothing")
