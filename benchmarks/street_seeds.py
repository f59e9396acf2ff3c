"""Street at 40 % of the dense MACs: accuracy after at most 800 fine-tune steps, several seeds.

    python benchmarks/street_seeds.py [--seeds 0 1 2] [--steps 800] [--threads 1]

The seed decides the scoring batches, the training batches and the order of everything random in fine-tuning; the dense
checkpoint is the same. Runs are kept in runs/street-seeds and resume. Writes benchmarks/results/street_seeds.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results" / "street_seeds.json"
LIMIT = 0.02


def one_seed(seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Compress once and take the figures from the run record."""
    from fusepress.pipeline.api import compress

    overrides = [f"seed={seed}", f"finetune.steps={arguments.steps}", *arguments.override]
    name = f"{'-'.join(arguments.override) or 'recipe'}-{seed}".replace("/", "_")
    outcome = compress(ROOT / "examples/street/recipe.yaml", overrides=overrides, run=Path("runs/street-seeds") / name)
    values: dict[str, dict[str, float]] = {}
    for stage in outcome.record.stages:
        values[stage.name] = {m.name: m.value for m in stage.measurements}
    return {
        "seed": seed,
        "dense_miou": values["baseline"]["accuracy.miou"],
        "pruned_miou": values["prune"]["accuracy.miou"],
        "finetuned_miou": values["finetune"]["accuracy.miou"],
        "released_miou": values["verify"]["accuracy.miou"],
        "drop": values["baseline"]["accuracy.miou"] - values["verify"]["accuracy.miou"],
        "macs_kept": values["finetune"]["macs"] / values["baseline"]["macs"],
        "verdict": outcome.record.verdict,
        "onnx_sha256": outcome.record.artifacts["onnx"].sha256,
        "recipe_sha256": outcome.record.recipe_sha256,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("-o", "--override", action="append", default=[])
    arguments = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = str(arguments.threads)
    rows = []
    for seed in arguments.seeds:
        rows.append(one_seed(seed, arguments))
        print(json.dumps(rows[-1]), flush=True)
    drops = [row["drop"] for row in rows]
    from fusepress.pipeline.stages.base import tool_versions

    result = {
        "command": " ".join(["python benchmarks/" + Path(sys.argv[0]).name, *sys.argv[1:]]),
        "tools": tool_versions("torch", "onnxruntime-gpu", "numpy"),
        "threads": arguments.threads,
        "steps": arguments.steps,
        "overrides": arguments.override,
        "kind": "simulated: the released FP16 ONNX on ONNX Runtime CPU, 256 evaluation samples",
        "rows": rows,
        "drop_mean": statistics.mean(drops),
        "drop_spread": max(drops) - min(drops),
        "limit": LIMIT,
        "within_limit": all(drop <= LIMIT for drop in drops),
    }
    arguments.results.write_text(json.dumps(result, indent=1) + "\n")
    print(f"drop of mIoU: mean {result['drop_mean']:.4f}, spread {result['drop_spread']:.4f} over {len(rows)} seeds")
    return 0 if result["within_limit"] else 1


if __name__ == "__main__":
    sys.exit(main())
