"""The errors Fibril raises on purpose. Each names the object, the operation and, in `fix`, the next step.

Domain code raises these; `services.common.rpc.status` turns them into a gRPC status and back. Any other exception
is a bug and reaches a caller as INTERNAL. This module imports neither grpc nor protobuf: the BPF loader and command
line use it where start-up time counts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

if TYPE_CHECKING:
    import grpc


class FibrilError(Exception):
    """An expected failure.

    message: one sentence naming the object and the operation.
    field: path of the offending request or configuration field ("pools[0].cidr"), "" when it is none of them.
    fix: what to do next, as an imperative clause, "" when there is nothing to add.
    """

    code_name: ClassVar[str] = "INTERNAL"

    def __init__(self, message: str, *, field: str = "", fix: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.field = field
        self.fix = fix

    @property
    def code(self) -> grpc.StatusCode:
        """The gRPC status this error becomes."""
        import grpc

        return grpc.StatusCode[self.code_name]

    def __str__(self) -> str:
        where = f" (field: {self.field})" if self.field else ""
        then = f"; {self.fix}" if self.fix else ""
        return f"{self.message}{where}{then}"

    def __reduce__(self) -> tuple[object, ...]:
        # Keyword-only arguments do not survive Exception's own pickling (process pools, the loader's
        # answers).
        return _rebuild, (type(self), self.message, self.field, self.fix)


class InvalidArgument(FibrilError):
    """The request is wrong whatever the state of the system; `field` names the part that is."""

    code_name = "INVALID_ARGUMENT"


class NotFound(FibrilError):
    """The named object does not exist."""

    code_name = "NOT_FOUND"


class AlreadyExists(FibrilError):
    """The object exists and differs from what was asked for."""

    code_name = "ALREADY_EXISTS"


class FailedPrecondition(FibrilError):
    """The system must be changed first; retrying alone does not help."""

    code_name = "FAILED_PRECONDITION"


class ResourceExhausted(FibrilError):
    """Something bounded is full; the message has the count and the limit."""

    code_name = "RESOURCE_EXHAUSTED"


class Unavailable(FibrilError):
    """A dependency cannot be reached now; retrying with back-off may help."""

    code_name = "UNAVAILABLE"


class PermissionDenied(FibrilError):
    """The caller, or this process, may not do it."""

    code_name = "PERMISSION_DENIED"


class Unauthenticated(FibrilError):
    """The caller has not proved who it is."""

    code_name = "UNAUTHENTICATED"


class DeadlineExceeded(FibrilError):
    """It took longer than allowed; whether it happened is unknown."""

    code_name = "DEADLINE_EXCEEDED"


class Aborted(FibrilError):
    """Lost a race with another change; read again and retry."""

    code_name = "ABORTED"


class Cancelled(FibrilError):
    """The caller gave up."""

    code_name = "CANCELLED"


class Unimplemented(FibrilError):
    """The server does not have this operation."""

    code_name = "UNIMPLEMENTED"


class Internal(FibrilError):
    """A bug or a broken invariant; details are in the log of the process."""

    code_name = "INTERNAL"


_BY_NAME: dict[str, type[FibrilError]] = {
    cls.code_name: cls
    for cls in (
        InvalidArgument, NotFound, AlreadyExists, FailedPrecondition, ResourceExhausted, Unavailable,
        PermissionDenied, Unauthenticated, DeadlineExceeded, Aborted, Cancelled, Unimplemented, Internal,
    )
}  # fmt: skip
# Codes Fibril never sends itself but a proxy or another server may.
_BY_NAME["OUT_OF_RANGE"] = InvalidArgument


def by_code(name: str) -> type[FibrilError]:
    """The error class for a status code's name ("NOT_FOUND"); `Internal` for unknown ones."""
    return _BY_NAME.get(name, Internal)


def _rebuild(cls: type[FibrilError], message: str, field: str, fix: str) -> FibrilError:
    return cls(message, field=field, fix=fix)
