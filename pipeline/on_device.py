"""A released model on a device: what to ship of a run, and what its numbers become in the record."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fusepress.pipeline.console import Reporter
from fusepress.pipeline.errors import ExportError, MeasureError
from fusepress.pipeline.evidence import UNSTABLE, Measurement, RunRecord
from fusepress.pipeline.store import atomic_write_text
from fusepress.targets.doctor import Finding, examine
from fusepress.targets.host import THIS_MACHINE
from fusepress.targets.latency import THROUGHPUT
from fusepress.targets.local import LocalDevice
from fusepress.targets.profile import Profile
from fusepress.targets.remote import measure_remote, probe_device
from fusepress.targets.remote_result import EngineOrder, EngineResult, RemoteResult, RemoteSettings, Throughput
from fusepress.targets.ssh import SshDevice

if TYPE_CHECKING:
    from fusepress.targets.doctor import DeviceFacts

DEVICE_FOLDER = "device"
PART = "part "  # before a branch's name, which could be any


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceSettings:
    """How a device is reached and measured.

    Attributes:
        host: as ssh knows it; None is this machine, with its own trtexec.
        ssh_config: in place of the user's own.
        allow_unstable: tell figures that cannot be trusted instead of refusing them; they decide nothing.
        remote: how long, and in which state.
    """

    host: str | None
    ssh_config: Path | None = None
    allow_unstable: bool = False
    remote: RemoteSettings = field(default_factory=RemoteSettings)

    def connect(self) -> SshDevice:
        """The device, to be used in a `with` statement."""
        return LocalDevice() if self.host is None else SshDevice(self.host, config=self.ssh_config)


@dataclass(frozen=True, slots=True, kw_only=True)
class Shipment:
    """What is measured: engines (the released one first), its references, and how far outputs may be from them."""

    orders: tuple[EngineOrder, ...]
    references: Path | None
    tolerance: float

    def with_parts(self, parts: Mapping[str, Path]) -> Shipment:
        """The same and parts of the released model, each as an engine of its own."""
        whole = self.orders[0]
        more = tuple(replace(whole, name=PART + name, onnx=path) for name, path in parts.items())
        return replace(self, orders=(*self.orders, *more))


def measure_run_there(
    record: RunRecord,
    folder: Path,
    settings: DeviceSettings,
    profile: Profile,
    reporter: Reporter | None,
    *,
    parts: bool = False,
) -> tuple[list[Measurement], dict[str, Any]]:
    """The released model of a run on a device: its measurements, and what they depend on.

    With `parts`, each branch and the rest are built and timed too.
    """
    from fusepress.export.branches import split_branches

    # another target than the run's is judged in a mode of its own
    mode = record.target_profile.get("power_mode") if profile.name == record.target else None
    shipment = shipment_of_run(record, folder)
    with tempfile.TemporaryDirectory(prefix="fusepress-") as place:
        cut = split_branches(shipment.orders[0].onnx, record.task["branches"], Path(place)) if parts else {}
        result = measure_shipment(shipment.with_parts(cut), settings, profile, mode, reporter)
    keep_layers(result, folder)
    rows = device_rows(result, device=profile.name, power_mode=mode, precision=record.final_precision)
    return rows, result.to_dict()


def measure_onnx_there(
    path: Path, settings: DeviceSettings, profile: Profile | None, precision: str, reporter: Reporter | None
) -> tuple[list[Measurement], dict[str, Any]]:
    """An ONNX file on a device: its measurements, and what they depend on."""
    with tempfile.TemporaryDirectory(prefix="fusepress-") as folder:
        shipment = shipment_of_onnx(path, precision, Path(folder))
        result = measure_shipment(shipment, settings, profile, None, reporter)
    device = profile.name if profile is not None else (result.facts.model or result.facts.gpu_name or "a device")
    return device_rows(result, device=device, power_mode=None, precision=precision), result.to_dict()


def examine_device(
    settings: DeviceSettings, profile: Profile | None, mode: str | None
) -> tuple[DeviceFacts, list[Finding]]:
    """What a device is, and what speaks for or against measuring on it."""
    with settings.connect() as device:
        facts = probe_device(device)
    return facts, examine(facts, profile=profile, mode=mode)


def shipment_of_run(record: RunRecord, folder: Path) -> Shipment:
    """The released ONNX of a run, with the dense one and the references of its build kit where there is one."""
    from fusepress.export.bundle import TOLERANCE

    precision = record.final_precision or "fp16"
    sparsify = record.stage("sparsify")
    sparse = sparsify is not None and sparsify.status in ("done", "cached")
    orders = [
        EngineOrder(name="model", onnx=folder / record.artifacts["onnx"].path, precision=precision, sparse=sparse)
    ]
    kit = folder / record.artifacts["build_kit"].path if "build_kit" in record.artifacts else None
    dense = kit / "dense.onnx" if kit is not None else None
    if dense is not None and dense.is_file():
        # the dense model carries its own precision: FP16, also where the released one has less
        orders.append(EngineOrder(name="dense", onnx=dense, precision="fp32" if precision == "fp32" else "fp16"))
    return Shipment(orders=tuple(orders), references=kit, tolerance=TOLERANCE[precision])


def shipment_of_onnx(path: Path, precision: str, folder: Path) -> Shipment:
    """An ONNX file with references for made-up inputs, written into `folder`.

    ONNX Runtime's CPU provider has no kernels for some FP16 operators: then nothing is compared.
    """
    from fusepress.export.bundle import TOLERANCE, write_references
    from fusepress.export.passes import made_up_batch
    from fusepress.export.runtime import OnnxSession

    references: Path | None = folder
    try:
        session = OnnxSession(path)
        inputs = made_up_batch(session).inputs
        listed = write_references(folder, [(inputs, session(inputs))], path, major=10)
        (folder / "references.json").write_text(json.dumps(listed))
    except ExportError:
        references = None
    order = EngineOrder(name="model", onnx=path, precision=precision)
    return Shipment(orders=(order,), references=references, tolerance=TOLERANCE[precision])


def measure_shipment(
    shipment: Shipment, settings: DeviceSettings, profile: Profile | None, mode: str | None, reporter: Reporter | None
) -> RemoteResult:
    """Measure on the device, and refuse what cannot be trusted.

    Raises:
        MeasureError: outputs are too far from their references, or the timing is unstable and may not be.
    """
    reporter = reporter or Reporter(quiet=True)
    reporter.begin("measure", "1/1")
    try:
        with settings.connect() as device:
            result = measure_remote(
                device,
                shipment.orders,
                references=shipment.references,
                profile=profile,
                mode=mode,
                settings=settings.remote,
                say=reporter.update,
            )
    finally:
        reporter.end()
    place = settings.host or THIS_MACHINE
    far = [found for found in result.differences if not found.relative <= shipment.tolerance]
    if far:
        worst = max(far, key=lambda found: found.relative)
        raise MeasureError(
            f"expected outputs within {shipment.tolerance:g} of their scale; got {worst.relative:.3g} at output "
            f"{worst.output!r} of the engine on {place}; its latency is that of another model: compare layer "
            "by layer, for example with `polygraphy run --onnxrt --trt`"
        )
    doubtful = [(name, why) for name, engine in result.engines.items() for why in engine.unstable]
    if doubtful and not settings.allow_unstable:
        told = "; ".join(f"{name}: {why}" for name, why in doubtful)
        raise MeasureError(
            f"expected a stable latency on {place}; got {told}; lock its clocks (sudo without a password), let "
            "it cool down and end other work there, or take --allow-unstable: then the figures decide nothing"
        )
    return result


def device_rows(
    result: RemoteResult,
    *,
    device: str,
    power_mode: str | None,
    precision: str | None,
) -> list[Measurement]:
    """Measurements of the released engine, of its copies, its energy, its outputs and of the dense one beside it."""
    from fusepress.pipeline.stages.common import latency_result
    from fusepress.pipeline.stages.parts import renamed

    rows: list[Measurement] = []
    released = next(iter(result.engines.values())).onnx_sha256
    for index, engine in enumerate(result.engines.values()):
        common: dict[str, Any] = {
            "device": device,
            "power_mode": result.during.mode or power_mode,
            "precision": precision if index == 0 or engine.name.startswith(PART) else None,
            "runtime": f"tensorrt {result.tensorrt}",
            "artifact_sha256": engine.onnx_sha256,
        }
        prefix = "latency" if index == 0 else f"latency.{engine.name}"
        made = latency_result(engine.latency, prefix=prefix, note=_note(result, engine), tails=index == 0, **common)
        if index == 0:
            made += _extras(result, engine, common)
        elif engine.name.startswith(PART):
            made = [renamed(made[0], engine.name.removeprefix(PART), released)]
        rows += made
    return rows


def _note(result: RemoteResult, engine: EngineResult) -> str | None:
    parts = [UNSTABLE + why for why in engine.unstable]
    if result.during.clocks and not all(clock.locked for clock in result.during.clocks.values()):
        parts.append("clocks not locked")
    return "; ".join([*parts, *engine.warnings]) or None


def _extras(result: RemoteResult, engine: EngineResult, common: dict[str, Any]) -> list[Measurement]:
    rows = []
    copies = engine.with_copies
    if copies is not None:
        low, high = copies.mean_low_ms, copies.mean_high_ms
        rows.append(
            Measurement(
                name="latency.with_copies.mean_ms", value=copies.mean_ms, low=low, high=high, n=copies.n, unit="ms",
                kind="measured", batch=1, **common,
            )
        )  # fmt: skip
    if engine.throughput is not None:
        rows += _throughput_rows(engine.throughput, common)
    if engine.energy_mj is not None:
        note = "mean power of the whole board while inferences were timed, times the time of one, back to back"
        rows.append(
            Measurement(name="energy_mj", value=engine.energy_mj, unit="mJ", kind="measured", note=note, **common)
        )
    if result.differences:
        worst = max(found.relative for found in result.differences)
        rows.append(
            Measurement(
                name="parity.device.max_rel", value=worst, n=len(result.differences), kind="measured",
                note="largest difference from ONNX Runtime's outputs, as a part of their scale", **common,
            )
        )  # fmt: skip
    rows += [
        Measurement(
            name=f"latency.speedup_over_{name}", value=found.value, low=found.low, high=found.high, kind="measured",
            **common,
        )
        for name, found in result.speedups.items()
    ]  # fmt: skip
    return rows


def _throughput_rows(found: Throughput, common: dict[str, Any]) -> list[Measurement]:
    note = f"{found.streams} streams at once, as trtexec counts"
    latency = found.latency
    return [
        Measurement(
            name=THROUGHPUT, value=found.per_second, n=latency.n, unit="1/s", kind="measured", note=note, **common
        ),
        Measurement(
            name="latency.streams.mean_ms", value=latency.mean_ms, low=latency.mean_low_ms, high=latency.mean_high_ms,
            n=latency.n, unit="ms", kind="measured", batch=1, note=f"of one of {found.streams} streams", **common,
        ),
    ]  # fmt: skip


def keep_layers(result: RemoteResult, folder: Path) -> None:
    """The released engine's layers and their times, where `fusepress explain` can be pointed at them."""
    engine = next(iter(result.engines.values()))
    atomic_write_text(folder / DEVICE_FOLDER / "model.layers.json", engine.layers)
    atomic_write_text(folder / DEVICE_FOLDER / "model.profile.json", engine.profile)
    atomic_write_text(folder / DEVICE_FOLDER / "measured.json", json.dumps(result.to_dict(), indent=1) + "\n")
