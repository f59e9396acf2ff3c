"""What the benchmarks of quantisation share: a store of files and finished cells, and the options that fill it."""

from __future__ import annotations

import argparse
import hashlib
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.quantize.networks import NAMES, ROOT, Network, network
from fusepress.pipeline.store import atomic_write_text, sha256_file

if TYPE_CHECKING:
    from fusepress.calib.dataset import CalibrationCard
    from fusepress.calib.ladder import Judge, Ladder, Standard
    from fusepress.calib.quantize import Draft, Remainder
    from fusepress.calib.sensitivity import Sensitivity
    from fusepress.export.runtime import OnnxSession
    from fusepress.pipeline.evaluate import Evaluation

RESULTS = ROOT / "benchmarks/results/quantize"
VERSION = 1  # raised by hand when the quantisation changes the results of every cell
SEED = 0
TOOLS = ("nvidia-modelopt", "onnx", "onnxruntime-gpu", "torch", "numpy")
Json = dict[str, Any]


def parser(description: str | None) -> argparse.ArgumentParser:
    """The options that all these benchmarks have."""
    made = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--networks", nargs="+", choices=NAMES, default=list(NAMES))
    made.add_argument("--samples", type=int, default=64, help="calibration samples")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--store", type=Path, default=ROOT / "runs/quantize")
    made.add_argument("--multi", type=Path, default=ROOT / "runs/multi/seed-0/distilled.safetensors")
    made.add_argument("--depth", type=Path, default=ROOT / "runs/kitti_depth.safetensors")
    made.add_argument("--data", type=Path, help="folder of KITTI frames")
    return made


def present(options: argparse.Namespace) -> list[Network]:
    """The networks asked for whose weights and data are here; says what is left out."""
    found = []
    for name in options.networks:
        weights = {"multi": options.multi, "kitti_depth": options.depth}.get(name)
        if (weights is not None and not weights.is_file()) or (name == "kitti_depth" and options.data is None):
            print(f"{name}: left out, its checkpoint or its data (--data) is not here", flush=True)
            continue
        found.append(network(name, multi=options.multi, depth=options.depth, data=options.data))
    return found


@dataclass(frozen=True)
class Bench:
    """One network's files and cells in a store; all is made once.

    Attributes:
        network: the network.
        store: folder.
        samples: of calibration.
        threads: of ONNX Runtime.
        judged_batches: of the calib split that searches are judged on; None for all.
    """

    network: Network
    store: Path
    samples: int
    threads: int
    judged_batches: int | None = None

    @cached_property
    def key(self) -> str:
        """Of what every figure of this network depends on."""
        from fusepress.pipeline.stages.base import tool_versions

        facts = {
            "version": VERSION,
            "weights": sha256_file(self.network.weights),
            "changed": self.network.change is not None,
            "data": self.network.task.fingerprint("calib") + self.network.task.fingerprint("eval"),
            "samples": self.samples,
            "seed": SEED,
            "tools": tool_versions(*TOOLS),
        }
        if self.network.exclude or self.network.max_drop is not None:
            facts |= {"exclude": self.network.exclude, "max_drop": self.network.max_drop}
        return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:12]

    @property
    def folder(self) -> Path:
        """Where its files and cells lie."""
        path = self.store / f"{self.network.name}-{self.key}"
        path.mkdir(parents=True, exist_ok=True)
        return path

    @property
    def part(self) -> str:
        """In the names of cells that depend on how much of the calib split is judged."""
        return "" if self.judged_batches is None else f"-{self.judged_batches}"

    def cell(self, name: str, make: Callable[[], Json]) -> Json:
        """A finished cell, made where it is not there."""
        path = self.folder / f"{name}.json"
        if not path.is_file():
            atomic_write_text(path, json.dumps(make(), indent=1) + "\n")
            print(f"{self.network.name} {name}: {path.read_text()[:300]}", flush=True)
        found: Json = json.loads(path.read_text())
        return found

    def has(self, name: str) -> bool:
        """Whether a cell is finished."""
        return (self.folder / f"{name}.json").is_file()

    def file(self, name: str, make: Callable[[Path], object]) -> Path:
        """A file by its name, made where it is not there."""
        path = self.folder / name
        if not path.is_file():
            aside = path.with_suffix(f".part{path.suffix}")
            make(aside)
            aside.replace(path)
        return path

    def session(self, path: Path) -> OnnxSession:
        """Q/DQ computed as written."""
        from fusepress.export.runtime import OnnxSession

        return OnnxSession(path, self.threads)

    def judged(self, path: Path) -> Evaluation:
        """A file on the whole eval split."""
        from fusepress.pipeline.evaluate import evaluate

        session = self.session(path)
        return evaluate(self.network.task, lambda inputs: session(inputs), "eval")

    @cached_property
    def floating(self) -> Evaluation:
        """The float32 file on the whole eval split."""
        return self.judged(self.source)

    # --- calibration --------------------------------------------------------------------------------------------------

    @cached_property
    def card(self) -> CalibrationCard:
        """The calibration samples."""
        from fusepress.calib.dataset import choose_calibration

        return choose_calibration(self.network.task, self.samples, SEED)

    @cached_property
    def arrays(self) -> dict[str, Any]:
        """Their inputs."""
        from fusepress.calib.dataset import calibration_arrays

        return calibration_arrays(self.network.task, self.card)

    @property
    def source(self) -> Path:
        """The float32 file."""
        return self.file("fp32.onnx", self.network.export)

    @cached_property
    def draft(self) -> Draft:
        """Q/DQ everywhere, ranges by the largest magnitude."""
        from fusepress.calib.quantize import draft_int8

        return draft_int8(self.source, self.arrays, sample_ids=self.card.sample_ids)

    @cached_property
    def chosen(self) -> Draft:
        """The release's: with what the recipe excludes, and the ranges that `method: auto` chooses."""
        from fusepress.calib.ladder import choose_method
        from fusepress.calib.quantize import draft_int8

        exclude, ids = self.network.exclude, self.card.sample_ids
        draft = draft_int8(self.source, self.arrays, exclude=exclude, sample_ids=ids) if exclude else self.draft
        return choose_method(draft, self.arrays, self.session)[0]

    # --- the ladder ---------------------------------------------------------------------------------------------------

    @cached_property
    def judge(self) -> Judge:
        """Accuracy on the calib split, or on the first batches of it."""
        from fusepress.calib.ladder import Judge, kept_batches

        batches = kept_batches(self.network.task)
        if batches is not None and self.judged_batches is not None:
            batches = batches[: self.judged_batches]
        return Judge(task=self.network.task, batches=batches, seed=SEED)

    @cached_property
    def standard(self) -> Standard:
        """Half a per cent of the float model's metric, or what the recipe allows."""
        session = self.session(self.source)
        floating = self.judge.evaluate(lambda inputs: session(inputs))
        return self.judge.standard(floating, None, metric=None, gate_drop=None, max_drop=self.network.max_drop)

    @cached_property
    def sensitivity(self) -> Sensitivity:
        """Of every layer, weighed by MACs."""
        from fusepress.calib.ladder import SENSITIVITY_EVALUATIONS
        from fusepress.calib.sensitivity import branch_by_modules, measure_sensitivity, spare_costs
        from fusepress.targets.profile import load_profile

        costs, unit = spare_costs(self.chosen, load_profile("host-cpu"), "fp32")
        return measure_sensitivity(
            self.chosen,
            self.arrays,
            branch_of=branch_by_modules(self.network.task.branches),
            costs=costs,
            cost_unit=unit,
            session=self.session,
            most_runs=SENSITIVITY_EVALUATIONS * self.judge.samples,
        )

    def climb_down(self) -> Ladder:
        """All INT8, or what the search spares."""
        from fusepress.calib.ladder import climb_down

        return climb_down(self.chosen, self.judge, self.standard, self.session, lambda: self.sensitivity)

    def ladder(self) -> Json:
        """Where the ladder ends, with the number of units."""

        def make() -> Json:
            facts = {"units": len(self.chosen.units()), "ranges_by": self.chosen.method}
            return self.climb_down().to_dict() | facts | {"excluded": list(self.network.exclude)}

        return self.cell(f"ladder{self.part}", make)

    def released(self, remainder: Remainder) -> Path:
        """The file that the ladder ends in: `fp16` as a GPU gets it, `fp32` as ONNX Runtime's CPU provider does."""
        from fusepress.calib.quantize import finish_int8

        told = self.ladder()
        if told["rung"] == "float":
            return self.half() if remainder == "fp16" else self.source

        def make(path: Path) -> None:
            finish_int8(self.chosen, self.arrays, path, remainder=remainder, spared=told["spared"])

        return self.file(f"int8-{remainder}.onnx", make)

    def half(self) -> Path:
        """The FP16 file."""
        from fusepress.export.precision import convert_fp16

        return self.file("fp16.onnx", lambda path: convert_fp16(self.source, path, arrays=self.arrays))


def benches(options: argparse.Namespace, judged_batches: int | None = None) -> list[Bench]:
    """Of the networks that are here."""
    shared = {"store": options.store, "samples": options.samples, "threads": options.threads}
    return [Bench(network=item, judged_batches=judged_batches, **shared) for item in present(options)]


def markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table; a column is set to the right where its heading ends in a space."""
    rule = ["---:" if name.endswith(" ") else "---" for name in header]
    return [f"| {' | '.join(cell.strip() for cell in row)} |" for row in (header, rule, *rows)]


def with_earlier(name: str, result: Json) -> Json:
    """A result with the networks of the earlier one that this run did not look at, where the tools are the same."""
    both = {**earlier_networks(name, result["tools"]), **result["networks"]}
    return {**result, "networks": {key: both[key] for key in sorted(both, key=NAMES.index)}}


def earlier_networks(name: str, tools: Mapping[str, str]) -> dict[str, Json]:
    """The networks of an earlier result with these tools, each with the command and sources that it came of."""
    path = RESULTS / f"{name}.json"
    earlier = json.loads(path.read_text()) if path.is_file() else {}
    if earlier.get("tools") != tools:
        return {}
    whole = {key: earlier[key] for key in ("command", "sources") if key in earlier}
    return {network: whole | row for network, row in earlier["networks"].items()}


def write_result(name: str, result: Json, lines: Sequence[str]) -> None:
    """A result as JSON, and as Markdown for people."""
    atomic_write_text(RESULTS / f"{name}.json", json.dumps(result, indent=1) + "\n")
    atomic_write_text(RESULTS / f"{name}.md", "\n".join(lines) + "\n")
    print("\n".join(lines), flush=True)
