"""TCP: mutual TLS or nothing, and the role in the certificate decides."""

from __future__ import annotations

import datetime
import itertools
import os
from dataclasses import dataclass, replace
from pathlib import Path

import grpc
import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from grpc_health.v1 import health_pb2, health_pb2_grpc

from fibril.ipam.v1.ipam_pb2 import AllocateRequest, GetPoolRequest, WatchAllocationsRequest
from fibril.ipam.v1.ipam_pb2_grpc import IpamServiceStub
from services.common.errors import FailedPrecondition, InvalidArgument, PermissionDenied
from services.common.rpc import auth
from services.common.rpc.auth import Role
from services.common.rpc.client import TlsFiles, channel
from services.common.rpc.server import RpcConfig
from services.common.rpc.status import from_rpc_error
from tests.unit.common.rig import Start, failure

NOW = datetime.datetime.now(datetime.UTC)


@dataclass
class Authority:
    """Signs certificates and writes them, each to files of their own."""

    directory: Path

    def __post_init__(self) -> None:
        self._numbers = itertools.count()
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"authority {self.directory.name}")])
        self.directory.mkdir()
        self._ca = self.directory / "ca.pem"
        certificate = (
            self._builder(self._name, self._key)
            .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
            .sign(self._key, hashes.SHA256())
        )
        self._ca.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))

    def _builder(self, name: x509.Name, key: ec.EllipticCurvePrivateKey) -> x509.CertificateBuilder:
        return (
            x509.CertificateBuilder()
            .subject_name(name)
            .issuer_name(self._name)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(NOW - datetime.timedelta(hours=1))
            .not_valid_after(NOW + datetime.timedelta(hours=1))
        )

    def issue(
        self, *, units: tuple[str, ...] = (), uris: tuple[str, ...] = (), common_name: str = "fibril"
    ) -> TlsFiles:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name(
            [x509.NameAttribute(NameOID.COMMON_NAME, common_name)]
            + [x509.NameAttribute(NameOID.ORGANIZATIONAL_UNIT_NAME, unit) for unit in units]
        )
        names = [x509.DNSName("fibril"), *(x509.UniformResourceIdentifier(uri) for uri in uris)]
        certificate = (
            self._builder(subject, key)
            .add_extension(x509.SubjectAlternativeName(names), critical=False)
            .sign(self._key, hashes.SHA256())
        )
        number = next(self._numbers)
        files = TlsFiles(self._ca, self.directory / f"{number}.pem", self.directory / f"{number}.key")
        files.cert.write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
        files.key.write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM,
                serialization.PrivateFormat.PKCS8,
                serialization.NoEncryption(),
            )
        )
        return files


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path / "ours")


def tcp(files: TlsFiles) -> RpcConfig:
    return RpcConfig(
        tcp="127.0.0.1:0", tls_ca=str(files.ca), tls_cert=str(files.cert), tls_key=str(files.key)
    )


async def test_a_writer_may_do_everything(start: Start, authority: Authority) -> None:
    rig = await start(tcp(authority.issue()))
    async with rig.stub(authority.issue(units=("fibril-writer",))) as stub:
        await stub.GetPool(GetPoolRequest())
        await stub.Allocate(AllocateRequest())


async def test_a_reader_may_look_and_watch_but_not_change(start: Start, authority: Authority) -> None:
    rig = await start(tcp(authority.issue()))
    rig.servicer.messages = 1
    async with rig.stub(authority.issue(units=("fibril-reader",))) as stub:
        await stub.GetPool(GetPoolRequest())
        assert (await stub.WatchAllocations(WatchAllocationsRequest()).read()).revision == 0
        error = from_rpc_error(await failure(stub.Allocate(AllocateRequest())))
    assert isinstance(error, PermissionDenied)
    assert "has role reader, /fibril.ipam.v1.IpamService/Allocate needs writer" in error.message
    assert rig.servicer.calls == 1


async def test_a_certificate_without_role_may_do_nothing(start: Start, authority: Authority) -> None:
    rig = await start(tcp(authority.issue()))
    files = authority.issue(units=("accounting",), uris=("spiffe://x/fibril/writer/not",))
    async with rig.stub(files) as stub:
        assert isinstance(from_rpc_error(await failure(stub.GetPool(GetPoolRequest()))), PermissionDenied)
        watch = stub.WatchAllocations(WatchAllocationsRequest())
        assert isinstance(from_rpc_error(await failure(watch.read())), PermissionDenied)
    async with channel(rig.target, tls=files, server_name="fibril") as link:
        health = health_pb2_grpc.HealthStub(link).Check(health_pb2.HealthCheckRequest())
        assert isinstance(from_rpc_error(await failure(health)), PermissionDenied)
    assert rig.servicer.calls == 0


async def test_a_uri_names_the_role_as_well(start: Start, authority: Authority) -> None:
    rig = await start(tcp(authority.issue()))
    async with rig.stub(authority.issue(uris=("spiffe://prod.example/fibril/writer",))) as stub:
        await stub.Allocate(AllocateRequest())


@pytest.mark.parametrize(
    "name",
    [
        "x,OU=fibril-writer",
        "x/OU=fibril-writer",
        "x+OU=fibril-writer",
        'x\\",OU=fibril-writer',
        "x\nOU=fibril-writer",
    ],
)
async def test_a_name_that_looks_like_a_role_gives_none(
    start: Start, authority: Authority, name: str
) -> None:
    rig = await start(tcp(authority.issue()))
    async with rig.stub(authority.issue(units=("fibril-reader",), common_name=name)) as stub:
        await stub.GetPool(GetPoolRequest())
        assert isinstance(from_rpc_error(await failure(stub.Allocate(AllocateRequest()))), PermissionDenied)


async def test_a_foreign_authority_or_none_is_not_let_in(
    start: Start, authority: Authority, tmp_path: Path
) -> None:
    rig = await start(tcp(authority.issue()))
    foreign = Authority(tmp_path / "theirs").issue(units=("fibril-writer",))
    async with rig.stub(replace(foreign, ca=authority.issue().ca)) as stub:
        assert (await failure(stub.GetPool(GetPoolRequest()))).code() is grpc.StatusCode.UNAVAILABLE
    async with grpc.aio.insecure_channel(rig.target) as link:
        plain = IpamServiceStub(link).GetPool(GetPoolRequest())
        assert (await failure(plain)).code() is grpc.StatusCode.UNAVAILABLE
    assert rig.servicer.calls == 0


async def test_a_rotated_certificate_is_used_without_a_restart(
    start: Start, authority: Authority, tmp_path: Path
) -> None:
    served = authority.issue()
    rig = await start(tcp(served))
    client = authority.issue(units=("fibril-writer",))
    async with rig.stub(client) as stub:
        await stub.GetPool(GetPoolRequest())
    successor = Authority(tmp_path / "next")
    fresh = successor.issue()
    for new, old in ((fresh.ca, served.ca), (fresh.cert, served.cert), (fresh.key, served.key)):
        os.replace(new, old)
    successor_client = successor.issue(units=("fibril-writer",))
    async with rig.stub(replace(successor_client, ca=served.ca)) as stub:
        await stub.GetPool(GetPoolRequest())
    async with rig.stub(client) as stub:
        await failure(stub.GetPool(GetPoolRequest()))


async def test_damaged_files_leave_the_old_certificate_in_use(start: Start, authority: Authority) -> None:
    served = authority.issue()
    rig = await start(tcp(served))
    client = replace(authority.issue(units=("fibril-writer",)), ca=authority.directory / "copy.pem")
    client.ca.write_bytes(served.ca.read_bytes())
    served.cert.unlink()
    async with rig.stub(client) as stub:
        await stub.GetPool(GetPoolRequest())


async def test_a_missing_file_is_named(start: Start, authority: Authority) -> None:
    files = replace(authority.issue(), key=authority.directory / "absent.key")
    with pytest.raises(FailedPrecondition, match=r"absent\.key"):
        await start(tcp(files))
    with pytest.raises(FailedPrecondition, match=r"absent\.key"):
        channel("127.0.0.1:1", tls=files)


async def test_a_taken_port_is_refused(start: Start, authority: Authority) -> None:
    rig = await start(tcp(authority.issue()))
    with pytest.raises(FailedPrecondition, match="cannot listen"):
        await start(replace(tcp(authority.issue()), tcp=rig.target))


def test_there_is_no_plain_tcp() -> None:
    with pytest.raises(InvalidArgument):
        channel("127.0.0.1:1")


@pytest.mark.parametrize(
    ("subject", "names", "role"),
    [
        ((), (), Role.NONE),
        ((b"CN=x,OU=fibril-reader,O=y",), (), Role.READER),
        ((b"OU=fibril-reader+OU=fibril-writer",), (), Role.WRITER),
        ((b"CN=OU=fibril-writerly",), (), Role.NONE),
        ((b"CN=fibril-writer",), (), Role.NONE),
        ((b"OU=not-fibril-writer",), (), Role.NONE),
        ((rb"CN=x\,OU=fibril-writer",), (), Role.NONE),
        ((rb"CN=x\\,OU=fibril-writer",), (), Role.WRITER),
        ((), (b"spiffe://a/fibril/reader", b"host"), Role.READER),
        ((), (b"spiffe://a/fibril/writer?x", b"fibril/writer"), Role.NONE),
    ],
)
def test_roles_are_read_exactly(subject: tuple[bytes, ...], names: tuple[bytes, ...], role: Role) -> None:
    context = {"x509_subject": subject, "x509_subject_alternative_name": names}
    assert auth.role_of(context) is role


@pytest.mark.parametrize("name", ["GetPool", "ListBlocks", "WatchEvents", "CheckEndpoint", "Check", "Watch"])
def test_looking_needs_a_reader(name: str) -> None:
    assert auth.required_role(f"/a.B/{name}") is Role.READER


@pytest.mark.parametrize("name", ["PutPool", "Allocate", "Release", "CreateEndpoint", "Forget", "Unlist"])
def test_changing_needs_a_writer(name: str) -> None:
    assert auth.required_role(f"/a.B/{name}") is Role.WRITER
