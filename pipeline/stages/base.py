"""What a stage is: a key, and a function from input artifacts to an output folder."""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fusepress.pipeline.console import Reporter
from fusepress.pipeline.distributed import world
from fusepress.pipeline.evidence import Measurement
from fusepress.pipeline.recipe import LoadedRecipe, Precision, Recipe
from fusepress.pipeline.store import KeyParts, sha256_file, sha256_tree
from fusepress.pipeline.task import LoadedTask, Split

if TYPE_CHECKING:
    from fusepress.targets.profile import Profile


@dataclass(slots=True, kw_only=True)
class Context:
    """What stages read: the checked inputs and the artifacts made so far.

    Attributes:
        checkpoint: the dense checkpoint file, or None where the task trains it (`train_dense`).
        precision: what the recipe asks for.
        artifacts: name -> file or folder (weights, plan, onnx, ...); a later stage replaces an earlier one's.
        ended_in: precision that `quantize` ended in; None before it.
    """

    loaded: LoadedRecipe
    task: LoadedTask
    profile: Profile
    power_mode: str | None
    precision: Precision
    checkpoint: Path | None
    checkpoint_sha256: str
    reporter: Reporter
    artifacts: dict[str, Path] = field(default_factory=dict)
    shas: dict[str, str] = field(default_factory=dict)
    ended_in: str | None = None
    _fingerprints: dict[Split, str] = field(default_factory=dict)

    @property
    def recipe(self) -> Recipe:
        """The recipe's content."""
        return self.loaded.recipe

    @property
    def final_precision(self) -> str:
        """That of the released ONNX, as figures of it are labelled; before `quantize`, what the recipe asks for."""
        return self.ended_in or self.precision

    @property
    def on_host(self) -> bool:
        """The target is this machine."""
        return self.profile.family == "host"

    @property
    def from_onnx(self) -> bool:
        """The recipe starts from an ONNX file: only the stages from quantize on apply."""
        return self.recipe.checkpoint.endswith(".onnx")

    def fingerprint(self, split: Split) -> str:
        """The identity of a split's data, computed once a run."""
        if split not in self._fingerprints:
            self._fingerprints[split] = self.task.fingerprint(split)
        return self._fingerprints[split]

    def add_artifact(self, name: str, path: Path, sha256: str | None = None) -> None:
        """Make a file known to later stages."""
        self.artifacts[name] = path
        self.shas[name] = sha256 or sha256_tree(path)

    def target_identity(self) -> dict[str, Any]:
        """What of the target shapes figures; a host is the machine it is."""
        text = self.profile.model_dump_json(by_alias=True)
        identity: dict[str, Any] = {
            "name": self.profile.name,
            "profile": hashlib.sha256(text.encode()).hexdigest(),
        }
        identity["mode"] = self.power_mode
        if self.on_host:
            from fusepress.targets.measure import host_description

            identity["host"] = {k: v for k, v in host_description().items() if k in ("cpu", "cores")}
        elif self.profile.latency is None:  # a fit of one's own is part of the profile
            from fusepress.targets.roofline import FITTED

            identity["latency"] = sha256_file(FITTED)
        return identity


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOutput:
    """What a stage hands back: figures, details for the report, and which of its files are artifacts."""

    measurements: list[Measurement] = field(default_factory=list)
    details: dict[str, Any] = field(default_factory=dict)
    artifacts: dict[str, str] = field(default_factory=dict)


class Stage(Protocol):
    """One stage of the pipeline.

    Attributes:
        name: as in recipes, keys and reports.
        version: raised when the stage's code changes what it writes.
        every_rank: where several processes share a run, all of them run the stage, because it shares work over samples;
            only what rank 0 writes and returns is kept. Else rank 0 runs it alone, and the others wait.
    """

    name: str
    version: int
    every_rank: bool

    def skip(self, ctx: Context) -> str | None:
        """Why the stage has nothing to do in this run, or None."""

    def key_parts(self, ctx: Context) -> KeyParts:
        """Everything that shapes the stage's bytes."""

    def run(self, ctx: Context, out: Path, work: Path) -> StageOutput:
        """Write the outputs into `out`; `work` survives a killed process (only rank 0 may write there)."""

    def assess(self, ctx: Context, folder: Path) -> list[Measurement]:
        """Latency of what the stage made, on the target; kept apart, so that targets share the stage's work.

        Args:
            ctx: with the stage's artifacts.
            folder: a scratch folder.
        """


class NoLatency:
    """For stages that make no model: there is nothing to time."""

    def assess(self, ctx: Context, folder: Path) -> list[Measurement]:
        """Nothing."""
        return []


def tool_versions(*packages: str) -> dict[str, str]:
    """Installed versions of the tools that shape a stage's bytes."""
    versions = {}
    for package in packages:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            versions[package] = "absent"
    return versions


def key_parts(
    ctx: Context,
    stage: Stage,
    *,
    config: dict[str, Any] | None = None,
    inputs: Sequence[str] = (),
    splits: Sequence[Split] = (),
    tools: Sequence[str] = (),
    trains: bool = False,
    shards_steps: bool = False,
) -> KeyParts:
    """Key parts of a stage from the names of what it reads.

    Args:
        ctx: the run.
        stage: its name and version.
        config: what it reads of the recipe and the target.
        inputs: artifacts that it reads.
        splits: data that it reads.
        tools: packages that shape its bytes.
        trains: it trains, or adds up in floating point over batches: the thread count shapes the bytes.
        shards_steps: each of N processes adds its own batch to an optimiser step, so that N shapes the result.
    """
    threads = None
    if trains:
        import torch

        threads = torch.get_num_threads()
    shared = {"processes": world()} if shards_steps and world() > 1 else {}
    return KeyParts(
        stage=stage.name,
        version=stage.version,
        config={**(config or {}), **shared},
        inputs={name: ctx.shas[name] for name in inputs if name in ctx.shas},
        task_sha256=ctx.task.source.sha256(),
        fingerprints={split: ctx.fingerprint(split) for split in splits},
        tools=tool_versions(*tools),
        threads=threads,
    )
