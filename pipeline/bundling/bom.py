"""The bill of materials: a CycloneDX ML-BOM of the released model, its files, and what it was made with."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusepress.pipeline.evidence import Measurement, RunRecord
from fusepress.pipeline.store import sha256_file

if TYPE_CHECKING:
    from cyclonedx.model.component import Component

NO_LIBRARY = "no bill of materials: cyclonedx-python-lib is not installed; pip install 'fusepress[bom]'"
MOST_LICENCE_CHARACTERS = 300
MODEL_FILES = (".onnx", ".engine", ".safetensors")


def write_bom(record: RunRecord, files: Mapping[str, Path], path: Path) -> str | None:
    """Write a CycloneDX 1.6 JSON file; the same run and files give the same bytes.

    Args:
        record: of the run.
        files: name in the bundle -> file; those that hold weights become components.
        path: where to.

    Returns:
        Why there is none, or None.
    """
    try:
        from cyclonedx.model.bom import Bom, BomMetaData
        from cyclonedx.model.component import Component, ComponentType
        from cyclonedx.output.json import JsonV1Dot6
    except ModuleNotFoundError:
        return NO_LIBRARY
    released = _model(record)
    parts = [
        Component(name=name, type=ComponentType.FILE, bom_ref=f"file:{name}", hashes=_hashes(sha256_file(file)))
        for name, file in files.items()
        if name.endswith(MODEL_FILES)
    ]
    tools = [_tool(name, version) for name, version in record.environment.get("tools", {}).items()]
    bom = Bom(
        components=[*parts, *_data(record), *(tool for tool in tools if tool is not None)],
        metadata=BomMetaData(component=released),
        serial_number=uuid.UUID(bytes=hashlib.sha256(_identity(record).encode()).digest()[:16], version=4),
    )
    bom.register_dependency(released, bom.components)
    plain: dict[str, Any] = json.loads(JsonV1Dot6(bom).output_as_string())
    plain["metadata"].pop("timestamp", None)  # the same run gives the same bytes
    plain["metadata"]["component"]["modelCard"] = _model_card(record)  # the library has no class for it
    path.write_text(json.dumps(plain, indent=1, sort_keys=True) + "\n")
    return None


def _identity(record: RunRecord) -> str:
    return f"{record.artifacts['onnx'].sha256} {record.recipe_sha256}"


def _model(record: RunRecord) -> Component:
    from cyclonedx.model import Property
    from cyclonedx.model.component import Component, ComponentType

    facts = {
        "target": record.target,
        "precision": record.final_precision,
        "verdict": record.verdict,
        "recipe_sha256": record.recipe_sha256,
        "task_sha256": record.task_sha256,
        "dense_checkpoint_sha256": record.checkpoint_sha256,
        "seed": record.seed,
    }
    return Component(
        name=record.name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="released-model",
        version=record.artifacts["onnx"].sha256[:16],
        hashes=_hashes(record.artifacts["onnx"].sha256),
        properties=[Property(name=f"fusepress:{key}", value=str(value)) for key, value in facts.items()],
    )


def _hashes(sha256: str) -> list[Any]:
    from cyclonedx.model import HashAlgorithm, HashType

    return [HashType(alg=HashAlgorithm.SHA_256, content=sha256)]


def _tool(name: str, version: str) -> Component | None:
    """A package that shaped the bytes, with the licence that its own metadata states."""
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.license import DisjunctiveLicense

    if version == "absent":
        return None
    licence = _stated_licence(name)
    return Component(
        name=name,
        type=ComponentType.LIBRARY,
        bom_ref=f"pkg:pypi/{name}@{version}",
        version=version,
        licenses=[DisjunctiveLicense(name=licence)] if licence else [],
    )


def _stated_licence(package: str) -> str:
    """What an installed package says its licence is: an expression or a name; empty where it gives a text, or none."""
    try:
        metadata = importlib.metadata.metadata(package).json
    except importlib.metadata.PackageNotFoundError:  # the run was made elsewhere
        return ""
    named = str(metadata.get("license_expression") or metadata.get("license") or "").strip()
    if named and "\n" not in named and len(named) <= MOST_LICENCE_CHARACTERS:
        return named
    kinds = [str(c).rpartition(" :: ")[2] for c in metadata.get("classifier", []) if str(c).startswith("License ::")]
    return ", ".join(kinds)


def _data(record: RunRecord) -> list[Component]:
    """What the run says of its calibration samples; the data itself is not in the bundle."""
    from cyclonedx.model.component import Component, ComponentType

    quantize = record.stage("quantize")
    card = None if quantize is None else quantize.details.get("calibration")
    if not card:
        return []
    text = json.dumps(card, sort_keys=True)
    sha = hashlib.sha256(text.encode()).hexdigest()
    return [
        Component(
            name="calibration samples",
            type=ComponentType.DATA,
            bom_ref="calibration-samples",
            description=text[:2000],
            hashes=_hashes(sha),
        )
    ]


def _model_card(record: RunRecord) -> dict[str, Any]:
    verify = record.stage("verify")
    figures = [] if verify is None else verify.measurements
    return {
        "modelParameters": {"task": str(record.task.get("name", ""))},
        "quantitativeAnalysis": {"performanceMetrics": [_metric(figure) for figure in figures]},
    }


def _metric(figure: Measurement) -> dict[str, Any]:
    shown = {"type": f"{figure.name} ({figure.kind})", "value": f"{figure.value:.6g} {figure.unit}".strip()}
    if figure.split is not None:
        shown["slice"] = figure.split
    if figure.low is None or figure.high is None:
        return shown
    return shown | {"confidenceInterval": {"lowerBound": f"{figure.low:.6g}", "upperBound": f"{figure.high:.6g}"}}
