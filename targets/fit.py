"""Fits the constants of the latency prediction on measured latencies, and says how wrong it is on what it has not seen.

A row is a latency of a network on a device in a power mode, measured by someone's harness. Harnesses differ: one that
replays a CUDA graph pays a launch for each kernel, one that starts every kernel from the host pays more for each, and
Python around it costs once. Both are fitted beside the constants and are no part of a prediction. All parameters have
priors, since published rows are few: what rows do not tell stays where physics put it.

Intervals are conformal (Vovk, Gammerman and Shafer, Algorithmic Learning in a Random World, 2005; over left-out groups
as in Barber et al., arXiv 1905.02928): a quantile of the errors on groups that were held out of the fit. They hold what
they promise only for errors of one kind, so that a network on a device that is in the fit and one on a device that is
not have widths of their own, each from hold-outs of that kind (Mondrian conformal prediction).
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import yaml
from pydantic import Field, ValidationError, model_validator

from fusepress.pipeline.errors import TargetError
from fusepress.targets.kernels import Constants, kernel_times
from fusepress.targets.legality import check_legality
from fusepress.targets.network import Network, read_network
from fusepress.targets.predict import COVERAGE, class_shares
from fusepress.targets.profile import Precision, Profile, Section, list_profiles, load_profile
from fusepress.targets.roofline import ConstantSet, constants_of
from fusepress.targets.work import Array, Work, describe_work, join_works

# centre and width in log scale
PRIORS: dict[str, tuple[float, float]] = {
    "compute_fp32": (0.75, 0.25),
    "compute_fp16": (0.75, 0.25),
    "compute_int8": (0.75, 0.25),
    "compute_scalar": (0.3, 0.5),
    "memory": (0.75, 0.15),  # LPDDR5 and GDDR6 reach 0.6 to 0.9 of nominal
    "cache_share": (0.5, 0.4),
    "launch_cycles": (2000.0, 0.4),
    "tile_cycles": (1500.0, 0.4),  # some hundred to reach DRAM, and 16,384 outputs at 16 a clock to write
    "smooth_cycles": (4000.0, 0.4),  # 16,384 outputs of two special functions at 16 a clock, and a dozen others
    "step_cycles": (300.0, 0.5),  # latency of L2, half hidden
    "overlap": (1.4, 0.15),
}
STREAM_MS = (0.0045, 0.1)  # starting a kernel from the host costs about 5 us
OFFSET_MS = (0.3, 0.7)  # Python, synchronisation, copies
HIGHEST = {"cache_share": 1.5} | dict.fromkeys(
    ["compute_fp32", "compute_fp16", "compute_int8", "compute_scalar", "memory"], 0.95
)
NOISE = 0.1  # of a published latency, in log scale: pairs of repeated rows differ by up to 8 %
SAME_WEIGHT = 5  # rows of one family on one device count as at most so many
ROBUST = 1.5  # standardised residuals beyond this count less
PERSONAL_WIDTH = 0.5  # of the priors when rows of one's own refine a committed set
MEASUREMENTS_SCHEMA = 1


@dataclass(frozen=True, slots=True, kw_only=True)
class FitRow:
    """One measured latency.

    Attributes:
        mode: power mode of the profile.
        remainder: precision of what INT8 leaves over.
        ms: mean or median compute time.
        source: whose harness; rows of one share an offset. "" where there is none, as with trtexec's compute times.
        cuda_graph: whether kernels were replayed from a graph.
    """

    network: str
    family: str
    profile: Profile
    mode: str
    precision: Precision
    ms: float
    source: str
    cuda_graph: bool
    graph: Network
    work: Work
    remainder: Precision = "fp16"
    quality: str = "A"

    def gpu_ms(self, constants: Constants) -> float:
        """Milliseconds in a CUDA graph."""
        return float(self.times(constants).total.sum())

    def times(self, constants: Constants) -> Any:
        """Of each kernel."""
        return kernel_times(self.work, self.profile, self.profile.mode(self.mode), constants)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fitted:
    """Constants and what harnesses cost beside them."""

    constants: Constants
    stream_ms: float
    offset_ms: dict[str, float]

    def predict(self, row: FitRow) -> float:
        """What the row's harness would report."""
        return row.gpu_ms(self.constants) + self.harness_ms(row)

    def harness_ms(self, row: FitRow) -> float:
        """What is not the GPU's work; a source that was not fitted costs the geometric mean of those that were."""
        started = 0.0 if row.cuda_graph else self.stream_ms * float(row.work.launches.sum())
        if not row.source:
            return started
        typical = math.exp(np.mean([math.log(v) for v in self.offset_ms.values()])) if self.offset_ms else OFFSET_MS[0]
        return started + self.offset_ms.get(row.source, typical)

    def log_error(self, row: FitRow) -> float:
        """Log of predicted over published."""
        return math.log(self.predict(row) / row.ms)


def fit_rows(rows: Sequence[FitRow], start: ConstantSet | None = None) -> Fitted:
    """Constants, the cost of starting kernels from the host, and an offset a source, by robust least squares.

    Args:
        rows: measurements; rows of one family on one device share a weight.
        start: a committed set to refine: its constants are the priors, with half the width. None: `PRIORS`.

    Raises:
        TargetError: no rows.
    """
    from scipy.optimize import least_squares

    if not rows:
        raise TargetError("expected measured latencies to fit; got none; give at least one row")
    names = list(PRIORS)
    sources = sorted({row.source for row in rows if row.source})
    centre, width, highest = _priors(names, sources, start)
    crowd = Counter((row.family, row.profile.name) for row in rows)
    scale = np.asarray([NOISE * math.sqrt(max(1, crowd[row.family, row.profile.name] / SAME_WEIGHT)) for row in rows])

    def unpack(z: Array) -> Fitted:
        values = [float(v) for v in np.exp(z)]
        return Fitted(
            constants=Constants(**dict(zip(names, values, strict=False))),
            offset_ms=dict(zip(sources, values[len(names) :], strict=False)),
            stream_ms=values[-1],
        )

    price = _Prices(rows)
    measured = np.log([row.ms for row in rows])

    def residuals(z: Array) -> Array:
        fitted = unpack(z)
        harness = np.asarray([fitted.harness_ms(row) for row in rows])
        errors = np.log(price.gpu_ms(fitted.constants) + harness) - measured
        return np.concatenate([errors / scale, (z - centre) / width])

    lowest = np.where([name == "overlap" for name in names] + [False] * (len(sources) + 1), 0.0, -np.inf)
    found = least_squares(
        residuals, centre, bounds=(lowest, highest), loss="soft_l1", f_scale=ROBUST, xtol=1e-4, ftol=1e-4
    )
    return unpack(found.x)


class _Prices:
    """GPU times of many rows: networks on one device in one mode are priced in one call, repeated rows once."""

    def __init__(self, rows: Sequence[FitRow]) -> None:
        self._groups: dict[tuple[str, str], list[FitRow]] = {}
        places: dict[tuple[int, str, str], tuple[tuple[str, str], int]] = {}
        self._where = []
        for row in rows:
            device = (row.profile.name, row.mode)
            key = (id(row.work), *device)
            if key not in places:
                members = self._groups.setdefault(device, [])
                places[key] = (device, len(members))
                members.append(row)
            self._where.append(places[key])
        self._joined = {device: join_works([row.work for row in members]) for device, members in self._groups.items()}
        self._starts = {
            device: np.cumsum([0, *(len(row.work.names) for row in members[:-1])])
            for device, members in self._groups.items()
        }

    def gpu_ms(self, constants: Constants) -> Array:
        """Milliseconds in a CUDA graph, of each row."""
        sums = {}
        for device, members in self._groups.items():
            profile = members[0].profile
            times = kernel_times(self._joined[device], profile, profile.mode(device[1]), constants)
            sums[device] = np.add.reduceat(times.total, self._starts[device])
        return np.asarray([sums[device][index] for device, index in self._where])


def _priors(names: list[str], sources: list[str], start: ConstantSet | None) -> tuple[Array, Array, Array]:
    """Centres, widths and upper bounds in log scale: constants, offsets, the cost of starting a kernel."""
    values = asdict(start.constants) if start else {name: PRIORS[name][0] for name in names}
    stream_ms = start.stream_ms if start and start.stream_ms else STREAM_MS[0]
    centre = np.log([*(values[name] for name in names), *(OFFSET_MS[0] for _ in sources), stream_ms])
    share = PERSONAL_WIDTH if start else 1.0
    width = np.asarray([*(PRIORS[name][1] * share for name in names), *(OFFSET_MS[1] for _ in sources), STREAM_MS[1]])
    highest = np.log([*(HIGHEST.get(name, np.inf) for name in names), *(np.inf for _ in sources), np.inf])
    return np.minimum(centre, highest - 1e-6), width, highest


def leave_out(
    rows: Sequence[FitRow], key: Callable[[FitRow], Hashable], start: ConstantSet | None = None
) -> dict[Hashable, list[float]]:
    """Log of predicted over published for the rows of each group, predicted by a fit without that group."""
    groups = sorted({key(row) for row in rows}, key=str)
    if len(groups) < 2:
        return {}
    errors = {}
    for group in groups:
        fitted = fit_rows([row for row in rows if key(row) != group], start)
        errors[group] = [fitted.log_error(row) for row in rows if key(row) == group]
    return errors


def conformal_factor(log_errors: Iterable[float], coverage: float = COVERAGE) -> float | None:
    """Factor about a prediction, either way, that holds the next truth with this probability.

    The ceil((n + 1) x coverage)-th smallest size of n held-out errors; None where n are too few for that.
    """
    sizes = sorted(abs(error) for error in log_errors)
    rank = math.ceil((len(sizes) + 1) * coverage - 1e-9)
    return math.exp(sizes[rank - 1]) if 0 < rank <= len(sizes) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class Widths:
    """Half the width of the interval in log scale.

    Attributes:
        known: for a family that was not seen on a device that was.
        other: for a family that was not seen on any other device.
        calibrated: the devices that `known` is for; none where held-out rows were too few for it.
    """

    known: float
    other: float
    calibrated: frozenset[str]

    def of(self, device: str) -> float:
        """That of a device."""
        return self.known if device in self.calibrated else self.other


def devices_of_several_families(rows: Iterable[FitRow]) -> frozenset[str]:
    """Devices that stay in the fit when any one family is held out."""
    families: dict[str, set[str]] = {}
    for row in rows:
        families.setdefault(row.profile.name, set()).add(row.family)
    return frozenset(name for name, found in families.items() if len(found) > 1)


def interval_widths(
    by_family: Sequence[tuple[FitRow, float]],
    by_device: Sequence[tuple[FitRow, float]],
    several: frozenset[str],
    coverage: float = COVERAGE,
) -> Widths | None:
    """Widths from rows with the log errors of fits without their families, and without their devices.

    A family that is held out takes the only rows of some devices with it. Such an error is none on a known device, so
    that each kind has a quantile of its own. On a device that was not seen both errors count, which are added in
    quadrature, as if independent.

    Args:
        by_family: rows and log errors, their families held out.
        by_device: the same with their devices held out.
        several: devices that stayed in the fit when a family was held out.
        coverage: of the interval.

    Returns:
        None where rows are too few for an interval on a device that was not seen.
    """
    known = conformal_factor((error for row, error in by_family if row.profile.name in several), coverage)
    device = conformal_factor((error for _, error in by_device), coverage)
    if device is None:
        return None
    if known is None:
        return Widths(known=math.log(device), other=math.log(device), calibrated=frozenset())
    other = math.hypot(math.log(known), math.log(device))
    return Widths(known=math.log(known), other=other, calibrated=several)


def describe_set(
    rows: Sequence[FitRow], fitted: Fitted, widths: Widths, base: ConstantSet | None = None
) -> dict[str, Any]:
    """A set as it is stored: constants, the range of the rows behind them, and intervals."""
    devices = {name: set(modes) for name, modes in (base.devices if base else {}).items()}
    gmacs = {key: list(value) for key, value in (base.gmacs if base else {}).items()}
    precisions = {key: set(value) for key, value in (base.precisions if base else {}).items()}
    ops = set(base.ops) if base else set()
    shares = dict(base.shares) if base else {}
    for row in rows:
        capability = str(row.profile.compute_capability)
        devices.setdefault(row.profile.name, set()).add(row.mode)
        size = round(row.graph.macs / 1e9, 3)
        least, most = gmacs.get(capability, [size, size])
        gmacs[capability] = [min(least, size), max(most, size)]
        precisions.setdefault(capability, set()).update(row.work.precisions)
        ops |= set(row.work.ops)
        for name, share in class_shares(row.graph.kernels, row.times(fitted.constants)).items():
            shares[name] = max(shares.get(name, 0.0), round(share, 4))
    return {
        "constants": {name: float(f"{value:.4g}") for name, value in asdict(fitted.constants).items()},
        "stream_ms": float(f"{fitted.stream_ms:.4g}"),
        "devices": {name: sorted(modes) for name, modes in sorted(devices.items())},
        "gmacs": dict(sorted(gmacs.items())),
        "precisions": {key: sorted(value) for key, value in sorted(precisions.items())},
        "ops": sorted(ops),
        "shares": dict(sorted(shares.items())),
        "calibrated": sorted(widths.calibrated),
        "known": round(math.exp(widths.known), 3),
        "sibling": round(math.exp(widths.other), 3),
    }


class Measurement(Section):
    """One latency that you measured, as `fusepress targets fit` reads it.

    Attributes:
        onnx: the file, relative to the measurements; its weights are not read.
        times: what trtexec --exportTimes wrote, relative too: the median of computeMs counts.
        compute_ms: the latency itself, in place of `times`.
        mode: power mode, the profile's default when left out.
        cuda_graph: whether trtexec ran with --useCudaGraph.
        family: networks of one family are held out together; the ONNX file's name when left out.
    """

    onnx: str
    precision: Literal["fp32", "fp16", "int8", "fp8"]
    times: str | None = None
    compute_ms: Annotated[float, Field(gt=0)] | None = None
    mode: str | None = None
    cuda_graph: bool
    family: str | None = None

    @model_validator(mode="after")
    def _one_latency(self) -> Measurement:
        if (self.times is None) == (self.compute_ms is None):
            raise ValueError("give one of `times` and `compute_ms`")
        return self


class Measurements(Section):
    """The file that `fusepress targets fit` reads."""

    schema_: Literal[1] = Field(alias="schema")
    target: str
    rows: tuple[Measurement, ...] = Field(min_length=1)


def read_measurements(path: Path) -> Measurements:
    """Read a YAML or JSON file of measured latencies.

    Raises:
        TargetError: it is missing, or not what `Measurements` says.
    """
    try:
        return Measurements.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise TargetError(
            f"expected a file of measured latencies; got none at {path} ({error.strerror}); give its path"
        ) from error
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "the whole file"
        raise TargetError(
            f"expected measured latencies (schema {MEASUREMENTS_SCHEMA}); got {first['msg']} at {path}: {where}; "
            "see docs/latency.md for the format"
        ) from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        said = " ".join(str(error).split())
        raise TargetError(
            f"expected YAML in UTF-8; got a file that does not parse at {path} ({said}); correct it"
        ) from error


def measured_target(measurements: Measurements, folder: Path) -> Profile:
    """The target that was measured; a YAML file is found from the measurements' folder, as their ONNX files are.

    Raises:
        TargetError: there is none, or it does not fit the schema.
    """
    own = Path(measurements.target).suffix in {".yaml", ".yml"}
    return load_profile(measurements.target, base=folder if own else None)


def measured_rows(measurements: Measurements, folder: Path, profile: Profile) -> list[FitRow]:
    """Rows to fit, of the ONNX files that measurements name.

    Raises:
        TargetError: a file is missing or unreadable, or a power mode or precision is not the target's.
    """
    rows, networks = [], {}
    for entry in measurements.rows:
        precision = check_legality(profile, entry.precision)
        mode = profile.default_mode if entry.mode is None else entry.mode
        profile.mode(mode)
        if entry.onnx not in networks:
            networks[entry.onnx] = read_network(folder / entry.onnx)
        graph = networks[entry.onnx]
        rows.append(
            FitRow(
                network=Path(entry.onnx).stem,
                family=entry.family or Path(entry.onnx).stem,
                profile=profile,
                mode=mode,
                precision=precision,
                ms=entry.compute_ms if entry.compute_ms is not None else _median_ms(folder / str(entry.times)),
                source="",
                cuda_graph=entry.cuda_graph,
                graph=graph,
                work=describe_work(graph, precision),
            )
        )
    return rows


def _median_ms(path: Path) -> float:
    """Median computeMs of what trtexec --exportTimes wrote."""
    try:
        times = [float(query["computeMs"]) for query in json.loads(path.read_text(encoding="utf-8"))]
    except OSError as error:
        raise TargetError(
            f"expected times of trtexec; got none at {path} ({error.strerror}); give what --exportTimes wrote"
        ) from error
    except (ValueError, TypeError, KeyError) as error:
        raise TargetError(
            f"expected a list of queries with computeMs; got something else at {path}; give what --exportTimes wrote"
        ) from error
    if not times or min(times) <= 0:
        raise TargetError(f"expected positive computeMs; got {len(times)} queries at {path}; measure again")
    return float(np.median(times))


@dataclass(frozen=True, slots=True, kw_only=True)
class PersonalFit:
    """What measurements of your own made of a set.

    Attributes:
        latency: the `latency` section of a profile.
        log_errors: of each held-out family, log of predicted over measured, by a fit without it.
        before: the same by the constants as they were.
        calibrated: whether families were enough for an interval of their own; else the one before stays, or the
            largest error where that is wider.
    """

    latency: dict[str, Any]
    log_errors: dict[str, list[float]]
    before: list[float]
    calibrated: bool


def refine(rows: Sequence[FitRow], profile: Profile) -> PersonalFit:
    """Refine the constants of a target with measurements of your own.

    Raises:
        TargetError: no rows, or a target that is not predicted.
    """
    if profile.compute_capability is None:
        raise TargetError(
            f"expected a target with a GPU; got {profile.name}, which is measured, not predicted; "
            "run `fusepress measure` there"
        )
    base = constants_of(profile)
    shipped = Fitted(constants=base.constants, stream_ms=base.stream_ms, offset_ms={})
    before = [shipped.log_error(row) for row in rows]
    held = {str(group): errors for group, errors in leave_out(rows, lambda row: row.family, base).items()}
    fitted = fit_rows(rows, base)
    every = [error for errors in held.values() for error in errors] or [shipped.log_error(row) for row in rows]
    factor = conformal_factor(every)
    fallback = max(base.factor(profile.name), math.exp(max(map(abs, every))))
    known = math.log(factor or fallback)
    widths = Widths(known=known, other=max(math.log(base.sibling), known), calibrated=base.calibrated | {profile.name})
    latency = describe_set(rows, fitted, widths, base)
    return PersonalFit(latency=latency, log_errors=held, before=before, calibrated=factor is not None)


def overlay_text(profile: Profile, fit: PersonalFit, command: str, rows: Sequence[FitRow]) -> str:
    """A profile with everything of the target and these constants; what is as in a shipped one is inherited."""
    head = (
        f"# {len(rows)} measured latencies; written by: {command}\n"
        "# Beside a recipe this file wins over the profile of its name.\n"
    )
    body: dict[str, Any] = {"schema": 1, "name": profile.name, "inherits": profile.name}
    if not _is_shipped(profile):
        body = profile.model_dump(mode="json", by_alias=True, exclude_none=True)
    body["latency"] = {**fit.latency, "rows": len(rows), "command": command}
    return head + yaml.safe_dump(body, sort_keys=False, allow_unicode=True, width=120)


def _is_shipped(profile: Profile) -> bool:
    """Whether nothing but the latency differs from the shipped profile of its name."""
    if profile.name not in list_profiles():
        return False
    shipped = load_profile(profile.name)
    return profile.model_copy(update={"latency": shipped.latency}) == shipped
