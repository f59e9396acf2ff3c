"""What the documents promise: links lead somewhere, commands parse, and (long) the commands do what they say."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from fusepress.pipeline.cli import cli

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    p for p in ROOT.rglob("*.md") if not {".venv", "runs", "build", ".pytest_cache"} & set(p.relative_to(ROOT).parts)
)
COMMAND = re.compile(r"^\s*(?:\.venv/bin/)?(fusepress .*?)(?:\s+#.*)?$", re.MULTILINE)


def _commands(path: Path) -> list[str]:
    blocks = re.findall(r"```(?:\w*)\n(.*?)```|((?:^    .*\n)+)", path.read_text(), re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`(fusepress [^`]+)`", path.read_text())
    found = [command for block in blocks for command in COMMAND.findall("".join(block))]
    return [*found, *inline]


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_link_leads_to_a_file(path: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)[^)]*\)", path.read_text()):
        if "://" not in target:
            assert (path.parent / target).exists(), target


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda p: p.relative_to(ROOT).as_posix())
def test_every_command_in_the_documents_parses(path: Path) -> None:
    for command in _commands(path):
        words = shlex.split(command.replace("...", ""))[1:]
        if not words or words[0] in ("|",):
            continue
        group: click.Command = cli
        context = click.Context(cli)
        while isinstance(group, click.Group) and words and not words[0].startswith("-"):
            name = words.pop(0).split("|")[0]
            found = group.get_command(context, name)
            assert found is not None, command
            group = found
        if words and not any(word.isupper() and "|" in word for word in words):
            group.make_context("x", list(words), resilient_parsing=True)


def test_the_readme_shows_a_picture_of_a_report() -> None:
    assert (ROOT / "docs/report.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.long
def test_init_plan_and_compress_as_the_readme_says(tmp_path: Path) -> None:
    bin_folder = Path(sys.executable).parent
    environment = {**os.environ, "PATH": f"{bin_folder}:{os.environ['PATH']}"}
    for verb in ("init mytask", "plan mytask/recipe.yaml", "compress mytask/recipe.yaml", "gate runs/mytask-host-cpu"):
        result = subprocess.run(
            ["fusepress", *verb.split()], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert result.returncode == 0, result.stdout + result.stderr
    assert (tmp_path / "runs/mytask-host-cpu/report.html").exists()


@pytest.mark.long
@pytest.mark.parametrize(
    ("target", "artifact"),
    [
        ("rtx-4090", "engine"),
        ("jetson-agx-orin-64gb", "build_kit"),
        ("host-cpu", "onnx"),
    ],
)
def test_street_reaches_every_kind_of_target(
    tmp_path_factory: pytest.TempPathFactory, target: str, artifact: str
) -> None:
    from fusepress.pipeline.api import compress

    base = tmp_path_factory.getbasetemp() / "street"
    quick = ["finetune.steps=2", "score.method=magnitude", "verify.replicates=200"]
    outcome = compress(ROOT / "examples/street/recipe.yaml", target=target, run=base / target, overrides=quick)
    assert artifact in outcome.record.artifacts
    latency = [
        m
        for m in outcome.record.stage("verify").measurements  # type: ignore[union-attr]
        if m.name == "latency.mean_ms"
    ]
    assert [m.kind for m in latency] == ["measured" if target == "host-cpu" else "predicted"]
