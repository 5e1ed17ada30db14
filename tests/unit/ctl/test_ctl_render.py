"""Rendering: every message field under its contract's name, tables for people."""

from __future__ import annotations

import io
import json
import time

import yaml

from fibril.endpoint.v1 import endpoint_pb2
from fibril.ipam.v1 import ipam_pb2
from services.ctl import render


def endpoint() -> endpoint_pb2.Endpoint:
    return endpoint_pb2.Endpoint(
        id=7,
        pod="shop/cart-0",
        netns_cookie=2**63 + 1,
        state=endpoint_pb2.ENDPOINT_STATE_READY,
        labels={"b": "2", "a": "1"},
    )


def test_record_has_every_field_with_numbers_as_numbers_and_enums_by_name() -> None:
    record = render.to_record(endpoint())
    assert record["netns_cookie"] == 2**63 + 1
    assert record["state"] == "ENDPOINT_STATE_READY"
    assert record["labels"] == {"a": "1", "b": "2"}
    assert record["ipv4"] == ""
    assert set(record) == {f.name for f in endpoint_pb2.Endpoint.DESCRIPTOR.fields}


def test_unset_submessages_are_left_out_and_repeated_ones_converted() -> None:
    assert "pool" not in render.to_record(ipam_pb2.PoolStatus())
    status = ipam_pb2.PoolStatus(usage=[ipam_pb2.Usage(family=ipam_pb2.FAMILY_IPV6, total=3)])
    assert render.to_record(status)["usage"][0]["family"] == "FAMILY_IPV6"


def test_an_enum_number_of_a_newer_server_stays_a_number() -> None:
    message = endpoint_pb2.Endpoint()
    message.MergeFromString(bytes([19 << 3 & 0x7F | 0x80, 19 << 3 >> 7, 99]))
    assert render.to_record(message)["state"] == 99


def test_table_aligns_numbers_right_and_words_left() -> None:
    cols = render.columns("name", "id", ("STATE", lambda r: render.short(r["state"], "S_")))
    text = render.table(
        [{"name": "a", "id": 1, "state": "S_OK"}, {"name": "long", "id": 100, "state": "S_NOT_OK"}], cols
    )
    assert text.splitlines() == ["NAME   ID  STATE", "a       1  ok", "long  100  not-ok"]


def test_json_and_yaml_hold_the_same() -> None:
    records = [render.to_record(endpoint())]
    assert json.loads(render.render(records, "json", [])) == records
    assert yaml.safe_load(render.render(records, "yaml", [])) == records
    assert json.loads(render.render(records[0], "json", [])) == records[0]


def test_an_empty_table_says_so_and_empty_json_is_a_list() -> None:
    assert render.render([], "table", render.columns("id"), "no endpoints") == "no endpoints"
    assert render.render([], "json", render.columns("id"), "no endpoints") == "[]"


def test_age_uses_one_unit() -> None:
    assert [render.age(1000, now=1000 + s) for s in (0, 119, 120, 7199, 7200, 200_000)] == [
        "0s", "119s", "2m", "119m", "2h", "2d",
    ]  # fmt: skip
    assert render.age(0) == ""


def test_stream_prints_headings_once_and_keeps_lines_aligned() -> None:
    out = io.StringIO()
    stream = render.Stream(out, "table", render.columns("a", "b"), (3, 3))
    stream.put({"a": "longer", "b": 1})
    stream.put({"a": "x", "b": 2})
    assert out.getvalue().splitlines() == ["A    B", "longer  1", "x       2"]


def test_stream_of_json_is_one_object_a_line() -> None:
    out = io.StringIO()
    stream = render.Stream(out, "json", [])
    stream.put({"a": 1})
    stream.put({"a": 2})
    assert [json.loads(line) for line in out.getvalue().splitlines()] == [{"a": 1}, {"a": 2}]


def test_points_in_time_are_read_as_such() -> None:
    moment = time.mktime((2026, 11, 30, 13, 5, 9, 0, 0, -1))
    text = render.details({"id": 7, "created_unix_seconds": moment, "expires_unix_seconds": 0.0}, "table")
    assert text == "id       7\ncreated  2026-11-30 13:05:09\nexpires  -"
