"""Trains the street's experts and multi-task students. `python examples/street/train_multi.py --out runs/multi`.

Each run ends with NAME.safetensors and NAME.json in OUT/seed-SEED; what is there already is not made again, but refused
where another command made it or its teachers changed since, and a run that was killed goes on from its last checkpoint.
A step of batch 8 takes 0.16 to 0.5 s on one core with AVX-512 bf16, so that all runs of one seed take about an hour:

* an expert for each task: the same network with its own backbone and its own head only;
* `student`: all tasks on one backbone, from the labels alone;
* `distilled`: the same, with the experts as teachers too;
* `detect`: the convolutional street network with a detection head, from the weights of street.safetensors.

`table` prints the students beside the experts in parallel. With glibc, MALLOC_MMAP_MAX_=0
MALLOC_TRIM_THRESHOLD_=4000000000 in front saves time on the CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import platform
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from street_training import fit, load_backbone
from torch import nn

from fusepress.pipeline.evaluate import evaluate, torch_predict
from fusepress.pipeline.recovery.finetune import TrainProgress
from fusepress.pipeline.store import sha256_file
from fusepress.pipeline.task import LoadedTask, load_task

HERE = Path(__file__).resolve().parent
LOG = logging.getLogger("street")
EXPERTS = {
    "segmentation": "SegmentationExpert",
    "detection": "DetectionExpert",
    "depth": "DepthExpert",
    "waypoints": "WaypointExpert",
}
SCORES = {"segmentation": "miou", "detection": "nds", "depth": "depth_object_delta1", "waypoints": "waypoint_ade_m"}
STUDENTS = ("student", "distilled")
RUNS = (*EXPERTS, *STUDENTS)
OTHERS = ("detect",)
STREAM = 200  # the training stream of seed 0; the convolutional network's are from 101 on


def task_of(name: str) -> LoadedTask:
    """The task that a run trains for."""
    spec = EXPERTS.get(name, "StreetDetectTask" if name == "detect" else "StreetMultiTask")
    return load_task(f"multi_task.py:{spec}", base=HERE)


def experts_of(folder: Path) -> dict[str, nn.Module]:
    """The trained experts by task.

    Raises:
        FileNotFoundError: one of them is not trained yet.
    """
    members: dict[str, nn.Module] = {}
    for name in EXPERTS:
        path = folder / f"{name}.safetensors"
        if not path.is_file():
            raise FileNotFoundError(f"expected the expert {name!r}; got no file at {path}; train it first")
        members[name] = task_of(name).build_model()
        members[name].load_state_dict(load_file(path))
        members[name].to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
    return members


def experts_sha256(folder: Path) -> dict[str, str]:
    """Hashes of the weights of those experts that are there."""
    paths = {name: folder / f"{name}.safetensors" for name in EXPERTS}
    return {name: sha256_file(path) for name, path in paths.items() if path.is_file()}


def is_made(name: str, folder: Path, options: argparse.Namespace) -> bool:
    """Whether a run's result is there.

    Raises:
        ValueError: it is there, but another command's, or its teachers changed since.
    """
    path = folder / f"{name}.json"
    if not path.is_file():
        return False
    record = json.loads(path.read_text())
    if record["command"] != _command(name, options):
        raise ValueError(
            f"expected a result of {_command(name, options)!r}; got one of {record['command']!r} at {path}; remove it "
            "to make it again, or name another folder with --out"
        )
    check_teachers(name, folder, record)
    return True


def check_teachers(name: str, folder: Path, record: Mapping[str, Any]) -> None:
    """Check that the experts which taught a run are those beside it.

    Raises:
        ValueError: an expert has other weights now.
    """
    if name != "distilled":
        return
    taught_by = record.get("experts_sha256")
    if taught_by is None:  # from before hashes were recorded
        LOG.warning("it is unknown which weights of the experts taught %s: %s.json does not say", name, folder / name)
        return
    for expert, now in experts_sha256(folder).items():
        if now != taught_by[expert]:
            raise ValueError(
                f"expected the {expert} expert that taught {name}, sha256 {taught_by[expert]}; got {now} at "
                f"{folder / expert}.safetensors; remove {name}.json to learn from it again, or put the expert back"
            )


def make(name: str, folder: Path, options: argparse.Namespace) -> None:
    """One run: train, judge, write."""
    began, task = time.monotonic(), task_of(name)
    torch.manual_seed(options.seed)
    model = task.build_model()
    if name == "detect":
        load_backbone(model, HERE / "street.safetensors")
    experts = experts_of(folder) if name == "distilled" else None
    taught_by = experts_sha256(folder) if experts else None
    steps = options.detect_steps if name == "detect" else options.steps
    model = fit(
        task,
        model,
        steps=steps,
        seed=STREAM + options.seed,
        lr=options.lr,
        experts=experts,
        distill_weight=options.distill_weight,
        precision=options.precision,
        workdir=folder / f"{name}-checkpoints",
        progress=lambda now: _say(name, now),
    )
    found = evaluate(task, torch_predict(task, model))
    folder.mkdir(parents=True, exist_ok=True)
    save_file({key: value.contiguous() for key, value in model.state_dict().items()}, folder / f"{name}.safetensors")
    record = {
        "name": name,
        "command": _command(name, options),
        "seed": options.seed,
        "steps": steps,
        "batch": task.user.batch_size,
        "lr": options.lr,
        "distill_weight": options.distill_weight if experts else None,
        "experts_sha256": taught_by,
        "precision": options.precision,
        "threads": options.threads,
        "minutes_since_start_or_resume": round((time.monotonic() - began) / 60, 1),
        "versions": {"python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__},
        "split": "eval",
        "n": found.n,
        "params": sum(parameter.numel() for parameter in model.parameters()),
        "metrics": found.metrics,
    }
    (folder / f"{name}.json").write_text(json.dumps(record, indent=2) + "\n")
    LOG.info("%s %s", name, " ".join(f"{metric}={value:.3f}" for metric, value in found.metrics.items()))


def _say(name: str, now: TrainProgress) -> None:
    if now.step % 100 == 0 or now.step == now.steps:
        losses = " ".join(f"{key}={value:.3f}" for key, value in now.losses.items())
        LOG.info("%s step %d/%d, %.0f s to go: %s", name, now.step, now.steps, now.eta_s, losses)


def _command(name: str, options: argparse.Namespace) -> str:
    """What shapes the result, without where it is written."""
    steps = f"--detect-steps {options.detect_steps}" if name == "detect" else f"--steps {options.steps}"
    return (
        f"python examples/street/train_multi.py {name} {steps} --seed {options.seed} --lr {options.lr:g} "
        f"--distill-weight {options.distill_weight:g} --threads {options.threads} --precision {options.precision}"
    )


def compare(records: Mapping[str, Any]) -> dict[str, Any]:
    """The students beside the experts in parallel: parameters, each task's metric, and the mean score.

    Args:
        records: by run; the experts and at least one student.
    """
    own = {name: records[name]["metrics"] for name in EXPERTS}
    params = sum(records[name]["params"] for name in EXPERTS)
    rows = {
        "experts": {"params": params, "score": float(np.mean([metrics["score"] for metrics in own.values()]))}
        | {SCORES[name]: metrics[SCORES[name]] for name, metrics in own.items()}
    }
    for name in STUDENTS:
        if name in records:
            metrics = records[name]["metrics"]
            rows[name] = {"params": records[name]["params"], "fewer_params": 1 - records[name]["params"] / params}
            rows[name] |= {metric: metrics[metric] for metric in ("score", *SCORES.values())}
    return rows


def _table(folder: Path) -> None:
    records = {name: json.loads(path.read_text()) for name in RUNS if (path := folder / f"{name}.json").is_file()}
    absent = [name for name in EXPERTS if name not in records]
    if absent:
        LOG.info("no table yet: %s not trained", ", ".join(absent))
        return
    for name, record in records.items():
        check_teachers(name, folder, record)
    rows = compare(records)
    (folder / "results.json").write_text(json.dumps(rows, indent=2) + "\n")
    for name, row in rows.items():
        LOG.info("%-10s %s", name, " ".join(f"{key}={value:.4g}" for key, value in row.items()))


def main(arguments: list[str]) -> None:
    """Train what is asked for, in an order in which teachers come before their students."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="*", metavar="RUN", help=f"of {', '.join((*RUNS, *OTHERS))}; default: {RUNS}")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--detect-steps", type=int, default=600)
    parser.add_argument("--lr", type=float, default=2e-3)
    parser.add_argument("--distill-weight", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--precision", choices=("bf16", "fp32"), default="bf16", help="of the training arithmetic")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    unknown = sorted(set(options.runs) - {*RUNS, *OTHERS, "table"})
    if unknown:
        parser.error(f"expected runs of {', '.join((*RUNS, *OTHERS))} or table; got {', '.join(unknown)}")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    torch.set_num_threads(options.threads)
    folder = options.out / f"seed-{options.seed}"
    wanted = options.runs or RUNS
    chosen = [name for name in (*RUNS, *OTHERS) if name in wanted]
    made = [name for name in chosen if is_made(name, folder, options)]  # before hours of training: it may refuse
    for name in chosen:
        if name in made:
            LOG.info("%s is there already", name)
        else:
            make(name, folder, options)
    _table(folder)


if __name__ == "__main__":
    main(sys.argv[1:])
