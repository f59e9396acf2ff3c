"""Puts the test double of the tensorrt module (tests/tensorrt_double.py) where the worker imports it."""

from __future__ import annotations

import importlib
import os
import shutil
import sys
from pathlib import Path

import pytest

from fusepress.export import engine


def play_tensorrt(version: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module called tensorrt that plays version 8, 10 or 11, beside an Orin that is a file and a script."""
    folder = tmp_path / "double"
    folder.mkdir()
    shutil.copy(Path(__file__).with_name("tensorrt_double.py"), folder / "tensorrt.py")
    (folder / "gpu").touch()
    (folder / "nvidia-smi").write_text("#!/bin/sh\necho '0, GPU-4f, Orin, 8.7, 540.4.0'\n")
    (folder / "nvidia-smi").chmod(0o755)
    monkeypatch.setattr(engine, "_GPU_FILES", (str(folder / "gpu"),))
    monkeypatch.syspath_prepend(str(folder))
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("TENSORRT_DOUBLE", str(version))
    monkeypatch.delitem(sys.modules, "tensorrt", raising=False)
    importlib.invalidate_caches()
