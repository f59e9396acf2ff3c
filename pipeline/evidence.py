"""Numbers with their evidence: measurements, verdicts, and the run record that outside tools read."""

from __future__ import annotations

import hashlib
import math
import re
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from fusepress.pipeline.errors import StoreError, UsageError

Kind = Literal["measured", "simulated", "predicted"]
GateVerdict = Literal["PASS", "FAIL", "INCONCLUSIVE", "ANOMALOUS"]
StageStatus = Literal["pending", "running", "done", "cached", "skipped", "failed", "interrupted"]

RUN_JSON = "run.json"
SCHEMA = 1
SPEEDUP_OVER_FP32 = "latency.speedup_over_fp32"  # of a released file over the float32 one that it was made of
UNSTABLE = "unstable: "  # in the note of a measured latency that cannot be trusted, before why


class Strict(BaseModel):
    """Base of all records: unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", validate_assignment=True)


class Measurement(Strict):
    """One number and how it came about.

    Attributes:
        name: for example `accuracy.miou`, `latency.mean_ms`, `macs`.
        value: in `unit`; never NaN or infinite.
        low: lower end of the 95 % interval, if there is one.
        high: upper end.
        n: number of samples or runs behind it.
        kind: measured (the very artifact on the very device), simulated (ONNX on ONNX Runtime CPU), predicted.
        extrapolating: a prediction outside what its model was validated on.
    """

    name: str
    value: float
    unit: str = ""
    low: float | None = None
    high: float | None = None
    n: int | None = None
    kind: Kind
    device: str | None = None
    runtime: str | None = None
    power_mode: str | None = None
    precision: str | None = None
    artifact_sha256: str | None = None
    split: str | None = None
    batch: int | None = None
    extrapolating: bool = False
    note: str | None = None

    @model_validator(mode="after")
    def _finite(self) -> Measurement:
        for label, number in (("value", self.value), ("low", self.low), ("high", self.high)):
            if number is not None and not math.isfinite(number):
                raise ValueError(f"expected a finite {label} for {self.name}; got {number}")
        return self


class Verdict(Strict):
    """What a gate says, and why."""

    gate: str
    verdict: GateVerdict
    limit: float | None = None
    value: float | None = None
    low: float | None = None
    high: float | None = None
    why: str


class StageRecord(Strict):
    """One stage of a run.

    Attributes:
        files: everything that it wrote: name in its folder -> sha256.
    """

    name: str
    status: StageStatus = "pending"
    seconds: float = 0.0
    key: str | None = None
    measurements: list[Measurement] = Field(default_factory=list)
    verdicts: list[Verdict] = Field(default_factory=list)
    details: dict[str, Any] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    why: str | None = None


class Artifact(Strict):
    """A file of the run; the path is relative to the run folder."""

    path: str
    sha256: str
    note: str | None = None


class RunRecord(Strict):
    """run.json, schema 1: everything that gates, reports and outside tools read.

    Attributes:
        recipe_json_sha256: hash of recipe.json beside it, whose gates judge the run; None in runs of before.
        sha256: of the file's text without this key, which is its last; a figure that changed on the disk is none.
    """

    schema_: Literal[1] = Field(default=1, alias="schema")
    name: str
    fusepress: str
    target: str
    verdict: GateVerdict | None = None
    why: str = ""
    recipe_sha256: str
    recipe_json_sha256: str | None = None
    task_sha256: str
    checkpoint_sha256: str
    seed: int
    command: str = ""
    target_profile: dict[str, Any] = Field(default_factory=dict)
    task: dict[str, Any] = Field(default_factory=dict)
    environment: dict[str, Any] = Field(default_factory=dict)
    stages: list[StageRecord] = Field(default_factory=list)
    artifacts: dict[str, Artifact] = Field(default_factory=dict)
    released: str | None = None
    sha256: str | None = Field(default=None, exclude=True)

    model_config = ConfigDict(extra="forbid", populate_by_name=True)

    def stage(self, name: str) -> StageRecord | None:
        """The record of a stage, or None."""
        return next((stage for stage in self.stages if stage.name == name), None)

    @property
    def asked_precision(self) -> str | None:
        """What the recipe asked for."""
        asked = self.target_profile.get("precision")
        return None if asked is None else str(asked)

    @property
    def final_precision(self) -> str | None:
        """That of the released ONNX: another one than asked where `quantize` ended on its last rung."""
        stage = self.stage("quantize")
        made = None if stage is None else stage.details.get("precision")
        return self.asked_precision if made is None else str(made)

    def to_json(self) -> str:
        """Stable JSON text, with its hash as the last key."""
        plain = self.model_dump_json(by_alias=True, indent=1, exclude_none=True)
        return f'{plain[:-2]},\n "sha256": "{hashlib.sha256(plain.encode()).hexdigest()}"\n}}\n'


def _as_written(text: str) -> bool:
    """Whether the text of a run.json gives the hash that it ends with."""
    end = re.search(r',\n "sha256": "([0-9a-f]{64})"\n}\n\Z', text)
    return end is not None and hashlib.sha256(f"{text[: end.start()]}\n}}".encode()).hexdigest() == end[1]


def read_run(run: Path) -> RunRecord:
    """Read run.json of a run folder.

    Raises:
        UsageError: there is none.
        StoreError: it is damaged, of another schema, or cannot be read.
    """
    path = run / RUN_JSON
    try:
        text = path.read_text(encoding="utf-8")
        record = RunRecord.model_validate_json(text)
    except FileNotFoundError as error:
        raise UsageError(
            f"expected a run folder with {RUN_JSON}; got none at {run}; name a folder that `fusepress compress` made"
        ) from error
    except ValueError as error:
        first = str(error).splitlines()[0]
        raise StoreError(
            f"expected {RUN_JSON} of schema {SCHEMA}; got a file that does not fit at {path} ({first}); "
            "run `fusepress compress` again"
        ) from error
    except OSError as error:
        raise StoreError(
            f"expected to read {RUN_JSON}; got {error.strerror} at {path}; run `fusepress compress` again"
        ) from error
    if record.sha256 is not None and not _as_written(text):
        raise StoreError(
            f"expected {RUN_JSON} as it was written; got other bytes at {path}; run `fusepress compress` again: the "
            "figures are in the store"
        )
    return record
