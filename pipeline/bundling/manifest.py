"""The manifest of a bundle: every file with its size and hash, and the hash of the manifest itself."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import Field

from fusepress.pipeline.errors import StoreError
from fusepress.pipeline.evidence import GateVerdict, Strict
from fusepress.pipeline.store import sha256_file

MANIFEST_JSON = "manifest.json"
MANIFEST_SHA256 = "manifest.sha256"
SIGNATURE_JSON = "signature.json"
ABOVE = (MANIFEST_JSON, MANIFEST_SHA256, SIGNATURE_JSON)  # what the manifest itself does not list
RELEASED = ("onnx", "replicates", "references")  # artifacts that no bundle is without
MOST_JSON_BYTES = 64 << 20


class FileFacts(Strict):
    """Size and hash of one file."""

    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    size: int = Field(ge=0)


class Manifest(Strict):
    """What a bundle holds, schema 1."""

    schema_: Literal[1] = Field(default=1, alias="schema")
    fusepress: str
    name: str
    target: str
    verdict: GateVerdict
    files: dict[str, FileFacts]

    def to_bytes(self) -> bytes:
        """The one form in which it is accepted."""
        return (json.dumps(self.model_dump(mode="json", by_alias=True), indent=1, sort_keys=True) + "\n").encode()


def list_files(files: Mapping[str, Path]) -> dict[str, FileFacts]:
    """Sizes and hashes."""
    return {name: FileFacts(sha256=sha256_file(path), size=path.stat().st_size) for name, path in files.items()}


def digest_line(manifest: bytes) -> bytes:
    """Content of manifest.sha256, as sha256sum writes it."""
    return f"{hashlib.sha256(manifest).hexdigest()}  {MANIFEST_JSON}\n".encode()


def read_manifest(folder: Path) -> Manifest:
    """Read and check the manifest of an unpacked bundle.

    Raises:
        StoreError: it is missing, damaged, or not what manifest.sha256 says.
    """
    try:
        content, digest = (read_limited(folder / name) for name in (MANIFEST_JSON, MANIFEST_SHA256))
        manifest = Manifest.model_validate_json(content)
    except (OSError, ValueError) as error:
        raise StoreError(
            f"expected a bundle with {MANIFEST_JSON}; got {str(error).splitlines()[0]} at {MANIFEST_JSON}; "
            "fetch the bundle again"
        ) from error
    if digest != digest_line(content) or content != manifest.to_bytes():
        raise StoreError(
            f"expected {MANIFEST_JSON} and {MANIFEST_SHA256} to fit each other; got others at {MANIFEST_JSON}; "
            "fetch the bundle again"
        )
    return manifest


def read_limited(path: Path) -> bytes:
    """A JSON file's bytes.

    Raises:
        ValueError: it is larger than any of ours.
    """
    size = path.stat().st_size
    if size > MOST_JSON_BYTES:
        raise ValueError(f"{size:,} bytes, more than {MOST_JSON_BYTES:,},")
    return path.read_bytes()


def faults(folder: Path, manifest: Manifest) -> dict[str, str]:
    """Files of an unpacked bundle that are missing, changed or not listed, each with what is wrong."""
    found = _walk(folder)
    wrong = {name: reason for name, reason in found.items() if reason}
    listed = set(manifest.files)
    wrong |= {name: "it is not in the manifest" for name in found if name not in listed and name not in ABOVE}
    for name, facts in manifest.files.items():
        path = folder / name
        if name not in found:
            wrong[name] = "it is missing"
        elif not found[name] and (path.stat().st_size != facts.size or sha256_file(path) != facts.sha256):
            wrong[name] = "its bytes are not those that the manifest lists"
    return dict(sorted(wrong.items()))


def _walk(folder: Path) -> dict[str, str]:
    """Everything in a folder but folders; what is no regular file with the reason, and never followed."""
    found: dict[str, str] = {}
    for base, folders, files in os.walk(folder, followlinks=False):
        for name in [*files, *folders]:
            path = Path(base) / name
            relative = path.relative_to(folder).as_posix()
            if path.is_symlink():
                found[relative] = "it is a link"
            elif name in files:
                found[relative] = "" if path.is_file() else "it is no regular file"
    return found
