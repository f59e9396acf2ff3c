"""The command line: each verb parses its arguments, makes one call into the library and prints what came of it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

import fusepress
from fusepress.pipeline import distributed
from fusepress.pipeline.errors import EXIT_GATE_FAILED, EXIT_INTERRUPTED, FusepressError, RankError, UsageError

if TYPE_CHECKING:
    from fusepress.pipeline.api import Measured, Outcome
    from fusepress.pipeline.evidence import Verdict
    from fusepress.pipeline.gates import FailOn

F = TypeVar("F", bound=Callable[..., Any])

SELF_TEST_JSON = "fusepress-self-test.json"
SELF_TEST_SECONDS = 2.0  # for each latency
EPILOG = (
    "Exit codes: 0 released, 2 usage or configuration, 3 a gate failed, 4 inconclusive or anomalous, "
    "5 a stage failed, 130 interrupted."
)


@click.group(epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fusepress.__version__, prog_name="fusepress")
@click.option("--debug", is_flag=True, help="Show the traceback of an error.")
@click.pass_context
def cli(context: click.Context, debug: bool) -> None:
    """Compress a trained camera-LiDAR checkpoint for a device, and prove that the release still works."""
    context.obj = debug
    if distributed.launched() > 1 and context.invoked_subcommand != "compress":
        raise UsageError(
            f"expected compress, the verb that several processes can share; got {context.invoked_subcommand} in "
            f"{distributed.launched()} processes; run it without torchrun"
        )


def main(arguments: Sequence[str] | None = None) -> None:
    """Entry point of the `fusepress` command."""
    sys.exit(run(arguments))


def run(arguments: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code; no user's mistake shows a traceback."""
    # On a shared machine spinning OpenMP threads take the cores from each other: beside one busy process a training
    # step of the street model took 1.48 s, with less spinning 1.05 s, and 0.48 s with either alone (2 cores).
    # Read when torch is loaded, which is later than this.
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")
    given = list(sys.argv[1:] if arguments is None else arguments)
    debug = "--debug" in given
    given = [argument for argument in given if argument != "--debug"]
    try:
        result = cli.main(args=given, prog_name="fusepress", standalone_mode=False, obj=debug)
        return int(result or 0)
    except click.exceptions.Abort:
        return EXIT_INTERRUPTED
    except click.ClickException as error:
        error.show()
        return 2
    except KeyboardInterrupt:
        if distributed.speaks():
            click.echo("interrupted; run the same command again to resume", err=True)
        return EXIT_INTERRUPTED
    except FusepressError as error:
        if debug:
            raise
        if distributed.speaks() or (isinstance(error, RankError) and error.lost):
            click.echo(f"error: {error}", err=True)
        return error.exit_code
    except Exception as error:
        if debug:
            raise
        click.echo(
            f"error: an unexpected {type(error).__name__}: {error}; this is a fault of fusepress: run again with "
            "--debug and report the traceback",
            err=True,
        )
        return 5


def _json_option(function: F) -> F:
    return click.option("--json", "as_json", is_flag=True, help="Print JSON on standard output.")(function)


def _override_option(function: F) -> F:
    return click.option(
        "-o", "--override", "overrides", multiple=True, metavar="KEY=VALUE", help="Change one recipe key; repeatable."
    )(function)


def _fail_on_option(function: F) -> F:
    return click.option(
        "--fail-on",
        type=click.Choice(["inconclusive", "anomalous", "fail"]),
        default="inconclusive",
        show_default=True,
        help="Mildest verdict that ends with a non-zero exit code.",
    )(function)


def _with_command(function: Callable[..., int]) -> Callable[..., int]:
    """Give the verb the command line as typed, for the report's reproduce line."""

    @wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> int:
        import shlex

        return function(*args, command="fusepress " + shlex.join(sys.argv[1:]), **kwargs)

    return wrapper


@cli.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--target", help="Device profile, in place of the recipe's.")
@click.option("--run", "run_folder", type=click.Path(path_type=Path), help="Run folder [runs/<recipe>-<target>].")
@click.option("--from", "from_stage", metavar="STAGE", help="Make this stage and all later ones anew.")
@_fail_on_option
@_override_option
@_json_option
@_with_command
def compress(
    recipe: Path,
    target: str | None,
    run_folder: Path | None,
    from_stage: str | None,
    fail_on: FailOn,
    overrides: tuple[str, ...],
    as_json: bool,
    command: str,
) -> int:
    """Run every stage of RECIPE, judge the result, write the report.

    What is already done is reused; a stopped run resumes with the same command. `torchrun --nproc-per-node=N -m
    fusepress compress RECIPE` shares the work between N processes.
    """
    from fusepress.pipeline import api
    from fusepress.pipeline.console import Reporter

    outcome = api.compress(
        recipe,
        target=target,
        run=run_folder,
        overrides=overrides,
        from_stage=from_stage,
        reporter=Reporter(quiet=as_json),
        command=command,
    )
    return _tell(outcome, as_json, fail_on) if distributed.speaks() else 0


@cli.command()
@click.argument("recipe", type=click.Path(path_type=Path))
@click.option("--target", help="Device profile, in place of the recipe's.")
@click.option("--run", "run_folder", type=click.Path(path_type=Path), help="Run folder whose results count as cached.")
@_override_option
@_json_option
def plan(recipe: Path, target: str | None, run_folder: Path | None, overrides: tuple[str, ...], as_json: bool) -> int:
    """Dry run: what RECIPE would do, what is frozen and why, whether the budget can be reached.

    Exit code 2 where it cannot, or where the target is known to refuse an operator that no rewrite mends.
    """
    from fusepress.pipeline import api
    from fusepress.pipeline.text import plan_lines

    facts = api.plan(recipe, target=target, run=run_folder, overrides=overrides)
    if as_json:
        click.echo(json.dumps(facts, indent=1))
    else:
        _print_lines(plan_lines(facts))
    reachable = facts.get("budget", {"reachable": True})["reachable"]
    buildable = facts.get("operators", {}).get("buildable", True)
    return 0 if reachable and buildable else 2


@cli.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--baseline", type=click.Path(path_type=Path), help="Stored release [gates.release.file of the recipe].")
@click.option(
    "--update-baseline", is_flag=True, help="Make RUN the stored release: writes the file and shows what changed."
)
@_fail_on_option
@_override_option
@_json_option
def gate(
    run_folder: Path,
    baseline: Path | None,
    update_baseline: bool,
    fail_on: FailOn,
    overrides: tuple[str, ...],
    as_json: bool,
) -> int:
    """Judge a finished RUN again, with other budgets if -o says so. No stage is run."""
    from fusepress.pipeline import api

    outcome = api.gate(run_folder, overrides=overrides, baseline=baseline)
    if update_baseline:
        path, changes = api.update_baseline(run_folder, baseline)
        click.echo(f"{path}: {len(changes)} changed; review and commit it", err=True)
        for line in changes:
            click.echo(f"  {line}", err=True)
        outcome = api.gate(run_folder, overrides=overrides, baseline=baseline)
    return _tell(outcome, as_json, fail_on)


@cli.command()
@click.argument("runs", metavar="RUN RUN...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--html", type=click.Path(dir_okay=False, path_type=Path), help="Also write a page with a drawing to this file."
)
@_json_option
def compare(runs: tuple[Path, ...], html: Path | None, as_json: bool) -> int:
    """Put RUNs of one task side by side; a star marks those that no other one for the same target beats."""
    from fusepress.pipeline import api
    from fusepress.pipeline.text import print_compared

    found = api.compare(runs, html=html)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=1))
    else:
        print_compared(found)
        if html is not None:
            click.echo(f"page         {html}")
    return 0


@cli.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="The file [RUN.bundle.tar].")
@click.option("--key", type=click.Path(path_type=Path), help="Ed25519 private key (PEM) to sign with.")
@click.option("--license", "licences", multiple=True, type=click.Path(path_type=Path), help="File to add; repeatable.")
@click.option("--refused", is_flag=True, help="Bundle a run that did not pass its gates, too.")
def bundle(run_folder: Path, out: Path | None, key: Path | None, licences: tuple[Path, ...], refused: bool) -> int:
    """Write the release bundle of RUN: all it made, hashes, a bill of materials and, with --key, a signature."""
    from fusepress.pipeline import api
    from fusepress.pipeline.text import bundle_lines

    _print_lines(bundle_lines(api.bundle(run_folder, out, key=key, licences=licences, refused=refused)))
    return 0


@cli.command()
@click.argument("what", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--key", type=click.Path(path_type=Path), help="Ed25519 public key (PEM) that must have signed it.")
@_fail_on_option
@_json_option
def verify(what: Path, key: Path | None, fail_on: FailOn, as_json: bool) -> int:
    """Check BUNDLE: hashes, signature, verdict, ONNX, plan, masks and reference outputs. Nothing in it is executed.

    Exit code 5 where a check fails: do not use it. Else that of the verdict that it tells: 0 where it passed, 3 where a
    gate failed, 4 where it is inconclusive or anomalous (see --fail-on). What cannot be checked is said.
    """
    from fusepress.pipeline import api
    from fusepress.pipeline.bundling.verify import exit_code, to_json
    from fusepress.pipeline.text import verified_lines

    found = api.verify(what, key=key)
    if as_json:
        click.echo(to_json(found))
    else:
        _print_lines(verified_lines(found))
    return exit_code(found, fail_on)


@cli.command()
@click.argument("what", metavar="BUNDLE", type=click.Path(path_type=Path))
@click.option("--recipe", required=True, type=click.Path(path_type=Path), help="Your own recipe, task and data.")
@click.option("--target", help="Device profile, in place of the recipe's.")
@_override_option
@_json_option
def reproduce(what: Path, recipe: Path, target: str | None, overrides: tuple[str, ...], as_json: bool) -> int:
    """Run the stages of BUNDLE again, each from the bundled results of those before it.

    Equal hashes where bytes are the same everywhere, metrics within their intervals where a stage trains. Exit code 3
    where a stage differs.
    """
    from fusepress.pipeline import api
    from fusepress.pipeline.console import Reporter
    from fusepress.pipeline.text import reproduced_lines

    found = api.reproduce(what, recipe, target=target, overrides=overrides, reporter=Reporter(quiet=as_json))
    if as_json:
        click.echo(json.dumps([{"stage": r.stage, "status": r.status, "why": r.why} for r in found], indent=1))
    else:
        _print_lines(reproduced_lines(found))
    return EXIT_GATE_FAILED if any(r.status == "different" for r in found) else 0


@cli.command()
@click.argument("run_folder", metavar="RUN", type=click.Path(path_type=Path))
def report(run_folder: Path) -> int:
    """Write report.html, junit.xml and summary.md of RUN again."""
    from fusepress.pipeline import api

    click.echo(str(api.report(run_folder)))
    return 0


@cli.command()
@click.argument("what", metavar="RUN|MODEL.onnx", type=click.Path(path_type=Path))
@click.option("--layers", type=click.Path(path_type=Path), help="Layers as built: JSON of trtexec --exportLayerInfo.")
@click.option("--profile", type=click.Path(path_type=Path), help="Times of the layers: trtexec --exportProfile.")
@click.option("--target", help="Device profile [the run's].")
@click.option(
    "--precision", type=click.Choice(["fp32", "fp16", "int8", "fp8"]), help="Of an ONNX file without its own."
)
@_json_option
def explain(
    what: Path, layers: Path | None, profile: Path | None, target: str | None, precision: str | None, as_json: bool
) -> int:
    """Why a RUN's release is not faster: what costs time, and the predicted gain of mending it."""
    from fusepress.pipeline import api
    from fusepress.pipeline.text import explanation_lines

    found = api.explain(what, layers=layers, profile=profile, target=target, precision=precision)
    if as_json:
        click.echo(json.dumps(found.to_dict(), indent=1))
    else:
        _print_lines(explanation_lines(found))
    return 0


@cli.command()
@click.argument("what", metavar="RUN|MODEL.onnx", required=False, type=click.Path(path_type=Path))
@click.option("--budget", "budgets", multiple=True, metavar="NAME=MS", help="Limit, e.g. p99_ms=5; repeatable.")
@click.option("--seconds", default=10.0, show_default=True, help="Longest time spent measuring.")
@click.option("--arrivals", "arrivals_hz", type=float, metavar="HZ", help="Also with work that arrives at this rate.")
@click.option("--deadline", "deadline_ms", type=float, metavar="MS", help="Of an arrival; counts those that miss it.")
@click.option(
    "--runtime",
    type=click.Choice(["cpu", "cuda", "tensorrt"]),
    default="cpu",
    show_default=True,
    help="On this machine: ONNX Runtime on its CPU or GPU, or TensorRT's trtexec as on a device.",
)
@click.option("--streams", default=1, metavar="N", help="Also N inferences at once, for the throughput.")
@click.option("--host", help="Build and measure on this device, over SSH (a name that ssh knows).")
@click.option("--ssh-config", type=click.Path(path_type=Path), help="In place of your own ssh configuration.")
@click.option("--target", help="What the device is [the run's target].")
@click.option("--precision", type=click.Choice(["fp32", "fp16", "int8", "fp8"]), help="Of an ONNX file, with --host.")
@click.option(
    "--parts",
    type=click.Choice(["serial", "parallel"]),
    help="Of a RUN: each branch and the rest apart too, and the pipeline from them, branches in turn or at once.",
)
@click.option("--set-mode", is_flag=True, help="Change to the target's power mode meanwhile (needs sudo there).")
@click.option("--lock-clocks/--no-lock-clocks", default=True, help="Hold the clocks meanwhile, where sudo allows it.")
@click.option("--wait", "wait_s", default=0.0, metavar="SECONDS", help="For another user to leave the device.")
@click.option("--build-limit", "build_limit_s", default=3600, show_default=True, help="Seconds for one engine.")
@click.option("--allow-unstable", is_flag=True, help="Tell figures that cannot be trusted; they decide nothing.")
@click.option("--self-test", is_flag=True, help="Try TensorRT on this machine with a tiny network; write a record.")
@click.option("--out", type=click.Path(path_type=Path), default=SELF_TEST_JSON, show_default=True, help="Its file.")
@_json_option
def measure(
    what: Path | None,
    budgets: tuple[str, ...],
    seconds: float,
    arrivals_hz: float | None,
    deadline_ms: float | None,
    runtime: str,
    streams: int,
    host: str | None,
    ssh_config: Path | None,
    target: str | None,
    precision: str | None,
    parts: Any,
    set_mode: bool,
    lock_clocks: bool,
    wait_s: float,
    build_limit_s: int,
    allow_unstable: bool,
    self_test: bool,
    out: Path,
    as_json: bool,
) -> int:
    """Measure latency on this host (--runtime) or with --host on a device (TensorRT).

    A RUN gets the figures added and is judged again. A device is left in the power state that it was in.
    With --self-test: find out what this machine's TensorRT builds, picks and how fast it runs, as a file to send back.
    """
    if self_test:
        return _self_test(out, min(seconds, SELF_TEST_SECONDS), as_json)
    if what is None:
        raise UsageError("expected a run folder or an ONNX file; got neither; name one, or try --self-test")
    from fusepress.pipeline import api
    from fusepress.pipeline.console import Reporter
    from fusepress.pipeline.gates import exit_code, overall
    from fusepress.pipeline.measuring import HostSettings, check_streams

    if host is not None and runtime != "cpu":
        raise UsageError(f"expected --host or --runtime; got --host {host} and --runtime {runtime}; leave one out")
    device = here = None
    if host is not None or runtime == "tensorrt":
        from fusepress.pipeline.on_device import DeviceSettings
        from fusepress.targets.remote_result import RemoteSettings

        remote = RemoteSettings(
            seconds=seconds, lock_clocks=lock_clocks, set_mode=set_mode, build_limit_s=build_limit_s, wait_s=wait_s,
            streams=check_streams(streams),
        )  # fmt: skip
        device = DeviceSettings(host=host, ssh_config=ssh_config, allow_unstable=allow_unstable, remote=remote)
    else:
        here = HostSettings(runtime="cuda" if runtime == "cuda" else "cpu", streams=streams)
    arrivals = None
    if arrivals_hz is not None:
        from fusepress.pipeline.measuring import Arrivals

        arrivals = Arrivals(rate_hz=arrivals_hz, deadline_ms=deadline_ms)
    measured = api.measure(
        what,
        budgets=budgets,
        seconds=seconds,
        arrivals=arrivals,
        device=device,
        target=target,
        precision=precision,
        parts=parts,
        host=here,
        reporter=Reporter(quiet=as_json),
    )
    if as_json:
        click.echo(json.dumps(_measured_json(measured), indent=1))
    else:
        from fusepress.pipeline.text import measured_lines

        _print_lines(measured_lines(measured))
    verdicts = [*measured.verdicts]
    if measured.record is not None and not budgets and measured.record.verdict is not None:
        return exit_code(measured.record.verdict)
    return exit_code(overall(verdicts)[0])


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
def init(folder: Path) -> int:
    """Write a task and a recipe to edit into FOLDER; they run as they are."""
    from fusepress.pipeline.scaffold import write_scaffold

    for path in write_scaffold(folder):
        click.echo(f"wrote {path}")
    click.echo(f"next: fusepress compress {folder / 'recipe.yaml'}")
    return 0


@cli.group()
def targets() -> None:
    """Device profiles: list, show, copy to edit, predict a latency."""


@targets.command("ls")
@_json_option
def targets_ls(as_json: bool) -> int:
    """List the device profiles."""
    from fusepress.pipeline.text import print_profiles
    from fusepress.targets.profile import list_profiles, load_profile

    profiles = [load_profile(name) for name in list_profiles()]
    if as_json:
        rows = [{"name": p.name, "family": p.family, "runtime": p.runtime, "arch": p.arch} for p in profiles]
        click.echo(json.dumps(rows, indent=1))
    else:
        print_profiles(profiles)
    return 0


@targets.command("show")
@click.argument("name")
@_json_option
def targets_show(name: str, as_json: bool) -> int:
    """Show the profile NAME: every figure, its source, and which are unconfirmed."""
    from fusepress.targets.profile import load_profile, profile_path

    profile = load_profile(name)
    if as_json:
        click.echo(profile.model_dump_json(by_alias=True, indent=1, exclude_none=True))
        return 0
    path = Path(name) if name.endswith((".yaml", ".yml")) else profile_path(name)
    click.echo(path.read_text(), nl=False)
    unconfirmed = ", ".join(profile.unconfirmed) or "none"
    click.echo(f"# unconfirmed figures: {unconfirmed}")
    return 0


@targets.command("cp")
@click.argument("name")
@click.argument("destination", type=click.Path(path_type=Path))
def targets_cp(name: str, destination: Path) -> int:
    """Copy the profile NAME to DESTINATION, to edit; name the file as `target` in a recipe beside it."""
    from fusepress.pipeline.store import atomic_write_text
    from fusepress.targets.profile import profile_path

    source = profile_path(name)
    path = destination / source.name if destination.is_dir() else destination
    if path.exists():
        raise UsageError(f"expected a new file; got {path}, which exists; name another")
    atomic_write_text(path, source.read_text())
    click.echo(f"wrote {path}")
    return 0


@targets.command("predict")
@click.argument("model", type=click.Path(path_type=Path))
@click.option("--target", required=True, help="Device profile; a file NAME.yaml in this folder wins over ours.")
@click.option("--precision", default="fp16", show_default=True, type=click.Choice(["fp32", "fp16", "int8", "fp8"]))
@click.option("--mode", help="Power mode [the profile's default].")
@click.option("--sparse", is_flag=True, help="With 2:4 sparse weights.")
@click.option("--dla", is_flag=True, help="On one deep-learning accelerator, in INT8.")
@_json_option
def targets_predict(
    model: Path, target: str, precision: Any, mode: str | None, sparse: bool, dla: bool, as_json: bool
) -> int:
    """Predict the latency of the ONNX file MODEL on a device, with an interval."""
    from fusepress.pipeline.text import prediction_json, prediction_lines
    from fusepress.targets.legality import check_legality
    from fusepress.targets.predict import predict_latency
    from fusepress.targets.profile import load_profile

    profile = load_profile(target, base=Path())
    check_legality(profile, precision)
    prediction = predict_latency(model, profile, precision, mode=mode, sparse=sparse, dla=dla)
    if as_json:
        click.echo(json.dumps(prediction_json(prediction), indent=1))
    else:
        _print_lines(prediction_lines(prediction))
    return 0


@targets.command("fit")
@click.argument("measurements", type=click.Path(path_type=Path))
@click.option("--out", type=click.Path(path_type=Path), help="Profile to write [TARGET.yaml beside MEASUREMENTS].")
@_json_option
def targets_fit(measurements: Path, out: Path | None, as_json: bool) -> int:
    """Refine the prediction for a device with latencies that you measured, as a profile that wins beside a recipe."""
    from fusepress.pipeline.store import atomic_write_text
    from fusepress.pipeline.text import fit_json, fit_lines
    from fusepress.targets.fit import measured_rows, measured_target, overlay_text, read_measurements, refine

    given = read_measurements(measurements)
    profile = measured_target(given, measurements.parent)
    path = out or measurements.parent / f"{profile.name}.yaml"
    if path.exists():
        raise UsageError(f"expected a new file; got {path}, which exists; name another with --out or remove it")
    rows = measured_rows(given, measurements.parent, profile)
    fit = refine(rows, profile)
    atomic_write_text(path, overlay_text(profile, fit, f"fusepress targets fit {measurements.name}", rows))
    if as_json:
        click.echo(json.dumps({**fit_json(fit, len(rows)), "profile": str(path)}, indent=1))
    else:
        _print_lines([*fit_lines(fit, len(rows)), f"wrote {path}"])
    return 0


@targets.command("doctor")
@click.argument("host")
@click.option("--ssh-config", type=click.Path(path_type=Path), help="In place of your own ssh configuration.")
@click.option("--target", help="What the device should be.")
@click.option("--mode", help="Power mode that latency is judged in [the profile's default].")
@_json_option
def targets_doctor(host: str, ssh_config: Path | None, target: str | None, mode: str | None, as_json: bool) -> int:
    """Look at the device HOST over SSH: is a latency that is measured there worth something? Exit code 3 if not."""
    from fusepress.pipeline.on_device import DeviceSettings, examine_device
    from fusepress.pipeline.text import doctor_lines
    from fusepress.targets.profile import load_profile

    profile = load_profile(target) if target is not None else None
    facts, findings = examine_device(DeviceSettings(host=host, ssh_config=ssh_config), profile, mode)
    if as_json:
        found = [{"level": f.level, "what": f.what, "text": f.text} for f in findings]
        click.echo(json.dumps({"device": facts.to_dict(), "findings": found}, indent=1))
    else:
        _print_lines(doctor_lines(facts, findings))
    return EXIT_GATE_FAILED if any(f.level == "refuse" for f in findings) else 0


def _self_test(out: Path, seconds: float, as_json: bool) -> int:
    from fusepress.pipeline import api
    from fusepress.pipeline.console import Reporter
    from fusepress.pipeline.text import self_test_lines

    record = api.self_test(out, seconds=seconds, reporter=Reporter(quiet=as_json))
    if as_json:
        click.echo(json.dumps(record, indent=1))
    else:
        _print_lines([*self_test_lines(record), f"wrote     {out}: send it back with an issue to have this confirmed"])
    return 0


def _measured_json(measured: Measured) -> dict[str, Any]:
    rows = {m.name.removeprefix("latency."): m.model_dump(exclude_none=True) for m in measured.measurements}
    verdicts = [v.model_dump(exclude_none=True) for v in measured.verdicts]
    return {"measurements": rows, "verdicts": verdicts, "environment": measured.environment}


def _tell(outcome: Outcome, as_json: bool, fail_on: FailOn) -> int:
    from fusepress.pipeline.gates import exit_code

    assert outcome.record.verdict is not None
    if as_json:
        click.echo(outcome.record.to_json(), nl=False)
    else:
        from fusepress.pipeline.text import outcome_lines, print_verdicts

        print_verdicts(_verdicts(outcome))
        _print_lines(outcome_lines(outcome))
    return exit_code(outcome.record.verdict, fail_on)


def _verdicts(outcome: Outcome) -> list[Verdict]:
    verify = outcome.record.stage("verify")
    return verify.verdicts if verify is not None else []


def _print_lines(lines: Sequence[str]) -> None:
    for line in lines:
        click.echo(line)
