"""What the front page promises: a picture, and (long) targets of every kind; test_docs.py runs its commands."""

from __future__ import annotations

from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def test_the_readme_shows_a_picture_of_a_report() -> None:
    assert (ROOT / "docs/report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "artifact"),
    [
        ("rtx-4090", "engine"),
        ("jetson-agx-orin-64gb", "build_kit"),
        ("host-cpu", "onnx"),
    ],
)
def test_street_reaches_every_kind_of_target(
    tmp_path_factory: pytest.TempPathFactory, target: str, artifact: str
) -> None:
    from fusepress.pipeline.api import compress

    base = tmp_path_factory.getbasetemp() / "street"
    quick = ["finetune.steps=2", "score.method=magnitude", "verify.replicates=200"]
    outcome = compress(ROOT / "examples/street/recipe.yaml", target=target, run=base / target, overrides=quick)
    assert artifact in outcome.record.artifacts
    latency = [
        m
        for m in outcome.record.stage("verify").measurements  # type: ignore[union-attr]
        if m.name == "latency.mean_ms"
    ]
    assert [m.kind for m in latency] == ["measured" if target == "host-cpu" else "predicted"]
