"""INT8 that collapses and is saved, end to end: modalities of unlike ranges that meet in one tensor."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from fusepress.export.precision import precision_map
from fusepress.pipeline.api import make_context, new_record, preflight
from fusepress.pipeline.console import Reporter
from fusepress.pipeline.recipe import load_recipe
from fusepress.pipeline.report.html import render
from fusepress.pipeline.runner import run_stages
from fusepress.pipeline.stages import STAGES
from fusepress.pipeline.store import Store
from tests.recovery_runs import toy_project

GAIN = 256.0  # a power of two: no float is rounded
MAX_DROP = 0.03
RECIPE: dict[str, Any] = {
    "task": "agreement.py:Agreement",
    "checkpoint": "dense.safetensors",
    "target": "jetson-agx-orin-64gb",
    "quantize": {"precision": "int8", "samples": 8, "max_drop": MAX_DROP},
}
AGREEMENT = '''
from pathlib import Path

from safetensors.torch import load_file
from sparsify_toy import Toy


class Agreement(Toy):
    """How many cells get the class that the float network gives them."""

    metrics = {"agreement": "max"}

    def __init__(self):
        self.float = self.build_model().eval()
        self.float.load_state_dict(load_file(Path(__file__).with_name("dense.safetensors")))

    def sample_stats(self, outputs, batch):
        wanted = self.float(**batch.inputs).argmax(1)
        return {"same": (outputs.argmax(1) == wanted).float().mean((1, 2))}

    def score(self, stats):
        return {"agreement": float(stats["same"].mean())}
'''


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = toy_project(tmp_path_factory.mktemp("collapse"), RECIPE, steps=40)
    (folder / "agreement.py").write_text(AGREEMENT)
    weights = load_file(folder / "dense.safetensors")
    for name in ("lidar.1.1.weight", "lidar.1.1.bias"):
        weights[name] *= GAIN
    weights["fuser.0.weight"][:, 16:] /= GAIN
    save_file(weights, folder / "dense.safetensors")
    return folder


def test_the_ladder_saves_a_release_that_naive_int8_collapses(project: Path) -> None:
    ctx = make_context(load_recipe(project / "recipe.yaml", ["gates.accuracy.max_drop=0.05"]), Reporter(quiet=True))
    folder = project / "runs" / "saved"
    preflight(ctx, Store(folder.parent / ".store"))
    record = new_record(ctx, folder, "")
    run_stages(ctx, [stage for stage in STAGES if stage.name in ("baseline", "export", "quantize")], record, folder)
    stage = record.stage("quantize")
    assert stage is not None
    ladder = stage.details["ladder"]
    naive = ladder["trials"][0]
    assert naive["spared"] == []
    assert naive["drop"] > 5 * MAX_DROP
    assert ladder["rung"] == "mixed"
    assert ladder["spared"] == ["fuser.0/Conv"]  # where the two meet, and nothing else
    assert ladder["evaluations"] < 20
    # the released file is as good as the float one on data that the search never saw
    (released,) = [m for m in stage.measurements if m.name == "accuracy.agreement"]
    assert released.split == "eval"
    assert released.value >= 1 - 2 * MAX_DROP
    precisions = precision_map(folder / "quantize/model.onnx")
    assert precisions["fuser.0/Conv"] == "fp16"
    assert precisions["camera.2.0/Conv"] == "int8"
    layers = {layer["name"]: layer for layer in stage.details["coverage"]["layers"]}
    assert layers["fuser.0/Conv"]["reason"] == "spared by the search: accuracy"
    assert "with all units in INT8 it drops by" in render(record, folder)
