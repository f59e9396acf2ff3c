"""The CI examples, tried as they are on the task of `fusepress init`; then the bundle that they end with."""

from __future__ import annotations

import hashlib
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tarfile
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import click
import numpy as np
import pytest
import yaml

from fusepress.pipeline.bundling.archive import (
    MOST_FILES,
    ArchiveError,
    check_names,
    read_entries,
    unpack,
    unsafe,
    write_archive,
)
from fusepress.pipeline.bundling.manifest import (
    ABOVE,
    MANIFEST_JSON,
    SIGNATURE_JSON,
    Manifest,
    digest_line,
    list_files,
    read_manifest,
)
from fusepress.pipeline.bundling.reproduce import compare_stage
from fusepress.pipeline.bundling.signature import sign
from fusepress.pipeline.bundling.verify import Verified, verify_bundle
from fusepress.pipeline.cli import cli
from fusepress.pipeline.cli import run as fusepress
from fusepress.pipeline.errors import StoreError, UsageError
from fusepress.pipeline.evidence import Measurement, StageRecord, read_run
from fusepress.pipeline.store import sha256_file

pytestmark = pytest.mark.timeout(1800)  # a whole lane of CI: half a minute, or twenty on a machine that is overloaded

ROOT = Path(__file__).resolve().parent.parent
CI = ROOT / "examples/ci"
GITHUB: dict[str, Any] = yaml.safe_load((CI / "github.yml").read_text())
GITLAB: dict[str, Any] = yaml.safe_load((CI / "gitlab-ci.yml").read_text())
QUICK = {
    "task": "task.py:MyTask",
    "checkpoint": "dense.safetensors",
    "target": "host-cpu",
    "score": {"method": "magnitude"},
    "prune": {"macs": 0.6, "align": 8},
    "finetune": {"steps": 4, "lr": 1e-4},
    "verify": {"replicates": 200},
    "gates": {"latency": {"mean_ms": 10000}, "floors": {"miou": 0.01}},
}


def _scripts(job: dict[str, Any]) -> list[str]:
    """What a job of either system runs, in order, without the installation."""
    if "steps" in job:
        return [s["run"] for s in job["steps"] if "run" in s and s.get("name") != "Install"]
    return list(job["script"])


def _run(scripts: list[str], folder: Path, variables: dict[str, str]) -> str:
    said = ""
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    for script in scripts:
        result = subprocess.run(
            ["bash", "-e", "-o", "pipefail", "-c", script],
            cwd=folder,
            env={**os.environ, **variables, "PATH": path, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            check=False,
        )
        said += result.stdout + result.stderr
        assert result.returncode == 0, f"{script}\n{said}"
    return said


def _key(folder: Path) -> tuple[Path, Path]:
    """A private and a public Ed25519 key as PEM files."""
    from cryptography.hazmat.primitives import serialization as s
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key, folder = Ed25519PrivateKey.generate(), folder.resolve()
    private, public = folder / "key.pem", folder / "public.pem"
    private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(s.Encoding.PEM, s.PublicFormat.SubjectPublicKeyInfo))
    return private, public


@pytest.fixture(scope="module")
def project(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A project whose GitHub lanes without a GPU have run: runs/release, unsigned and signed bundles."""
    folder = tmp_path_factory.mktemp("ci") / "mine"
    assert fusepress(["init", str(folder)]) == 0
    text = (folder / "task.py").read_text()
    (folder / "task.py").write_text(text.replace("self.build_model(), 400", "self.build_model(), 15"))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(QUICK))
    private, _ = _key(folder)
    variables = {key: str(value) for key, value in GITHUB["env"].items()}
    files = {"GITHUB_STEP_SUMMARY": str(folder / "step.md"), "RUNNER_TEMP": str(folder)}
    key = {"SIGNING_KEY": private.read_text().strip()}
    private.unlink()
    _run(_scripts(GITHUB["jobs"]["compress"]), folder, variables | files)
    _run(_scripts(GITHUB["jobs"]["sign"]), folder, variables | files | key)
    assert not private.exists(), "the lane removes the key from the disk"
    return folder


def test_the_github_lane_leaves_summary_run_and_bundle(project: Path) -> None:
    assert (project / "step.md").read_text() == (project / "runs/release/summary.md").read_text()
    assert read_run(project / "runs/release").verdict == "PASS"
    kinds = {
        name: _status(verify_bundle(project / f"{name}.bundle.tar"))["signature"] for name in ("unsigned", "release")
    }
    assert kinds == {"unsigned": "not checked", "release": "not checked"}
    assert "not signed" in _why_of(verify_bundle(project / "unsigned.bundle.tar"), "signature")
    assert "whose it is" in _why_of(verify_bundle(project / "release.bundle.tar"), "signature")
    cached = {step["with"]["path"] for step in GITHUB["jobs"]["compress"]["steps"] if "cache/" in step.get("uses", "")}
    assert cached == {"runs/.store"}
    assert (project / "runs/.store").is_dir()


def test_junit_has_a_case_for_each_gate(project: Path) -> None:
    path = project / GITLAB["compress"]["artifacts"]["reports"]["junit"]
    suites = {s.get("name"): [c.get("name") for c in s] for s in ElementTree.fromstring(path.read_text())}
    assert suites["gates"] == ["latency.mean_ms", "floors.miou"]


def test_the_gitlab_lane_reuses_the_cached_stages(project: Path) -> None:
    shutil.rmtree(project / "runs/release")  # another machine: only the cache of the store is there
    variables = {key: str(value) for key, value in GITLAB["variables"].items()}
    private, _ = _key(project)
    said = _run(_scripts(GITLAB["compress"]), project, variables)
    said += _run(_scripts(GITLAB["sign"]), project, {**variables, "SIGNING_KEY": str(private)})
    record = read_run(project / "runs/release")
    assert {s.status for s in record.stages} <= {"cached", "skipped"}
    assert said.count("every check passed") == 2
    assert GITLAB["compress"]["cache"]["paths"] == ["runs/.store"]


@pytest.mark.parametrize("job", [GITHUB["jobs"]["device"], GITLAB["device"]], ids=["github", "gitlab"])
def test_the_device_lane_is_a_command_that_parses(job: dict[str, Any]) -> None:
    commands = [line for script in _scripts(job) for line in script.splitlines() if line.startswith("fusepress")]
    assert commands
    for command in commands:
        verb, *words = shlex.split(command)[1:]
        found = cli.get_command(click.Context(cli), verb)
        assert found is not None
        found.make_context(verb, words, resilient_parsing=False)


def test_no_script_pastes_an_expression_into_the_shell() -> None:
    """Values reach the shell as variables: `${{ ... }}` in a script is how a branch name becomes a command."""
    for job in GITHUB["jobs"].values():
        assert not [s for s in _scripts(job) if "${{" in s]
    assert GITHUB["permissions"] == {"contents": "read"}


def test_no_job_that_runs_a_pull_requests_code_can_sign() -> None:
    """The task is code, so a job that runs it for a pull request must not hold the key; nor may it check out any."""
    signing = {name for name, job in GITHUB["jobs"].items() if "secrets." in json.dumps(job)}
    assert signing == {"sign"}
    job = GITHUB["jobs"]["sign"]
    assert (job["if"], job["environment"]) == ("github.event_name != 'pull_request'", "release")
    assert not [step for step in job["steps"] if "checkout" in step.get("uses", "")]
    assert not any("compress" in script for script in _scripts(job))
    keyed = {name for name, job in GITLAB.items() if "SIGNING_KEY" in json.dumps(job)}
    assert keyed == {"sign"}
    assert GITLAB["sign"]["rules"][0] == {"if": '$CI_PIPELINE_SOURCE == "merge_request_event"', "when": "never"}
    assert GITLAB["sign"]["variables"] == {"GIT_STRATEGY": "none"}


def test_the_container_file_copies_what_there_is() -> None:
    text = (CI / "Containerfile").read_text()
    assert (ROOT / "constraints.txt").is_file()
    assert re.search(r"^USER (?!root)", text, re.MULTILINE), "it does not run as root"
    assert text.index("USER runner") < text.index("ENTRYPOINT")


# --------------------------------------------------------------------------------------------------------- the bundle


@pytest.fixture(scope="module")
def signed(project: Path) -> tuple[Path, Path, Path]:
    """Bundle, private key and public key."""
    private, public = _key(project)
    path = project / "signed.bundle.tar"
    assert fusepress(["bundle", str(project / "runs/release"), "--out", str(path), "--key", str(private)]) == 0
    return path, private, public


@pytest.fixture
def folder(signed: tuple[Path, Path, Path], tmp_path: Path) -> Path:
    """The signed bundle, unpacked."""
    target = tmp_path / "unpacked"
    target.mkdir()
    unpack(signed[0], target)
    return target


def _status(found: Verified) -> dict[str, str]:
    return {check.name: check.status for check in found.checks}


def _why_of(found: Verified, name: str) -> str:
    return next(check.why for check in found.checks if check.name == name)


def _why(found: Verified) -> str:
    return "; ".join(check.why for check in found.checks if check.status == "failed")


def test_a_bundle_verifies_and_says_what_it_cannot_check(signed: tuple[Path, Path, Path]) -> None:
    path, _, public = signed
    found = verify_bundle(path, key=public)
    assert found.ok
    assert _status(found) == {
        "hashes": "ok",
        "signature": "ok",
        "run record": "ok",
        "verdict": "ok",
        "onnx": "ok",
        "plan": "ok",
        "masks": "not checked",
        "parity": "ok",
    }
    assert any("neither data nor task are in the bundle" in note for note in found.not_checked)
    unsure = {c.name: c for c in verify_bundle(path).checks}["signature"]
    assert unsure.status == "not checked"
    assert "whose it is, --key PUBLIC.pem tells" in unsure.why


def test_a_bundle_holds_the_run_and_its_papers(folder: Path) -> None:
    names = set(read_manifest(folder).files)
    assert {"run.json", "recipe.json", "report.html", "junit.xml", "summary.md", "bom.cdx.json"} <= names
    assert {"prune/plan.json", "export/model.onnx", "verify/references.safetensors", "verify/replicates.npz"} <= names
    assert not [name for name in names if name.endswith((".py", ".pkl", ".lock", "log.txt"))]


def test_the_same_run_and_key_give_the_same_bytes(project: Path, signed: tuple[Path, Path, Path]) -> None:
    again = project / "again.bundle.tar"
    fusepress(["bundle", str(project / "runs/release"), "--out", str(again), "--key", str(signed[1])])
    assert again.read_bytes() == signed[0].read_bytes()


def test_an_ordinary_tar_reads_it(signed: tuple[Path, Path, Path]) -> None:
    with tarfile.open(signed[0]) as archive:
        members = archive.getmembers()
    assert all(member.isreg() for member in members)
    assert [m.name for m in members[:3]] == list(ABOVE)


def test_a_flipped_byte_in_any_file_is_found_and_the_file_named(folder: Path, signed: tuple[Path, Path, Path]) -> None:
    generator = np.random.default_rng(0)
    names = [p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file()]
    assert len(names) > 15
    for name in names:
        path = folder / name
        content = path.read_bytes()
        for place in {0, len(content) - 1, int(generator.integers(len(content)))}:
            damaged = bytearray(content)
            damaged[place] ^= 1 << int(generator.integers(8))
            path.write_bytes(damaged)
            found = verify_bundle(folder)  # without a key: it must not need one
            assert not found.ok, (name, place)
            assert name in _why(found) or (name == "manifest.sha256" and MANIFEST_JSON in _why(found)), (name, place)
        path.write_bytes(content)
    assert verify_bundle(folder, key=signed[2]).ok


def test_a_flipped_byte_anywhere_in_the_archive_is_found(signed: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """Headers, padding and the end, too: every entry's header and padding, and the end."""
    content = signed[0].read_bytes()
    entries = list(read_entries(signed[0]))
    places = {e.name: [e.offset - 512 + k for k in (0, 105, 130, 150, 156, 160, 260, 330, 500)] for e in entries}
    for entry in entries:
        places[entry.name] += [entry.offset + entry.size] if entry.size % 512 else []
    places["its end"] = [len(content) - 1, len(content) - 1024]
    copy, out = tmp_path / "copy.tar", tmp_path / "out"
    for name, where in places.items():
        for place in where:
            damaged = bytearray(content)
            damaged[place] ^= 0x20
            copy.write_bytes(damaged)
            out.mkdir()
            with pytest.raises(ArchiveError):
                unpack(copy, out)
            shutil.rmtree(out)
        found = verify_bundle(copy)
        assert not found.ok
        assert name in _why(found)


@pytest.mark.parametrize("cut", [1, 511, 1024, 5000])
def test_a_bundle_that_is_cut_short_is_refused(signed: tuple[Path, Path, Path], tmp_path: Path, cut: int) -> None:
    copy = tmp_path / "copy.tar"
    copy.write_bytes(signed[0].read_bytes()[:-cut])
    assert not verify_bundle(copy).ok
    copy.write_bytes(signed[0].read_bytes() + bytes(512))
    assert not verify_bundle(copy).ok


def test_added_missing_and_linked_files_are_named(folder: Path, tmp_path: Path) -> None:
    (folder / "extra.txt").write_text("x")
    assert "extra.txt: it is not in the manifest" in _why(verify_bundle(folder))
    (folder / "extra.txt").unlink()
    outside = tmp_path / "outside"
    shutil.move(folder / "run.json", outside)
    assert "run.json: it is missing" in _why(verify_bundle(folder))
    (folder / "run.json").symlink_to(outside)
    assert "run.json: it is a link" in _why(verify_bundle(folder))


def _rewrite(folder: Path, name: str, content: bytes, key: Path | None = None) -> None:
    """What a forger can do: change a file, and the manifest with it."""
    (folder / name).write_bytes(content)
    old = read_manifest_unchecked(folder)
    files = list_files({listed: folder / listed for listed in old.files})
    manifest = old.model_copy(update={"files": files}).to_bytes()
    (folder / MANIFEST_JSON).write_bytes(manifest)
    (folder / "manifest.sha256").write_bytes(digest_line(manifest))
    (folder / SIGNATURE_JSON).unlink(missing_ok=True)
    if key is not None:
        from fusepress.pipeline.bundling.signature import load_private_key

        (folder / SIGNATURE_JSON).write_bytes(sign(manifest, load_private_key(key)).to_bytes())


def _retold(folder: Path, **changes: Any) -> bytes:
    """run.json as a forger would write it anew, with its hash."""
    return read_run(folder).model_copy(update=changes).to_json().encode()


def read_manifest_unchecked(folder: Path) -> Manifest:
    return Manifest.model_validate_json((folder / MANIFEST_JSON).read_text())


def test_a_forger_without_the_key_is_found_out(folder: Path, signed: tuple[Path, Path, Path], tmp_path: Path) -> None:
    content = (folder / "summary.md").read_bytes() + b"\nall is well\n"
    _rewrite(folder, "summary.md", content)
    assert "expected a signature; got no signature.json" in _why(verify_bundle(folder, key=signed[2]))
    (tmp_path / "own").mkdir()
    own, _ = _key(tmp_path / "own")
    _rewrite(folder, "summary.md", content, own)
    assert "expected a signature by the key" in _why(verify_bundle(folder, key=signed[2]))


def test_a_prettier_verdict_is_judged_again(folder: Path) -> None:
    recipe = json.loads((folder / "recipe.json").read_text())
    recipe["gates"]["floors"]["miou"] = 0.99
    content = json.dumps(recipe).encode()
    _rewrite(folder, "recipe.json", content)
    assert "expected the recipe.json that run.json names; got other bytes at recipe.json" in _why(verify_bundle(folder))
    _rewrite(folder, "run.json", _retold(folder, recipe_json_sha256=hashlib.sha256(content).hexdigest()))
    assert "judged again it is FAIL, run.json says PASS" in _why(verify_bundle(folder))


def test_other_weights_in_the_onnx_are_found_by_the_references(folder: Path) -> None:
    import onnx
    from onnx import numpy_helper

    path = folder / "export/model.onnx"
    proto = onnx.load(str(path))
    weight = next(t for t in proto.graph.initializer if len(t.dims) == 4)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * np.float32(1.05), weight.name))
    record = read_run(folder)
    _rewrite(folder, "export/model.onnx", proto.SerializeToString())
    new = read_manifest(folder).files["export/model.onnx"].sha256
    record.artifacts["onnx"].sha256 = new
    for stage in record.stages:
        stage.files |= {"model.onnx": new} if stage.name == "export" else {}
    _rewrite(folder, "run.json", record.to_json().encode())
    said = {c.name: c for c in verify_bundle(folder).checks}
    assert said["parity"].status == "failed"
    assert "expected the reference outputs within" in said["parity"].why
    assert said["verdict"].status == "failed", "the replicates are of another ONNX"


def test_weights_outside_of_the_onnx_are_refused(folder: Path) -> None:
    import onnx

    path = folder / "export/model.onnx"
    proto = onnx.load(str(path))
    weight = next(t for t in proto.graph.initializer if len(t.dims) == 4)
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value="../../../../etc/passwd")
    _rewrite(folder, "export/model.onnx", proto.SerializeToString())
    said = {c.name: c for c in verify_bundle(folder).checks}
    assert "expected weights within the file" in said["onnx"].why


def test_a_path_out_of_the_bundle_is_not_followed(folder: Path) -> None:
    record = read_run(folder)
    record.artifacts["onnx"].path = "../../outside.onnx"
    _rewrite(folder, "run.json", record.to_json().encode())
    found = verify_bundle(folder)
    assert _status(found)["run record"] == _status(found)["onnx"] == _status(found)["parity"] == "failed"
    assert "expected the onnx within the bundle; got the path '../../outside.onnx'" in _why(found)


@pytest.mark.parametrize("content", [b"", b"{", b"[" * 100_000, b'{"schema": 1}', b"\xff\xfe"])
def test_any_manifest_ends_in_a_failed_check(folder: Path, content: bytes) -> None:
    (folder / MANIFEST_JSON).write_bytes(content)
    (folder / "manifest.sha256").write_bytes(digest_line(content))
    found = verify_bundle(folder)
    assert not found.ok
    assert MANIFEST_JSON in _why(found)


def test_the_bill_of_materials_is_cyclonedx(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        validation = pytest.importorskip("cyclonedx.validation.json")
        from cyclonedx.schema import SchemaVersion

        text = (folder / "bom.cdx.json").read_text()
        try:
            assert validation.JsonStrictValidator(SchemaVersion.V1_6).validate_str(text) is None
        except ImportError:  # the library's own extra
            pytest.skip("cyclonedx-python-lib[json-validation] is not installed")
    bom = json.loads(text)
    model = bom["metadata"]["component"]
    assert model["type"] == "machine-learning-model"
    assert model["hashes"] == [{"alg": "SHA-256", "content": read_run(folder).artifacts["onnx"].sha256}]
    metrics = model["modelCard"]["quantitativeAnalysis"]["performanceMetrics"]
    assert any(metric["type"].startswith("accuracy.miou") and "confidenceInterval" in metric for metric in metrics)
    assert {"torch", "onnx"} <= {part["name"] for part in bom["components"]}


def test_the_command_line_tells_and_exits_as_it_should(
    folder: Path, signed: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fusepress(["verify", str(signed[0]), "--key", str(signed[2]), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["ok"] is True
    assert told["verdict"] == "PASS"
    (folder / "run.json").write_text("{}")
    assert fusepress(["verify", str(folder)]) == 5
    assert "do not use it" in capsys.readouterr().out
    assert fusepress(["verify", str(folder / "nothing.tar")]) == 2
    assert "expected a bundle; got no file at" in capsys.readouterr().err


def test_a_run_that_did_not_pass_or_was_changed_is_not_bundled(
    project: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fusepress.pipeline.api import bundle

    run = tmp_path / "release"
    shutil.copytree(project / "runs/release", run)
    (run / "prune/plan.json").write_text("{}")
    with pytest.raises(
        StoreError, match=r"expected the plan\.json that the run recorded; got other bytes at .*prune/plan"
    ):
        bundle(run)
    shutil.copy(project / "runs/release/prune/plan.json", run / "prune/plan.json")
    stats = run / "baseline/dense_stats.npz"  # no artifact that a bundle names
    stats.write_bytes(stats.read_bytes()[:-1] + b"x")
    with pytest.raises(StoreError, match=r"expected the dense_stats\.npz that the run recorded; got other bytes"):
        bundle(run)
    shutil.copy(project / "runs/release/baseline/dense_stats.npz", stats)
    assert fusepress(["gate", str(run), "-o", "gates.floors.miou=0.99"]) == 3
    with pytest.raises(UsageError, match="expected a run that passed its gates; got FAIL"):
        bundle(run)
    recipe = json.loads((run / "recipe.json").read_text())
    recipe["gates"]["floors"]["miou"] = 0.99
    (run / "recipe.json").write_text(json.dumps(recipe))
    with pytest.raises(StoreError, match=r"expected the recipe\.json that the run recorded; got other bytes"):
        bundle(run, refused=True)
    (run / "run.json").write_bytes(_retold(run, recipe_json_sha256=sha256_file(run / "recipe.json")))
    made = bundle(run, refused=True)
    assert made.manifest.verdict == "FAIL"
    assert "not signed" in made.notes[-1]
    found = verify_bundle(made.path)
    assert found.ok
    assert found.verdict == "FAIL"
    capsys.readouterr()
    assert fusepress(["verify", str(made.path)]) == 3
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == lines[-1] == "release: every check passed; its verdict is FAIL"
    assert fusepress(["verify", str(made.path), "--json"]) == 3


@pytest.mark.parametrize("text", ["", "nonsense", "-----BEGIN PRIVATE KEY-----\nMC4=\n-----END PRIVATE KEY-----\n"])
def test_what_is_no_key_is_refused(project: Path, tmp_path: Path, text: str) -> None:
    from fusepress.pipeline.api import bundle, verify

    (tmp_path / "bad.pem").write_text(text)
    with pytest.raises(UsageError, match="expected an Ed25519 private key in PEM"):
        bundle(project / "runs/release", tmp_path / "b.tar", key=tmp_path / "bad.pem")
    with pytest.raises(UsageError, match="expected an Ed25519 public key in PEM"):
        verify(project / "release.bundle.tar", key=tmp_path / "bad.pem")


# ----------------------------------------------------------------------------------------------------------- reproduce


def test_a_bundle_is_reproduced_from_the_users_own_recipe(
    project: Path, signed: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert fusepress(["reproduce", str(signed[0]), "--recipe", str(project / "recipe.yaml"), "--json"]) == 0
    found = {row["stage"]: row["status"] for row in json.loads(capsys.readouterr().out)}
    assert {stage for stage, status in found.items() if status == "skipped"} >= {"sparsify", "build"}
    for stage in ("prune", "export"):
        assert found[stage] == "equal"
    assert "different" not in found.values()


def test_another_recipe_is_refused_with_what_differs(project: Path, signed: tuple[Path, Path, Path]) -> None:
    from fusepress.pipeline.api import reproduce

    with pytest.raises(
        UsageError, match="expected the recipe that the bundle was made from; got one that differs in finet"
    ):
        reproduce(signed[0], project / "recipe.yaml", overrides=["finetune.steps=5"])


def test_a_damaged_bundle_is_not_reproduced(project: Path, folder: Path) -> None:
    from fusepress.pipeline.api import reproduce

    (folder / "prune/plan.json").write_text("{}")
    with pytest.raises(StoreError, match=r"got others at prune/plan\.json"):
        reproduce(folder, project / "recipe.yaml")


def _figure(value: float, **changes: Any) -> Measurement:
    return Measurement(
        **{"name": "accuracy.miou", "value": value, "low": 0.5, "high": 0.7, "kind": "simulated", **changes}
    )


@pytest.mark.parametrize(
    ("stage", "value", "changed", "status"),
    [
        ("finetune", 0.9, False, "equal"),
        ("finetune", 0.6, True, "within"),
        ("finetune", 0.71, True, "different"),
        ("export", 0.6, True, "different"),
        ("prune", 0.6, False, "equal"),
    ],
)
def test_trained_stages_are_held_by_intervals_and_the_others_by_hashes(
    stage: str, value: float, changed: bool, status: str
) -> None:
    stored = StageRecord(name=stage, status="done", measurements=[_figure(0.6)])
    files = {"w": ("a" * 64, "b" * 64)} if changed else {}
    assert compare_stage(stage, [_figure(value)], stored, files).status == status


def test_a_stage_without_a_metric_says_so() -> None:
    found = compare_stage("score", [], StageRecord(name="score"), {"s": ("a" * 64, "b" * 64)})
    assert found.status == "within"
    assert "makes no metric" in found.why


# ------------------------------------------------------------------------------------------------------- the container


@pytest.mark.parametrize(
    "name",
    [
        "../x",
        "/x",
        "a/../x",
        "a//x",
        "",
        ".",
        "a/.",
        ".hidden",
        "-rf",
        "a\\x",
        "C:x",
        "a\nx",
        "a/ x",
        "x.",
        "é",
        "x" * 251,
    ],
)
def test_names_that_lead_elsewhere_are_refused(name: str, tmp_path: Path) -> None:
    assert unsafe(name) is not None
    (tmp_path / "f").write_text("x")
    with pytest.raises(StoreError, match="expected a plain relative file name"):
        write_archive(tmp_path / "a.tar", {name: tmp_path / "f"})


@pytest.mark.parametrize("names", [["a", "A"], ["a", "a"], ["a", "a/b"], ["A/c", "a"]])
def test_names_that_would_fall_on_each_other_are_refused(names: list[str]) -> None:
    with pytest.raises(StoreError):
        check_names(names)


def test_more_files_than_are_unpacked_are_not_written(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("x")
    names = [f"{number}" for number in range(MOST_FILES + 1)]
    with pytest.raises(
        StoreError, match=r"expected at most 10,000 files in a bundle, which is what is unpacked; got 1"
    ):
        write_archive(tmp_path / "a.tar", dict.fromkeys(names, tmp_path / "f"))
    assert not (tmp_path / "a.tar").exists()
    write_archive(tmp_path / "a.tar", dict.fromkeys(names[:-1], tmp_path / "f"))
    assert len(list(read_entries(tmp_path / "a.tar"))) == MOST_FILES


def _members() -> Iterator[tuple[str, tarfile.TarInfo]]:
    for kind in (
        tarfile.SYMTYPE,
        tarfile.LNKTYPE,
        tarfile.DIRTYPE,
        tarfile.FIFOTYPE,
        tarfile.CHRTYPE,
        tarfile.GNUTYPE_SPARSE,
    ):
        info = tarfile.TarInfo("a")
        info.type, info.linkname = kind, "/etc/passwd"
        yield kind.decode(), info
    up = tarfile.TarInfo("../a")
    yield "traversal", up
    root = tarfile.TarInfo("/a")
    yield "absolute", root
    mode = tarfile.TarInfo("a")
    mode.mode = 0o4755
    yield "set-uid", mode
    big = tarfile.TarInfo("a")
    big.size = 1 << 40
    yield "bomb", big
    long = tarfile.TarInfo("x" * 300)
    yield "long name", long


@pytest.mark.parametrize(("kind", "info"), list(_members()), ids=lambda v: v if isinstance(v, str) else "")
@pytest.mark.parametrize("form", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_hostile_archives_write_nothing(kind: str, info: tarfile.TarInfo, form: Any, tmp_path: Path) -> None:
    try:
        header = info.tobuf(form)
    except ValueError:
        return  # this form cannot hold it
    inside = tmp_path / "in/side"
    inside.mkdir(parents=True)
    (tmp_path / "bad.tar").write_bytes(header + bytes(1024))
    with pytest.raises(ArchiveError):
        unpack(tmp_path / "bad.tar", inside)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == ["bad.tar"]


def test_a_compressed_archive_is_none(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as archive:
        archive.addfile(tarfile.TarInfo("a"))
    (tmp_path / "a.tar").write_bytes(buffer.getvalue())
    with pytest.raises(ArchiveError, match="expected the header of a plain file"):
        list(read_entries(tmp_path / "a.tar"))
