"""From a finished run folder to a bundle."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fusepress.pipeline.bundling.archive import unsafe, write_archive
from fusepress.pipeline.bundling.bom import write_bom
from fusepress.pipeline.bundling.manifest import (
    ABOVE,
    MANIFEST_JSON,
    MANIFEST_SHA256,
    RELEASED,
    SIGNATURE_JSON,
    Manifest,
    digest_line,
    list_files,
)
from fusepress.pipeline.bundling.signature import fingerprint, load_private_key, sign
from fusepress.pipeline.bundling.verify import changed, check_verdict
from fusepress.pipeline.errors import StoreError, UsageError
from fusepress.pipeline.evidence import RunRecord, read_run

SUFFIX = ".bundle.tar"
BOM_JSON = "bom.cdx.json"
LICENCES = "licences"
LEFT_OUT = ("log.txt",)  # it tells paths of the machine


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """A bundle on disk.

    Attributes:
        path: the archive.
        manifest: what is in it.
        signed_by: short name of the key; None where it is not signed.
        notes: what a reader must know.
    """

    path: Path
    manifest: Manifest
    signed_by: str | None
    notes: tuple[str, ...] = ()


def make_bundle(
    run: Path,
    out: Path | None = None,
    *,
    key: Path | None = None,
    licences: Sequence[Path] = (),
    refused: bool = False,
) -> Bundle:
    """Write the bundle of a run; the same run, key and licences give the same bytes.

    Args:
        run: the run folder, as `compress` left it.
        out: the file; default: `<run>.bundle.tar` beside the run folder.
        key: Ed25519 private key (PEM) to sign with.
        licences: files to go along, such as the licence of the weights.
        refused: bundle a run that did not pass its gates, too; the manifest names its verdict.

    Raises:
        UsageError: the run did not pass, or the key or a licence is none.
        StoreError: the run is not finished, or its files are not those that it recorded, or its verdict is not the one
            that its own recipe's gates give.
    """
    record = read_run(run)
    if record.verdict is None or any(name not in record.artifacts for name in RELEASED):
        raise StoreError(
            f"expected a finished run with {', '.join(RELEASED)}; got one without at {run}; run compress again"
        )
    if record.verdict != "PASS" and not refused:
        raise UsageError(
            f"expected a run that passed its gates; got {record.verdict} at {run}; mend it, or bundle it for "
            "inspection with --refused"
        )
    private = None if key is None else load_private_key(key)
    files = _run_files(run)
    _check_artifacts(record, run)
    check_verdict(run, record)  # `gate -o` leaves a verdict that the recipe in the bundle does not give
    with tempfile.TemporaryDirectory(prefix="fusepress-") as scratch:
        made = Path(scratch)
        files |= _licence_files(licences, made)
        notes = []
        why_no_bom = write_bom(record, files, made / BOM_JSON)
        if why_no_bom is None:
            files[BOM_JSON] = made / BOM_JSON
        else:
            notes.append(why_no_bom)
        manifest = Manifest(
            fusepress=record.fusepress,
            name=record.name,
            target=record.target,
            verdict=record.verdict,
            files=list_files(dict(sorted(files.items()))),
        )
        content = manifest.to_bytes()
        above = {MANIFEST_JSON: content, MANIFEST_SHA256: digest_line(content)}
        if private is not None:
            above[SIGNATURE_JSON] = sign(content, private).to_bytes()
        for name, data in above.items():
            (made / name).write_bytes(data)
        path = out or run.with_name(run.name + SUFFIX)
        write_archive(path, {name: made / name for name in above} | {name: files[name] for name in manifest.files})
    signed_by = None if private is None else fingerprint(private.public_key())
    if signed_by is None:
        notes.append("not signed: nobody can tell whose bundle it is; give --key KEY.pem")
    return Bundle(path=path, manifest=manifest, signed_by=signed_by, notes=tuple(notes))


def _run_files(run: Path) -> dict[str, Path]:
    """Every file of a run folder but its log, lock and other hidden ones."""
    files = {}
    for path in sorted(run.rglob("*")):
        relative = path.relative_to(run)
        if any(part.startswith(".") for part in relative.parts) or relative.as_posix() in LEFT_OUT:
            continue
        if path.is_symlink() or not (path.is_file() or path.is_dir()):
            raise StoreError(f"expected plain files in a run folder; got a link or device at {path}; remove it")
        if path.is_file():
            name = relative.as_posix()
            if name in ABOVE or unsafe(name) is not None:
                raise StoreError(f"expected files that a run makes; got {name!r} in {run}; move it elsewhere")
            files[name] = path
    return files


def _check_artifacts(record: RunRecord, run: Path) -> None:
    wrong = changed(record, run)
    if wrong is not None:
        name, path = wrong
        found = "other bytes" if path.exists() else "no file"
        raise StoreError(
            f"expected the {name} that the run recorded; got {found} at {path}; run compress again: it restores the "
            "file from the store"
        )


def _licence_files(given: Sequence[Path], scratch: Path) -> dict[str, Path]:
    """Ours, which is of what the bundle was made with, and those that the user names."""
    files = {}
    for entry in importlib.metadata.files("fusepress") or []:
        if entry.name == "LICENSE":
            own = scratch / "FUSEPRESS-LICENSE"
            own.write_bytes(Path(str(entry.locate())).read_bytes())
            files[f"{LICENCES}/{own.name}"] = own
    for path in given:
        if not path.is_file() or unsafe(path.name) is not None:
            raise UsageError(f"expected --license to name a file; got {path}; correct the path")
        files[f"{LICENCES}/{path.name}"] = path
    return files
