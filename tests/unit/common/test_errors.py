"""Errors keep their message, field and fix through a status and through pickling."""

from __future__ import annotations

import base64
import pickle
import subprocess
import sys
from typing import Any
from urllib.parse import quote

import grpc
import pytest

from services.common import errors
from services.common.rpc import status

ALL = [cls for cls in vars(errors).values() if isinstance(cls, type) and issubclass(cls, errors.FibrilError)]


def rpc_error(code: grpc.StatusCode, text: str, trailing: tuple[Any, ...] = ()) -> grpc.aio.AioRpcError:
    return grpc.aio.AioRpcError(code, grpc.aio.Metadata(), grpc.aio.Metadata(*trailing), details=text)


@pytest.mark.parametrize("cls", ALL)
@pytest.mark.parametrize("field", ["", "pools[0].cidr"])
@pytest.mark.parametrize("fix", ["", "grow the pool"])
def test_an_error_survives_the_way_through_a_status(
    cls: type[errors.FibrilError], field: str, fix: str
) -> None:
    code, text, trailing = status.encode(cls("pool default is full: 254 of 254", field=field, fix=fix))
    assert code is grpc.StatusCode[cls.code_name]
    back = status.from_rpc_error(rpc_error(code, text, trailing))
    assert back.code_name == cls.code_name
    assert (back.message, back.field, back.fix) == ("pool default is full: 254 of 254", field, fix)
    assert str(back) == text


def test_the_text_names_field_and_fix() -> None:
    assert str(errors.InvalidArgument("prefix 40 is too long", field="cidr", fix="use at most 32")) == (
        "prefix 40 is too long (field: cidr); use at most 32"
    )
    assert str(errors.NotFound("pool x does not exist")) == "pool x does not exist"


def test_other_clients_find_a_bad_request_detail() -> None:
    from google.rpc import error_details_pb2, status_pb2

    _, _, ((_, blob),) = status.encode(errors.InvalidArgument("bad", field="cidr"))
    found = error_details_pb2.BadRequest()
    assert any(detail.Unpack(found) for detail in status_pb2.Status.FromString(blob).details)
    assert [violation.field for violation in found.field_violations] == ["cidr"]


@pytest.mark.parametrize("trailing", [(), ((status.DETAILS_KEY, b"\xff\xff not protobuf"),)])
def test_a_foreign_status_keeps_code_and_text(trailing: tuple[Any, ...]) -> None:
    back = status.from_rpc_error(rpc_error(grpc.StatusCode.UNAVAILABLE, "connection refused", trailing))
    assert isinstance(back, errors.Unavailable)
    assert back.message == "connection refused"


def test_an_unknown_code_is_internal() -> None:
    assert isinstance(status.from_rpc_error(rpc_error(grpc.StatusCode.DATA_LOSS, "?")), errors.Internal)


@pytest.mark.parametrize("letter", ["x", "ü", "\N{SPIDER}"])
def test_a_huge_message_stays_within_the_metadata_limit(letter: str) -> None:
    _, text, ((_, blob),) = status.encode(
        errors.Internal(letter * 9999, field=letter * 9999, fix=letter * 9999)
    )
    assert len(quote(text)) + len(base64.b64encode(blob)) < 8192


def test_an_error_survives_pickling() -> None:
    error = pickle.loads(pickle.dumps(errors.Aborted("lost a race", field="pool", fix="retry")))
    assert (type(error), str(error)) == (errors.Aborted, "lost a race (field: pool); retry")


def test_errors_and_names_import_neither_grpc_nor_protobuf() -> None:
    program = (
        "import services.common.errors, services.common.instance, services.common.log, sys;"
        "print([m for m in ('grpc', 'google.protobuf', 'yaml', 'opentelemetry') if m in sys.modules])"
    )
    assert (
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
        == "[]\n"
    )
