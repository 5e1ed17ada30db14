"""FibrilError to gRPC status and back: the one place that knows how errors travel.

The status message is the whole sentence, so that any client shows it. Beside it travels google.rpc.Status
with an ErrorInfo (domain "fibril", reason = name of the code, metadata: message, field, fix) and, when a
field is to blame, a BadRequest, as clients in other languages expect them.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from services.common.errors import FibrilError, by_code

if TYPE_CHECKING:
    import grpc

DOMAIN = "fibril"
DETAILS_KEY = "grpc-status-details-bin"
# A receiver refuses more than 8 KiB of trailing metadata. On the wire the sentence is percent-encoded (up to three times
# its bytes) and the details, which hold message and field twice, are base64: with these limits, in bytes of UTF-8, it
# always fits.
_MAX_SENTENCE = 1000
_MAX_MESSAGE = 800
_MAX_FIX = 300
_MAX_FIELD = 200


def encode(error: FibrilError) -> tuple[grpc.StatusCode, str, tuple[tuple[str, bytes], ...]]:
    """Status code, message and trailing metadata for `context.abort`."""
    # Imported on the first error only: most processes of the command line never see one.
    from google.protobuf import any_pb2
    from google.rpc import error_details_pb2, status_pb2

    message = _shorten(error.message, _MAX_MESSAGE)
    info = error_details_pb2.ErrorInfo(reason=error.code_name, domain=DOMAIN, metadata={"message": message})
    if error.fix:
        info.metadata["fix"] = _shorten(error.fix, _MAX_FIX)
    packed = any_pb2.Any()
    packed.Pack(info)
    details = [packed]
    if error.field:
        info.metadata["field"] = _shorten(error.field, _MAX_FIELD)
        packed.Pack(info)
        violation = error_details_pb2.BadRequest.FieldViolation(
            field=_shorten(error.field, _MAX_FIELD), description=message
        )
        request = any_pb2.Any()
        request.Pack(error_details_pb2.BadRequest(field_violations=[violation]))
        details.append(request)
    text = _shorten(str(error), _MAX_SENTENCE)
    status = status_pb2.Status(code=error.code.value[0], message=text, details=details)
    return error.code, text, ((DETAILS_KEY, status.SerializeToString()),)


def from_rpc_error(error: grpc.aio.AioRpcError) -> FibrilError:
    """The error a server raised, from the status a client has received. One of a server that is not Fibril's keeps its code
    and message.
    """
    from google.protobuf.message import DecodeError
    from google.rpc import error_details_pb2, status_pb2

    cls = by_code(error.code().name)
    for key, value in error.trailing_metadata() or ():
        if key != DETAILS_KEY:
            continue
        try:
            status = status_pb2.Status.FromString(value)
            for packed in status.details:
                info = error_details_pb2.ErrorInfo()
                if packed.Unpack(info) and info.domain == DOMAIN:
                    data = info.metadata
                    return cls(data["message"], field=data.get("field", ""), fix=data.get("fix", ""))
        except DecodeError:
            break
    return cls(error.details() or error.code().name.lower().replace("_", " "))


def _shorten(text: str, limit: int) -> str:
    data = text.encode(errors="replace")
    return text if len(data) <= limit else data[: limit - 3].decode(errors="ignore") + "…"
