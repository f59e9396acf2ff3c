"""Ed25519 signatures of manifests (RFC 8032) by a plain key, offline.

Keys are PEM files as `openssl genpkey -algorithm ed25519` and `openssl pkey -pubout` write them. The public key that a
bundle carries says only that the signature is whole; whose it is, the verifier's own copy of the key says.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from fusepress.pipeline.bundling.manifest import SIGNATURE_JSON, read_limited
from fusepress.pipeline.errors import StoreError, UsageError
from fusepress.pipeline.evidence import Strict

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

PASSWORD_VARIABLE = "FUSEPRESS_KEY_PASSWORD"  # noqa: S105  the name of a variable
DOMAIN = b"fusepress bundle manifest, schema 1\n"  # a signature of anything else is none of a manifest


class Signature(Strict):
    """signature.json: base64 of the raw public key and of the signature over the manifest's bytes."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    algorithm: Literal["ed25519"] = "ed25519"
    public_key: str
    signature: str

    def to_bytes(self) -> bytes:
        """The one form in which it is accepted."""
        return (json.dumps(self.model_dump(mode="json", by_alias=True), indent=1, sort_keys=True) + "\n").encode()


def load_private_key(path: Path) -> Ed25519PrivateKey:
    """Read a private key; one with a password takes it from FUSEPRESS_KEY_PASSWORD.

    Raises:
        UsageError: it is none, or of another algorithm.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
    from cryptography.hazmat.primitives.serialization import load_pem_private_key

    password = os.environ.get(PASSWORD_VARIABLE)
    try:
        key = load_pem_private_key(path.read_bytes(), password.encode() if password else None)
    except (OSError, ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"expected an Ed25519 private key in PEM; got {_first(error)} at {path}; make one with "
            f"`openssl genpkey -algorithm ed25519`, and give its password in {PASSWORD_VARIABLE}"
        ) from error
    if not isinstance(key, Ed25519PrivateKey):
        raise UsageError(f"expected an Ed25519 private key; got {type(key).__name__} at {path}; name another key")
    return key


def load_public_key(path: Path) -> Ed25519PublicKey:
    """Read a public key.

    Raises:
        UsageError: it is none, or of another algorithm.
    """
    from cryptography.exceptions import UnsupportedAlgorithm
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
    from cryptography.hazmat.primitives.serialization import load_pem_public_key

    try:
        key = load_pem_public_key(path.read_bytes())
    except (OSError, ValueError, UnsupportedAlgorithm) as error:
        raise UsageError(
            f"expected an Ed25519 public key in PEM; got {_first(error)} at {path}; write it with "
            "`openssl pkey -in KEY.pem -pubout`"
        ) from error
    if not isinstance(key, Ed25519PublicKey):
        raise UsageError(f"expected an Ed25519 public key; got {type(key).__name__} at {path}; name another key")
    return key


def _first(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def sign(manifest: bytes, key: Ed25519PrivateKey) -> Signature:
    """Sign a manifest."""
    public = key.public_key().public_bytes_raw()
    return Signature(
        public_key=base64.b64encode(public).decode(), signature=base64.b64encode(key.sign(DOMAIN + manifest)).decode()
    )


def fingerprint(key: Ed25519PublicKey) -> str:
    """A short name of a key: the beginning of its sha256."""
    return hashlib.sha256(key.public_bytes_raw()).hexdigest()[:16]


def check_signature(folder: Path, manifest: bytes, trusted: Ed25519PublicKey | None) -> Ed25519PublicKey | None:
    """Check the signature of an unpacked bundle.

    Args:
        folder: the bundle.
        manifest: bytes of its manifest.
        trusted: the verifier's copy of the key; None takes the bundle's own, which proves no origin.

    Returns:
        The key that the bundle is signed with; None where it is not signed.

    Raises:
        StoreError: the signature is damaged, not of this manifest, or by another key.
    """
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    path = folder / SIGNATURE_JSON
    if not path.is_file():
        if trusted is None:
            return None
        raise StoreError(f"expected a signature; got no {SIGNATURE_JSON}; the bundle is not signed")
    try:
        content = read_limited(path)
        told = Signature.model_validate_json(content)
        public, signature = (base64.b64decode(text, validate=True) for text in (told.public_key, told.signature))
        again = [base64.b64encode(raw).decode() for raw in (public, signature)]
        if content != told.to_bytes() or again != [told.public_key, told.signature]:
            raise ValueError("other bytes than were written")
        own = Ed25519PublicKey.from_public_bytes(public)
        own.verify(signature, DOMAIN + manifest)
    except (InvalidSignature, ValueError) as error:
        reason = "a signature that does not fit the manifest" if isinstance(error, InvalidSignature) else _first(error)
        raise StoreError(
            f"expected a whole signature; got {reason} at {SIGNATURE_JSON}; fetch the bundle again"
        ) from error
    if trusted is not None and trusted.public_bytes_raw() != public:
        raise StoreError(
            f"expected a signature by the key {fingerprint(trusted)}; got one by {fingerprint(own)} at "
            f"{SIGNATURE_JSON}; do not use the bundle until you know whose key that is"
        )
    return own
