"""The unix server behind the fibril-cni plugin: it carries out what container runtimes ask for.

One connection is one call. Request: `<bytes of variables> <bytes of configuration>` and a newline, the CNI_
variables as KEY=VALUE each ended by a NUL, the configuration as the runtime gave it. Answer: `<exit code>
<bytes>` and a newline, then what the plugin prints. Lengths tell a whole answer from one cut off by the
death of this process.

A call once begun is carried through even when its caller goes away: what it leaves is a whole endpoint or
none, and the runtime's DEL (or GC) finds the former. Order between calls for one container is the
endpoint manager's business. The socket admits root only, as CNI plugins run as root.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Protocol

from services.common.errors import FibrilError
from services.ipam.cni import spec
from services.ipam.cni.spec import CniError, Environment, NetConf
from services.ipam.endpoints.model import EndpointRecord, EndpointSpec

log = logging.getLogger(__name__)

# A request beyond this is refused unread: the variables, then the configuration.
MAX_VARIABLES = 1 << 20
MAX_CONFIG = 4 << 20
# A caller has this many seconds to send its request, and to take the answer.
TRANSFER_SECONDS = 10.0

_CODES: Mapping[str, int] = {
    "INVALID_ARGUMENT": spec.INVALID_CONFIG,
    "NOT_FOUND": spec.INVALID_CONFIG,
    "UNAVAILABLE": spec.TRY_AGAIN_LATER,
    "DEADLINE_EXCEEDED": spec.TRY_AGAIN_LATER,
    "ABORTED": spec.TRY_AGAIN_LATER,
    "RESOURCE_EXHAUSTED": spec.EXHAUSTED,
    "ALREADY_EXISTS": spec.ALREADY_EXISTS,
    "FAILED_PRECONDITION": spec.PRECONDITION,
}


class Endpoints(Protocol):
    """The part of EndpointManager that CNI needs."""

    async def create(self, wanted: EndpointSpec, /) -> EndpointRecord: ...

    async def delete(self, container_id: str, ifname: str = "") -> int: ...

    def get(self, container_id: str, ifname: str) -> EndpointRecord | None: ...

    def list(self) -> Sequence[EndpointRecord]: ...

    async def check(self, container_id: str, ifname: str) -> Sequence[str]: ...


class CniServer:
    """Serves one instance's CNI calls on `socket_path`.

    `unavailable` gives the reason why ADD cannot be served now, "" if it can; STATUS reports it.
    `timeout` bounds one call in seconds and must stay below what the plugin waits.
    """

    def __init__(
        self,
        manager: Endpoints,
        socket_path: Path,
        unavailable: Callable[[], str] = lambda: "",
        timeout: float = 30.0,
    ) -> None:
        self._manager = manager
        self._path = socket_path
        self._unavailable = unavailable
        self._timeout = timeout
        self._server: asyncio.Server | None = None
        self._calls: set[asyncio.Task[None]] = set()
        self._stopping = False

    async def start(self) -> None:
        """Listen. The socket takes the place of a dead process's in one step, so callers never find none."""
        temporary = self._path.with_name(f"{self._path.name}.{os.getpid()}")
        temporary.unlink(missing_ok=True)
        self._server = await asyncio.start_unix_server(self._accept, temporary, backlog=1024, limit=1 << 16)
        os.chmod(temporary, 0o600)
        os.rename(temporary, self._path)

    async def stop(self, grace: float = 10.0) -> None:
        """Refuse new calls, let those under way end within `grace` seconds, then cancel them (they undo)."""
        self._stopping = True
        if self._server is not None:
            self._server.close()
            self._path.unlink(missing_ok=True)
        if self._calls:
            _, late = await asyncio.wait(self._calls, timeout=grace)
            for call in late:
                call.cancel()
            await asyncio.gather(*late, return_exceptions=True)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        call = asyncio.current_task()
        assert call is not None
        self._calls.add(call)
        try:
            async with asyncio.timeout(TRANSFER_SECONDS):
                variables, config = await _read_request(reader)
            code, output = await self.answer(variables, config)
            writer.write(b"%d %d\n" % (code, len(output)) + output)
            async with asyncio.timeout(TRANSFER_SECONDS):
                await writer.drain()
        except (OSError, EOFError, ValueError, TimeoutError) as error:
            log.info("a CNI caller went away or sent no request", extra={"cause": repr(error)})
        except asyncio.CancelledError:
            pass  # from stop(): the caller sees a connection cut off and tries again
        finally:
            self._calls.discard(call)
            writer.close()

    async def answer(self, variables: Mapping[str, str], config: bytes) -> tuple[int, bytes]:
        """Carry out one call; gives exit code and output. Raises nothing but cancellation."""
        started = time.monotonic()
        version = spec.NEWEST
        try:
            decoded = spec.decode(config)
            version = spec.version_of(decoded)
            environment = spec.parse_environment(variables)
            if environment.command == "VERSION":
                return 0, spec.render_versions(version)
            conf = spec.parse_config(decoded, environment)
            if self._stopping:
                raise CniError(spec.TRY_AGAIN_LATER, "fibril's ipam service is stopping, try again later")
            async with asyncio.timeout(self._timeout):
                return 0, await self._carry_out(environment, conf)
        except CniError as error:
            failure = error
        except FibrilError as error:
            failure = CniError(_CODES.get(error.code_name, spec.INTERNAL), error.message, error.fix or "")
        except TimeoutError:
            failure = CniError(
                spec.TRY_AGAIN_LATER, f"not done within {self._timeout:g} s, try again later", "undone"
            )
        except Exception:
            log.exception("a CNI call failed", extra={"command": variables.get("CNI_COMMAND", "")})
            failure = CniError(
                spec.INTERNAL, "internal error", "the log of fibril's ipam service has the cause"
            )
        log.warning(
            "a CNI call is refused",
            extra={
                "command": variables.get("CNI_COMMAND", ""),
                "container": variables.get("CNI_CONTAINERID", ""),
                "code": failure.code,
                "cause": f"{failure.message}: {failure.details}",
                "ms": round((time.monotonic() - started) * 1000, 1),
            },
        )
        return 1, failure.render(version if version in spec.VERSIONS else spec.NEWEST)

    async def _carry_out(self, environment: Environment, conf: NetConf) -> bytes:
        if environment.command == "ADD":
            return await self._add(environment, conf)
        if environment.command == "DEL":
            await self._manager.delete(environment.container_id, environment.ifname)
        elif environment.command == "CHECK":
            await self._check(environment, conf)
        elif environment.command == "GC":
            await self._collect(conf)
        elif reason := self._unavailable():
            raise CniError(spec.NOT_AVAILABLE, "fibril cannot serve ADD now", reason)
        return b""

    async def _add(self, environment: Environment, conf: NetConf) -> bytes:
        if conf.mac:
            raise CniError(
                spec.UNSUPPORTED_FIELD, f"unsupported field 'mac' = {conf.mac}", "Fibril chooses MACs"
            )
        record = await self._manager.create(
            EndpointSpec(
                container_id=environment.container_id,
                ifname=environment.ifname,
                netns=environment.netns,
                pool=conf.pool,
                ipv4=conf.ipv4,
                ipv6=conf.ipv6,
                mtu=conf.mtu,
                pod=spec.pod_name(environment.args),
                labels={**conf.labels, spec.NETWORK_LABEL: conf.network},
                cgroup_path=conf.cgroup_path,
                ingress_qdisc=conf.ingress_qdisc,
            )
        )
        return spec.render_result(conf, _interface(record))

    async def _check(self, environment: Environment, conf: NetConf) -> None:
        record = self._manager.get(environment.container_id, environment.ifname)
        if record is None:
            raise CniError(
                spec.UNKNOWN_CONTAINER,
                "unknown container",
                f"no endpoint for {environment.container_id} {environment.ifname}",
            )
        found = spec.differences(conf, environment, _interface(record))
        found += await self._manager.check(environment.container_id, environment.ifname)
        if found:
            raise CniError(spec.DIFFERENT, "the interface differs from what ADD made", "; ".join(found))

    async def _collect(self, conf: NetConf) -> None:
        """Delete this network's endpoints that are not listed, going on past failures and naming them at
        the end.

        Endpoints younger than the call stay: a runtime that ADDs while it collects has not listed them.
        """
        began = time.time()
        failures = []
        for record in self._manager.list():
            # As ADD gave it: labels may have been replaced since.
            network = record.spec.labels.get(spec.NETWORK_LABEL)
            if network != conf.network or record.created_unix_seconds >= began:
                continue
            if spec.Attachment(record.container_id, record.ifname) in (conf.valid_attachments or ()):
                continue
            try:
                await self._manager.delete(record.container_id, record.ifname)
            except FibrilError as error:
                failures.append(f"{record.container_id} {record.ifname}: {error.message}")
        if failures:
            raise CniError(
                spec.INTERNAL, f"{len(failures)} attachments were not collected", "; ".join(failures)
            )


def _interface(record: EndpointRecord) -> spec.Interface:
    return spec.Interface(
        host_ifname=record.host_ifname,
        host_mac=record.host_mac,
        ifname=record.ifname,
        mac=record.mac,
        netns=record.netns,
        mtu=record.mtu,
        ipv4=record.ipv4,
        ipv6=record.ipv6,
        gateway4=record.ipv4_gateway,
        gateway6=record.ipv6_gateway,
    )


async def _read_request(reader: asyncio.StreamReader) -> tuple[dict[str, str], bytes]:
    """ValueError, EOFError: not a request."""
    sizes = (await reader.readline()).split()
    if len(sizes) != 2:
        raise ValueError("malformed head")
    variables_size, config_size = int(sizes[0]), int(sizes[1])
    if not (0 <= variables_size <= MAX_VARIABLES and 0 <= config_size <= MAX_CONFIG):
        raise ValueError("too large")
    packed = await reader.readexactly(variables_size)
    variables = {}
    for pair in packed.split(b"\0"):
        name, _, value = pair.partition(b"=")
        variables[name.decode(errors="replace")] = value.decode(errors="replace")
    return variables, await reader.readexactly(config_size)
