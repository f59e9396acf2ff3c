"""Every bad input gives one clear message, its exit code, no traceback, and nothing half-written."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from fusepress.pipeline.cli import run

TEMPLATES = Path(__file__).resolve().parent.parent / "pipeline" / "templates"
RECIPE = {
    "task": "task.py:MyTask",
    "checkpoint": "dense.safetensors",
    "target": "jetson-agx-orin-64gb",
    "score": {"method": "magnitude"},
    "prune": {"macs": 0.5, "align": 8},
    "verify": {"replicates": 200},
}


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of the template's network, trained for three steps."""
    from fusepress.pipeline.task import load_task

    folder = tmp_path_factory.mktemp("weights")
    text = (TEMPLATES / "task.py.txt").read_text().replace("self.build_model(), 400", "self.build_model(), 3")
    (folder / "task.py").write_text(text)
    task = load_task("task.py:MyTask", base=folder)
    task.user.train_dense(folder / "dense.safetensors", lambda _fraction, _note: None)
    return folder / "dense.safetensors"


@pytest.fixture
def project(tmp_path: Path, weights: Path) -> Path:
    """A user's folder: task without train_dense, checkpoint, recipe."""
    text = (TEMPLATES / "task.py.txt").read_text()
    (tmp_path / "task.py").write_text(text.replace("def train_dense", "def train_it_myself"))
    (tmp_path / "dense.safetensors").write_bytes(weights.read_bytes())
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(RECIPE))
    return tmp_path


def _compress(project: Path, *arguments: str) -> int:
    return run(["compress", str(project / "recipe.yaml"), "--run", str(project / "runs/r"), *arguments])


def _edit(name: str, old: str, new: str) -> Callable[[Path], None]:
    def edit(project: Path) -> None:
        text = (project / name).read_text()
        assert old in text
        (project / name).write_text(text.replace(old, new))

    return edit


def _truncate(project: Path) -> None:
    data = (project / "dense.safetensors").read_bytes()
    (project / "dense.safetensors").write_bytes(data[: len(data) // 2])


def _poison(project: Path) -> None:
    tensors = load_file(project / "dense.safetensors")
    tensors["camera.0.0.weight"][0] = torch.nan
    save_file(tensors, project / "dense.safetensors")


def _other_architecture(project: Path) -> None:
    save_file({"backbone.weight": torch.zeros(3)}, project / "dense.safetensors")


def _pickle(project: Path) -> None:
    torch.save({"model": Path("evil")}, project / "dense.pt")
    _edit("recipe.yaml", "dense.safetensors", "dense.pt")(project)


Case = tuple[Callable[[Path], object], list[str], int, str]

BEFORE_THE_FIRST_STAGE: dict[str, Case] = {
    "missing checkpoint": (
        lambda p: (p / "dense.safetensors").unlink(),
        [],
        2,
        "expected a checkpoint file; got none at",
    ),
    "truncated checkpoint": (_truncate, [], 2, "dense.safetensors"),
    "checkpoint of another architecture": (_other_architecture, [], 2, "backbone.weight"),
    "NaN weights": (_poison, [], 2, "camera.0.0.weight"),
    "pickled checkpoint": (_pickle, [], 2, "dense.pt"),
    "branch that does not exist": (_edit("task.py", '["camera"],', '["camra"],'), [], 2, "got 'camra'"),
    "build_model raises": (
        _edit("task.py", "return Net()", "return Net(3)"),
        [],
        2,
        "build_model() to make the dense model",
    ),
    "unknown key": (_edit("recipe.yaml", "prune:", "prun:"), [], 2, "did you mean `prune`?"),
    "unknown target": (lambda _: None, ["--target", "jetson-orin"], 2, "jetson-orin"),
    "unknown power mode": (lambda _: None, ["-o", "power_mode=99W"], 2, "99W"),
    "FP8 on Orin": (lambda _: None, ["-o", "quantize.precision=fp8"], 2, "got FP8"),
    "unknown metric": (lambda _: None, ["-o", "gates.floors.iou_dog=0.5"], 2, "got 'iou_dog'"),
    "unknown failure": (
        lambda _: None,
        ["-o", "gates.robustness.radar_blank.max_extra_drop=0.1"],
        2,
        "got 'radar_blank'",
    ),
    "failure at no severity": (
        lambda _: None,
        ["-o", "gates.robustness.camera_noise@4.max_extra_drop=0.1"],
        2,
        "expected a severity of 1, 2 or 3 behind the @",
    ),
    "failure of an input that nobody described": (
        lambda _: None,
        ["-o", "gates.robustness.lidar_rotate@1.max_extra_drop=0.1"],
        2,
        "input_layouts to say what ['lidar'] are for lidar_rotate",
    ),
    "one of several cameras lost where there is one": (
        lambda _: None,
        ["-o", "gates.robustness.camera_lost.max_extra_drop=0.1"],
        2,
        "expected several sensors of one modality",
    ),
    "scores that no dead sensor changes": (
        lambda _: None,
        ["-o", "score={method: magnitude, robustness: 0.5}"],
        2,
        "expected a method that reads data with `robustness`",
    ),
    "unknown branch budget": (lambda _: None, ["-o", "prune.branches.radar=0.5"], 2, "got 'radar'"),
    "absent data folder": (lambda _: None, ["-o", "data=nowhere"], 2, "expected `data` to name an existing folder"),
    "fine-tuning an ONNX file": (lambda _: None, ["-o", "checkpoint=m.onnx"], 2, "an ONNX file enters at quantize"),
}


@pytest.mark.parametrize("case", BEFORE_THE_FIRST_STAGE)
def test_a_wrong_input_is_refused_before_anything_is_written(
    case: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    spoil, arguments, code, message = BEFORE_THE_FIRST_STAGE[case]
    spoil(project)
    assert _compress(project, *arguments) == code
    said = capsys.readouterr()
    assert message in said.err
    assert said.err.startswith("error: expected ")
    assert said.err.count("error:") == 1
    assert "Traceback" not in said.err
    assert not (project / "runs").exists()


UNSUPPORTED = """
    def forward(self, image: Tensor, lidar: Tensor) -> Tensor:
        x = self.fuser(torch.cat([self.camera(image), self.lidar(lidar)], dim=1))
        return self.head(x) * torch.det(torch.eye(4) + 0.1 * x[:, :4, 0, :4])[:, None, None, None]
"""
FORWARD = """
    def forward(self, image: Tensor, lidar: Tensor) -> Tensor:
        return self.head(self.fuser(torch.cat([self.camera(image), self.lidar(lidar)], dim=1)))
"""
DATA_DEPENDENT = FORWARD.replace(
    "        return", "        if lidar.sum() > 3:\n            image = image * 2\n        return"
)

DURING_A_STAGE: dict[str, Case] = {
    "impossible budget": (lambda _: None, ["-o", "prune.macs=0.001"], 2, "expected prune.macs >= "),
    "no full trace": (_edit("task.py", FORWARD, DATA_DEPENDENT), ["-o", "prune=null"], 5, "control flow"),
    "operator the engine lacks": (
        _edit("task.py", FORWARD, UNSUPPORTED),
        ["-o", "prune=null", "-o", "quantize.precision=fp32", "--target", "rtx-4090"],
        5,
        "Det",
    ),
    "training diverges": (lambda _: None, ["-o", "finetune.steps=4", "-o", "finetune.lr=1.0e+30"], 5, "finite"),
}


@pytest.mark.parametrize("case", DURING_A_STAGE)
def test_a_stage_that_fails_says_why_and_leaves_no_half_made_output(
    case: str, project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fusepress.pipeline.evidence import read_run

    spoil, arguments, code, message = DURING_A_STAGE[case]
    spoil(project)
    assert _compress(project, *arguments) == code
    said = capsys.readouterr()
    error = said.err[said.err.index("error: expected") :]
    assert message in error
    assert "Traceback" not in said.err
    failed = [stage for stage in read_run(project / "runs/r").stages if stage.status == "failed"]
    assert len(failed) == 1
    assert message in str(failed[0].why)
    assert not (project / "runs/r" / failed[0].name).exists()
    assert not list((project / "runs/.store").glob("aside-*"))


FULL_DISK = textwrap.dedent("""
    import resource, signal, sys
    from fusepress.pipeline.cli import run
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))  # no file may grow beyond this: writes fail for real
    sys.exit(run(sys.argv[1:]))
""")


def test_a_disk_that_takes_no_more_is_told_and_the_run_resumes(project: Path) -> None:
    command = ["compress", str(project / "recipe.yaml"), "--run", str(project / "runs/r")]
    result = subprocess.run(
        [sys.executable, "-c", FULL_DISK, *command], capture_output=True, text=True, check=False, cwd=project
    )
    assert result.returncode == 5, result.stderr
    assert "full disk" in result.stderr
    assert "Traceback" not in result.stderr
    assert not (project / "runs/r/baseline").exists()
    assert _compress(project) == 0


def test_a_run_folder_that_holds_other_files_is_left_alone(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["compress", str(project / "recipe.yaml"), "--run", str(project)]) == 2
    assert "which holds other files" in capsys.readouterr().err
    assert {path.name for path in project.iterdir()} == {"task.py", "dense.safetensors", "recipe.yaml"}


def test_two_runs_at_once_in_one_folder(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from fusepress.pipeline.store import folder_lock

    with folder_lock(project / "runs/r"):
        assert _compress(project) == 5
    assert "expected to be alone in the run folder" in capsys.readouterr().err
