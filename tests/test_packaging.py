"""Guards of the packaging: what is installed, under which names, and that nothing of the user's shadows it."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

import fusepress

ROOT = Path(__file__).resolve().parent.parent
ROOMS = ("pipeline", "export", "calib", "targets")
IMPORTABLE = {"pipeline": "fusepress.pipeline", "export": "fusepress.export", "calib": "fusepress.calib"}


def _setuptools() -> dict[str, list[str]]:
    loaded: dict[str, list[str]] = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]
    return loaded


def _folders_with_code() -> dict[str, Path]:
    """Import name -> folder, of every folder that holds Python files."""
    found = {"fusepress": ROOT / "pipeline" / "_root"}
    for room in ROOMS:
        for init in (ROOT / room).rglob("__init__.py"):
            if "_root" not in init.parts:
                found["fusepress." + ".".join(init.parent.relative_to(ROOT).parts)] = init.parent
    return found


def test_the_package_list_equals_the_folder_walk() -> None:
    assert sorted(_setuptools()["packages"]) == sorted(_folders_with_code())


def test_every_folder_with_python_files_is_a_package() -> None:
    folders = {path.parent for room in ROOMS for path in (ROOT / room).rglob("*.py")}
    assert folders == set(_folders_with_code().values())


@pytest.fixture(scope="module")
def wheel_names(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    out = tmp_path_factory.mktemp("wheel")
    copy = tmp_path_factory.mktemp("source")
    ignored = {".venv", ".git", "build", "runs", "dist"}
    for name in (*ROOMS, "pyproject.toml", "README.md", "LICENSE"):
        assert name not in ignored
        subprocess.run(["cp", "-r", str(ROOT / name), str(copy / name)], check=True)
    command = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "-w",
        str(out),
        ".",
    ]
    subprocess.run(command, cwd=copy, check=True, capture_output=True)
    with zipfile.ZipFile(next(out.glob("*.whl"))) as wheel:
        return {name for name in wheel.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_exactly_the_files_of_the_packages(wheel_names: set[str]) -> None:
    expected = set()
    for name, folder in _folders_with_code().items():
        inside = name.replace(".", "/")
        expected |= {f"{inside}/{path.name}" for path in folder.glob("*.py")}
    expected |= {"fusepress/py.typed"}
    expected |= {f"fusepress/targets/profiles/{p.name}" for p in (ROOT / "targets/profiles").iterdir()}
    expected.add("fusepress/targets/device.sh")
    expected |= {f"fusepress/pipeline/templates/{p.name}" for p in (ROOT / "pipeline/templates").iterdir()}
    report = ROOT / "pipeline/report"
    expected |= {f"fusepress/pipeline/report/{p.name}" for p in report.iterdir() if p.suffix in (".j2", ".css")}
    assert wheel_names == expected


def test_a_hostile_working_directory_does_not_shadow_ours(tmp_path: Path) -> None:
    (tmp_path / "export.py").write_text("raise SystemExit('shadowed')")
    for name in ("calib", "targets", "pipeline"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise SystemExit('shadowed')")
    code = "import fusepress.calib, fusepress.export, fusepress.targets.profile as t; print(len(t.list_profiles()))"
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) > 10


def test_the_typing_tree_is_made_of_relative_links_to_the_code() -> None:
    links = {path.name: path for path in (ROOT / ".typing/fusepress").iterdir()}
    assert set(links) == {*ROOMS, "__init__.py", "__main__.py", "py.typed"}
    for path in links.values():
        assert path.is_symlink()
        assert not path.readlink().is_absolute()
        assert path.exists()


def test_every_public_name_can_be_loaded() -> None:
    for name in fusepress.__all__:
        assert getattr(fusepress, name) is not None
    with pytest.raises(AttributeError, match="public names are"):
        _ = fusepress.no_such_name


@pytest.mark.parametrize("arguments", [["--help"], ["targets", "ls", "--json"], ["--version"]])
def test_light_verbs_import_no_torch(arguments: list[str]) -> None:
    code = (
        "import sys; from fusepress.pipeline.cli import run; code = run(sys.argv[1:]); "
        "heavy = {'torch', 'onnx', 'onnxruntime', 'modelopt', 'matplotlib'} & set(sys.modules); "
        "print(sorted(heavy), file=sys.stderr); sys.exit(code or bool(heavy))"
    )
    result = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr


def test_no_pickle_and_no_binary_is_in_the_tree() -> None:
    allowed = {"examples/street/street.safetensors"}
    suspicious = {".pkl", ".pickle", ".pt", ".pth", ".onnx", ".engine", ".plan", ".npz", ".npy", ".safetensors"}
    skipped = {".venv", ".git", "runs", "build", "dist", ".mypy_cache", ".ruff_cache", ".pytest_cache", ".hypothesis"}
    found = {
        path.relative_to(ROOT).as_posix()
        for top in ROOT.iterdir()
        if top.name not in skipped
        for path in ([top] if top.is_file() else top.rglob("*"))
        if path.suffix in suspicious and "__pycache__" not in path.parts and "runs" not in path.parts
    }
    assert found <= allowed
