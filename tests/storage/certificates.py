"""Certificates for tests of TLS, made on the spot."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from ipaddress import ip_address
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from lmcache.testing.redis import TLSFiles


class Certificates:
    """A certificate authority that made one certificate for a server on 127.0.0.1 and one for a client."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._key = ec.generate_private_key(ec.SECP256R1())
        self._name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, folder.name)])
        now = datetime.now(UTC)
        base = (
            x509.CertificateBuilder().not_valid_before(now - timedelta(days=1)).not_valid_after(now + timedelta(days=1))
        )
        self._base = base.issuer_name(self._name)
        authority = self._base.subject_name(self._name).public_key(self._key.public_key())
        authority = authority.serial_number(x509.random_serial_number())
        authority = authority.add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        usage = x509.KeyUsage(False, False, False, False, False, True, True, False, False)
        authority = authority.add_extension(usage, critical=True)
        authority = authority.add_extension(
            x509.SubjectKeyIdentifier.from_public_key(self._key.public_key()), critical=False
        )
        self.ca = folder / "ca.pem"
        self.ca.write_bytes(authority.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        self.server = TLSFiles(self.ca, *self._issue("server", "127.0.0.1"))
        self.client = TLSFiles(self.ca, *self._issue("client", "127.0.0.9"))

    def _issue(self, name: str, address: str) -> tuple[Path, Path]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        certificate = self._base.subject_name(subject).public_key(key.public_key())
        certificate = certificate.serial_number(x509.random_serial_number())
        names = x509.SubjectAlternativeName([x509.IPAddress(ip_address(address))])
        certificate = certificate.add_extension(names, critical=False)
        authority = x509.AuthorityKeyIdentifier.from_issuer_public_key(self._key.public_key())
        certificate = certificate.add_extension(authority, critical=False)
        files = self.folder / f"{name}.pem", self.folder / f"{name}.key"
        files[0].write_bytes(certificate.sign(self._key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM))
        clear = serialization.NoEncryption()
        files[1].write_bytes(key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, clear))
        return files
