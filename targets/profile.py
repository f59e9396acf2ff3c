"""Target profiles: what a device can do, each figure with its source, read from YAML and schema-checked.

A profile says which precisions, sparsity and opset are legal, how channels should be aligned, and from which figures
latency is predicted. A figure without a document behind it carries `confirmed: false`, and no profile claims a
latency that we measured. A profile of your own may inherit from a shipped one, one level deep.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fusepress.pipeline.errors import TargetError

Family = Literal["jetson", "drive", "desktop", "workstation", "server", "host"]
Runtime = Literal["tensorrt", "tensorrt_rtx", "onnxruntime"]
Precision = Literal["fp32", "fp16", "int8", "fp8"]
Rate = Literal["fp32", "tf32", "fp16", "fp16_fp32acc", "int8", "fp8", "fp4"]

PROFILE_FOLDER = Path(__file__).parent / "profiles"
HOST_NAME = "host-cpu"
TOPS_TOLERANCE = 0.025
MAX_OPSET = 20

Positive = Annotated[float, Field(gt=0)]


class Section(BaseModel):
    """Base of all parts of a profile: frozen, and unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Figure(Section):
    """One number, the key of its source in `sources`, and whether a document stands behind it."""

    value: Positive
    source: str
    confirmed: bool = True


class PowerMode(Section):
    """What the device runs at in one power mode.

    Attributes:
        sm_count: streaming multiprocessors that are powered (for a CPU: cores).
        gpu_mhz: clock cap of the GPU (for a CPU: its clock).
        dram_gbps: nominal memory bandwidth in GB/s.
        dla_mhz: clock of the deep-learning accelerators, 0 where there is none.
    """

    sm_count: int = Field(gt=0)
    gpu_mhz: Positive
    dram_gbps: Positive
    dla_mhz: float = Field(default=0.0, ge=0)
    source: str
    confirmed: bool = True


class Dla(Section):
    """Deep-learning accelerators beside the GPU (dense INT8 operations a clock and core)."""

    cores: int = Field(gt=0)
    int8_ops_per_clock: int = Field(gt=0)
    source: str
    confirmed: bool = True


class Software(Section):
    """A platform release and the TensorRT that it ships."""

    platform: str
    tensorrt: str
    cuda: str | None = None
    source: str
    confirmed: bool = True


class Declared(Section):
    """A total that the vendor advertises; it must close with SM x clock x operations.

    Attributes:
        value: in 10^12 operations a second (a multiply-add counts two).
        rate: what is counted.
        sparse: whether the vendor counts 2:4 sparsity as a doubling.
        with_dla: whether the accelerators are included.
    """

    value: Positive
    rate: Rate
    sparse: bool
    with_dla: bool = False
    source: str
    confirmed: bool = True


class Trap(Section):
    """Something that surprises people about a target, told before anything is spent.

    Attributes:
        modes: power modes that it concerns; all when empty.
        precisions: releases that it concerns; all when empty.
    """

    text: str
    modes: tuple[str, ...] = ()
    precisions: tuple[Precision, ...] = ()


class LatencyFit(Section):
    """Constants of the latency prediction in place of the committed ones; `fusepress targets fit` writes them.

    See `roofline.ConstantSet` for what they are. Files of older versions do not name the `calibrated` devices: all are.
    """

    constants: dict[str, float]
    stream_ms: float = Field(ge=0)
    devices: dict[str, tuple[str, ...]]
    gmacs: dict[str, tuple[float, float]]
    precisions: dict[str, tuple[Precision, ...]]
    ops: tuple[str, ...]
    shares: dict[str, float]
    calibrated: tuple[str, ...] | None = None
    known: float = Field(ge=1)
    sibling: float = Field(ge=1)
    rows: int = Field(gt=0)
    command: str


class Profile(Section):
    """A target device.

    Attributes:
        name: also the file's name.
        compute_capability: NVIDIA's SM version as text, None for a CPU.
        ops_per_clock_per_sm: dense operations (multiply-add = 2) a clock and SM, by kind.
        precisions: what a release may be built in.
        channel_multiple: widths that waste no padding, by precision; pruning aligns to them.
        opset: ONNX opset to export with; `opset_scatternd` where the graph scatters.
        software: platform releases; the first is what build kits assume.
        latency_validated: whether the prediction was compared with latencies of this very device (published by others,
            held out of the fit; none was measured by us).
        latency: constants from measurements of your own.
    """

    schema_: Literal[1] = Field(alias="schema")
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    description: str
    family: Family
    runtime: Runtime
    arch: str
    compute_capability: str | None = Field(default=None, pattern=r"^\d+\.\d$")
    default_mode: str
    power_modes: dict[str, PowerMode] = Field(min_length=1)
    memory_gib: Figure
    l2_mib: Figure | None = None
    ops_per_clock_per_sm: dict[Rate, Figure]
    precisions: tuple[Precision, ...] = Field(min_length=1)
    sparsity_2to4: bool
    dla: Dla | None = None
    channel_multiple: dict[Precision, Annotated[int, Field(ge=1)]]
    opset: int = Field(ge=9, le=MAX_OPSET)
    opset_scatternd: int | None = Field(default=None, ge=9, le=MAX_OPSET)
    software: tuple[Software, ...] = Field(min_length=1)
    declared: tuple[Declared, ...] = ()
    latency_validated: bool = False
    latency: LatencyFit | None = None
    sources: dict[str, str] = Field(min_length=1)
    notes: tuple[str, ...] = ()
    traps: tuple[Trap, ...] = ()

    model_config = ConfigDict(extra="forbid", frozen=True, populate_by_name=True)

    @model_validator(mode="after")
    def _consistent(self) -> Profile:
        if self.default_mode not in self.power_modes:
            raise ValueError(f"default_mode must be one of {sorted(self.power_modes)}; got {self.default_mode!r}")
        if self.runtime != "onnxruntime" and self.compute_capability is None:
            raise ValueError(f"compute_capability must be given for runtime {self.runtime}; got none")
        for precision in self.precisions:
            if precision not in self.channel_multiple:
                raise ValueError(f"channel_multiple must name every allowed precision; {precision} is missing")
            if precision not in self.ops_per_clock_per_sm:
                raise ValueError(f"ops_per_clock_per_sm must name every allowed precision; {precision} is missing")
        for trap in self.traps:
            unknown = set(trap.modes) - set(self.power_modes)
            if unknown:
                raise ValueError(f"traps must name power modes of {sorted(self.power_modes)}; got {sorted(unknown)}")
        self._check_sources()
        self._check_declared()
        return self

    def _check_sources(self) -> None:
        for where, part in self.sourced():
            text = self.sources.get(part.source)
            if text is None:
                raise ValueError(
                    f"{where}.source must be a key of `sources` {sorted(self.sources)}; got {part.source!r}"
                )
            if part.confirmed and "recalled" in text:
                raise ValueError(f"{where} must carry `confirmed: false`: its source {part.source!r} is recalled")

    def _check_declared(self) -> None:
        for index, claim in enumerate(self.declared):
            derived = self.peak_tops(claim.rate, sparse=claim.sparse)
            if claim.with_dla:
                derived += self.dla_tops(sparse=claim.sparse)
            if abs(derived / claim.value - 1) > TOPS_TOLERANCE:
                raise ValueError(
                    f"declared.{index} must equal SM x clock x operations within {TOPS_TOLERANCE:.1%}; "
                    f"declared {claim.value:g}, derived {derived:.1f}"
                )

    def sourced(self) -> Iterator[tuple[str, Figure | PowerMode | Dla | Software | Declared]]:
        """Every part that carries a source, with its place in the file."""
        yield "memory_gib", self.memory_gib
        if self.l2_mib is not None:
            yield "l2_mib", self.l2_mib
        for name, mode in self.power_modes.items():
            yield f"power_modes.{name}", mode
        for rate, figure in self.ops_per_clock_per_sm.items():
            yield f"ops_per_clock_per_sm.{rate}", figure
        if self.dla is not None:
            yield "dla", self.dla
        for index, release in enumerate(self.software):
            yield f"software.{index}", release
        for index, claim in enumerate(self.declared):
            yield f"declared.{index}", claim

    @property
    def unconfirmed(self) -> tuple[str, ...]:
        """Places of the figures that no document stands behind."""
        return tuple(where for where, part in self.sourced() if not part.confirmed)

    def mode(self, name: str | None = None) -> PowerMode:
        """The named power mode, or the default one.

        Raises:
            TargetError: the profile has no such mode.
        """
        chosen = self.default_mode if name is None else name
        if chosen not in self.power_modes:
            raise TargetError(
                f"expected a power mode of {self.name}, one of {', '.join(self.power_modes)}; got {chosen!r}; "
                "name one of these, or leave it out for the default"
            )
        return self.power_modes[chosen]

    def peak_tops(self, rate: Rate, mode: str | None = None, *, sparse: bool = False) -> float:
        """Peak of the SMs in 10^12 operations a second: SM x clock x operations a clock (x 2 with 2:4 sparsity).

        Raises:
            TargetError: the device has no such rate.
        """
        figure = self.ops_per_clock_per_sm.get(rate)
        if figure is None:
            known = ", ".join(self.ops_per_clock_per_sm)
            raise TargetError(f"expected a rate of {self.name}, one of {known}; got {rate!r}; choose one of these")
        at = self.mode(mode)
        return at.sm_count * at.gpu_mhz * 1e-6 * figure.value * (2 if sparse else 1)

    def dla_tops(self, mode: str | None = None, *, sparse: bool = False) -> float:
        """INT8 peak of all accelerators together, 0 where there is none."""
        if self.dla is None:
            return 0.0
        return self.dla.cores * self.mode(mode).dla_mhz * 1e-6 * self.dla.int8_ops_per_clock * (2 if sparse else 1)

    def align(self, precision: str, *, sparsity: bool = False) -> int:
        """Channel multiple for pruning; 2:4 sparsity needs at least 16 (groups of 4 along C, whole vectors kept)."""
        multiple = next((m for name, m in self.channel_multiple.items() if name == precision), None)
        if multiple is None:
            raise TargetError(
                f"expected a precision of {self.name}, one of {', '.join(self.precisions)}; got {precision!r}; "
                "choose one of these"
            )
        return max(multiple, 16) if sparsity else multiple

    def warnings(self, precision: str, mode: str | None = None) -> list[str]:
        """What to know before a release in this precision and power mode is built for the target."""
        chosen = self.default_mode if mode is None else mode
        found = [
            trap.text
            for trap in self.traps
            if (not trap.modes or chosen in trap.modes) and (not trap.precisions or precision in trap.precisions)
        ]
        used = {f"power_modes.{chosen}", "l2_mib", f"ops_per_clock_per_sm.{precision}", "software.0"}
        guessed = [where for where in self.unconfirmed if where in used]
        if guessed:
            found.append(f"no document stands behind {', '.join(guessed)} of {self.name}")
        return found

    def opset_for(self, ops: frozenset[str] | set[str] = frozenset()) -> int:
        """The opset to export a graph with these operators in."""
        if self.opset_scatternd is not None and ops & {"ScatterND", "ScatterElements"}:
            return self.opset_scatternd
        return self.opset


def list_profiles() -> list[str]:
    """Names of the profiles that ship with the package, sorted."""
    return sorted(path.stem for path in PROFILE_FOLDER.glob("*.yaml"))


def profile_path(name: str) -> Path:
    """The YAML file of a shipped profile.

    Raises:
        TargetError: there is none of that name; close matches are named.
    """
    known = list_profiles()
    if name in known:
        return PROFILE_FOLDER / f"{name}.yaml"
    close = (
        difflib.get_close_matches(name, known, n=3, cutoff=0.4) or [p for p in known if name and name.lower() in p][:3]
    )
    hint = f"did you mean {', '.join(close)}? " if close else ""
    raise TargetError(
        f"expected the name of a target or a YAML file; got {name!r}; {hint}`fusepress targets ls` lists all of them"
    )


def load_profile(name_or_path: str | Path, *, base: Path | None = None) -> Profile:
    """Load a shipped profile by name, or a YAML file of your own.

    Args:
        name_or_path: `jetson-agx-orin-64gb`, or a path ending in .yaml or .yml.
        base: folder that relative paths start from, for example the recipe's. A file of the name there wins over the
            shipped profile.

    Raises:
        TargetError: unknown name, missing file, or a file that does not fit the schema.
    """
    path = Path(name_or_path)
    if path.suffix not in {".yaml", ".yml"}:
        own = None if base is None else base / f"{name_or_path}.yaml"
        return _read(own if own is not None and own.is_file() else profile_path(str(name_or_path)))
    if base is not None and not path.is_absolute():
        path = base / path
    return _read(path)


def _read(path: Path) -> Profile:
    try:
        raw = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise TargetError(
            f"expected a readable target file; got none at {path} ({error.strerror}); "
            "give the path of a YAML profile, or a name that `fusepress targets ls` prints"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # ValueError: the 45th of a month, or no UTF-8
        first = " ".join(str(error).split())
        raise TargetError(f"expected YAML; got a file that does not parse at {path} ({first}); correct it") from error
    if not isinstance(raw, Mapping):
        raise TargetError(
            f"expected a mapping of profile fields; got {type(raw).__name__} at {path}; "
            "start from a copy: `fusepress targets cp NAME`"
        )
    raw = _inherited(raw, path)
    try:
        return Profile.model_validate(raw)
    except ValidationError as error:
        raise TargetError(_explain(error, path)) from error


def _inherited(raw: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """With what the file leaves to the shipped profile that it inherits from; keys of mappings are merged."""
    if "inherits" not in raw:
        return raw
    base = yaml.safe_load(profile_path(str(raw["inherits"])).read_text(encoding="utf-8"))
    if "inherits" in base:
        raise TargetError(
            f"expected a profile that stands by itself behind `inherits`; got {raw['inherits']!r} at {path}, which "
            "inherits, too; name the one behind it"
        )
    merged = dict(base)
    for key, value in raw.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = {**base[key], **value} if both else value
    del merged["inherits"]
    return merged


def _explain(error: ValidationError, path: Path) -> str:
    problems = error.errors(include_url=False)
    first: Any = problems[0]
    where = ".".join(str(part) for part in first["loc"]) or "the whole file"
    more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
    kind = first["type"]
    if kind == "extra_forbidden":
        key = str(first["loc"][-1])
        close = difflib.get_close_matches(key, _fields(first["loc"]), n=1)
        hint = f"write {close[0]!r}" if close else "remove it"
        return f"expected only known keys; got {where!r} at {path}{more}; {hint}"
    if kind == "missing":
        return f"expected a value for {where!r}; got none at {path}{more}; add it"
    if kind == "value_error":
        return (
            f"expected a consistent profile: {first['msg'].removeprefix('Value error, ')} at {path}{more}; correct it"
        )
    shown = repr(first["input"])
    shown = shown if len(shown) < 80 else shown[:77] + "..."
    return f"expected {first['msg'][0].lower() + first['msg'][1:]}; got {shown} at {path}: {where}{more}; correct it"


def _fields(loc: tuple[int | str, ...]) -> list[str]:
    sections: dict[str, type[Section]] = {
        "power_modes": PowerMode, "memory_gib": Figure, "l2_mib": Figure, "ops_per_clock_per_sm": Figure,
        "dla": Dla, "software": Software, "declared": Declared, "latency": LatencyFit, "traps": Trap,
    }  # fmt: skip
    section: type[Section] = Profile if len(loc) == 1 else sections.get(str(loc[0]), Profile)
    return [field.alias or name for name, field in section.model_fields.items()]
