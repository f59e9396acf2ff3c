from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from fusepress.pipeline.cli import cli, run

ROOT = Path(__file__).resolve().parent.parent


def test_help_names_every_verb_and_the_exit_codes() -> None:
    text = CliRunner().invoke(cli, ["--help"]).output
    for verb in (
        *("compress", "plan", "gate", "report", "measure", "init", "targets"),
        *("compare", "bundle", "verify", "reproduce"),
    ):
        assert re.search(rf"^  {verb}\b", text, re.MULTILINE)
    assert "3 a gate failed" in " ".join(text.split())


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["compress"], 2, "Missing argument 'RECIPE'"),
        (["compres", "x"], 2, "No such command 'compres'"),
        (["compress", "nowhere.yaml"], 2, "error: expected a recipe file; got none at nowhere.yaml"),
        (["compress", "x.yaml", "--colour"], 2, "No such option"),
        (["gate", "nowhere"], 2, "expected a run folder with run.json; got none at nowhere"),
        (["report", "nowhere"], 2, "expected a run folder with run.json"),
        (["measure", "nowhere.onnx"], 2, "expected a run folder or an ONNX file; got nowhere.onnx"),
        (["measure", "nowhere.onnx", "--budget", "p98=1"], 2, "expected a budget such as p99_ms=5"),
        (["targets", "show", "jetson-agx-orin"], 2, "jetson-agx-orin-64gb"),
        (["targets", "predict", "nowhere.onnx", "--target", "rtx-4090"], 2, "nowhere.onnx"),
    ],
)
def test_a_users_mistake_gives_one_message_and_no_traceback(
    arguments: list[str],
    code: int,
    message: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(arguments) == code
    said = capsys.readouterr()
    assert message in said.err
    assert "Traceback" not in said.err
    assert not list(tmp_path.iterdir())


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    from fusepress.pipeline.errors import RecipeError

    with pytest.raises(RecipeError):
        run(["--debug", "compress", str(tmp_path / "nowhere.yaml")])


def test_targets_cp_gives_a_copy_that_loads_and_never_overwrites(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from fusepress.targets.profile import load_profile

    assert run(["targets", "cp", "rtx-4090", str(tmp_path / "mine.yaml")]) == 0
    capsys.readouterr()
    copied = (tmp_path / "mine.yaml").read_text()
    (tmp_path / "rtx-4090.yaml").write_text(copied)
    assert load_profile(tmp_path / "rtx-4090.yaml").name == "rtx-4090"
    assert run(["targets", "cp", "rtx-4090", str(tmp_path / "mine.yaml")]) == 2
    assert "which exists" in capsys.readouterr().err


def test_targets_ls_lists_every_profile_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["targets", "ls", "--json"]) == 0
    names = {row["name"] for row in json.loads(capsys.readouterr().out)}
    assert {"host-cpu", "jetson-agx-orin-64gb", "drive-agx-orin", "rtx-4090"} <= names
    assert names == {path.stem for path in (ROOT / "targets/profiles").glob("*.yaml")}


def test_init_writes_what_it_says_and_never_overwrites(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["init", str(tmp_path / "new")]) == 0
    assert {p.name for p in (tmp_path / "new").iterdir()} == {"task.py", "recipe.yaml", "README.md"}
    before = (tmp_path / "new/task.py").read_text()
    assert run(["init", str(tmp_path / "new")]) == 2
    assert "which exists" in capsys.readouterr().err
    assert (tmp_path / "new/task.py").read_text() == before
