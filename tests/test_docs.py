"""What the documents promise: links lead somewhere, commands parse, recipes fit the schema, and (long) all of it runs.

`pytest -m long tests/test_docs.py -rs` runs every command of the front page and of docs/, page by page, and lists those
that it cannot run with what they need.
"""

from __future__ import annotations

import ast
import importlib
import itertools
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest

from fusepress.pipeline.cli import cli
from fusepress.pipeline.errors import EXIT_GATE_FAILED, EXIT_INCONCLUSIVE, RecipeError
from fusepress.pipeline.recipe import load_recipe
from fusepress.pipeline.reference import refusals, validate
from fusepress.targets.fit import read_measurements
from tests.documents import (
    NEEDS,
    PROGRAMS,
    ROOT,
    Block,
    anchors,
    blocks,
    documents,
    links,
    masked,
    not_shown_by,
    without_blocks,
)

EVERYWHERE = documents(all_of_them=True)
PAGES = documents()
BLOCKS = [block for path in EVERYWHERE for block in blocks(path)]
TYPED = [block for block in BLOCKS if block.is_commands]
RECIPES = sorted([*ROOT.glob("examples/*/*.yaml"), *ROOT.glob("pipeline/templates/*.yaml.txt")])
JUDGES = ("compress", "gate", "measure")  # they answer with an exit code
ANSWERS = (0, EXIT_GATE_FAILED, EXIT_INCONCLUSIVE)
KITTI = os.environ.get("FUSEPRESS_KITTI", "")  # a folder of KITTI frames
ASKS = "echo $?"
ALONE = ("tutorial.md",)  # pages that make all they use
CUT = re.compile(r"\s*(?:[|&;]{1,2}|>>?|2>).*$")


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _words(command: str) -> list[str]:
    return shlex.split(command.replace("\\\n", " "), comments=True)


def _fusepress(words: list[str], *, whole: bool) -> None:
    """Parse the words behind `fusepress` as the command line would, and look every override up in the schema.

    Args:
        words: of the command.
        whole: whether arguments may not be left out, as they may where a sentence names a verb.
    """
    group: click.Command = cli
    context = click.Context(cli)
    while isinstance(group, click.Group) and words and not words[0].startswith("-"):
        found = group.get_command(context, words[0])
        assert found is not None, words
        group, words = found, words[1:]
    try:
        group.make_context(group.name or "", [*words])
    except (click.MissingParameter, click.exceptions.NoArgsIsHelpError):
        assert not whole, words
    except click.exceptions.Exit:
        pass  # --help and --version
    for option, value in itertools.pairwise(words):
        if option in ("-o", "--override"):
            _override(value)


def _override(text: str) -> None:
    key, _, value = text.partition("=")
    for part in reversed(key.split(".")):
        value = f"{{{part}: {value}}}"
    unknown = [fault for fault in refusals(value) if "unknown key" in fault]
    assert not unknown, f"{text}: {unknown}"


@pytest.mark.parametrize("path", EVERYWHERE, ids=_name)
def test_every_link_leads_to_a_file_and_to_a_heading_of_it(path: Path) -> None:
    for target, anchor in links(path):
        leads_to = (path.parent / target).resolve() if target else path
        assert leads_to.exists(), target
        assert not anchor or anchor in anchors(leads_to), f"{target}#{anchor}"


@pytest.mark.parametrize("block", TYPED, ids=lambda block: block.where)
def test_every_command_is_one_that_can_be_typed(block: Block) -> None:
    assert block.commands()
    for command in block.commands():
        words = _words(CUT.sub("", command.text) if "|" in command.text else command.text)
        words = words[words.index("nice") + 3 :] if words[0] == "nice" else words
        while "=" in words[0]:  # a variable for this command
            words = words[1:]
        if "fusepress" in words[:6] and words[0] in ("fusepress", "torchrun"):
            _fusepress(words[words.index("fusepress") + 1 :], whole=True)
        elif words[0] == "python" and words[1].endswith(".py"):
            assert (ROOT / words[1]).exists(), command.text
        elif words[0] == "python" and words[1] == "-m":
            assert (ROOT / words[2].replace("fusepress.", "").replace(".", "/")).with_suffix(".py").exists()
        else:
            assert words[0] in PROGRAMS, command.text


@pytest.mark.parametrize("path", EVERYWHERE, ids=_name)
def test_every_command_named_in_a_sentence_parses(path: Path) -> None:
    for text in re.findall(r"`fusepress ([^`]+)`", without_blocks(path)):
        words = _words(CUT.sub("", text.replace("...", "")))
        if not any("|" in word for word in words):
            _fusepress(words, whole=False)


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language in ("yaml", "yml")], ids=lambda block: block.where)
def test_every_piece_of_yaml_fits_what_reads_it(block: Block, tmp_path: Path) -> None:
    if block.text.startswith("# measured.yaml"):
        path = tmp_path / "measured.yaml"
        path.write_text(block.text)
        assert read_measurements(path).rows
    elif block.text.startswith("# recipe.yaml") or "task:" in block.text:
        path = tmp_path / "recipe.yaml"
        path.write_text(block.text)
        assert load_recipe(path).recipe.task
    else:
        validate(block.text)


@pytest.mark.parametrize("path", RECIPES, ids=_name)
def test_every_recipe_of_the_repository_fits_the_schema(path: Path) -> None:
    if path.parent.name != "ci":
        assert load_recipe(path).recipe.task


@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=lambda block: block.where)
def test_every_piece_of_python_imports_what_there_is(block: Block) -> None:
    for node in ast.walk(ast.parse(block.text)):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fusepress"):
            module = importlib.import_module(str(node.module))
            assert all(hasattr(module, alias.name) for alias in node.names)


@pytest.mark.parametrize("path", [ROOT / "README.md", ROOT / "docs/stages.md"], ids=_name)
def test_figures_of_what_was_found_stand_in_the_files_that_are_linked(path: Path) -> None:
    found = [text for text in _paragraphs(path) if text.startswith("*Found*") or "benchmarks/results/" in text]
    figures = 0
    for text in found:
        held = _held_by(path, text)
        for figure in re.findall(r"\d+\.\d{3,}", re.sub(r"\]\([^)]*\)", "", text)):
            figures += 1
            half = 0.5 * 10.0 ** -len(figure.partition(".")[2])
            assert any(abs(abs(value) - float(figure)) <= half * 1.001 for value in held), f"{figure}: {text[:60]}"
    assert figures >= 2


def _paragraphs(path: Path) -> list[str]:
    return [" ".join(text.split()) for text in re.split(r"\n\n|\n(?=- )", without_blocks(path))]


def _held_by(path: Path, text: str) -> list[float]:
    files = [path.parent / target.partition("#")[0] for target in re.findall(r"\]\(([^)\s]+)\)", text)]
    texts = [file.read_text() for file in files if file.suffix in (".md", ".json")]
    return [float(number) for number in re.findall(r"\d+\.\d+", " ".join(texts))]


def test_what_cannot_be_run_says_what_it_needs() -> None:
    assert {block.needs for block in TYPED} - {""} <= set(NEEDS)
    run = [block for block in TYPED if not block.needs and block.path in PAGES]
    assert len(run) >= 10, "most of what a reader types has to be run"


# ---- the reading itself


def test_a_block_without_a_language_is_commands_where_its_first_line_is_one(tmp_path: Path) -> None:
    page = ROOT / "docs/page.md"  # never written: blocks are made here
    assert Block(page, 1, "", "", "# first\nfusepress plan r.yaml  # dry run\n").is_commands
    assert not Block(page, 1, "", "", "DRIVE/image_2/000000.png ...\n").is_commands
    assert not Block(page, 1, "yaml", "", "task: t\n").is_commands
    path = tmp_path / "page.md"
    path.write_text("# A `b` c\n\n```bash needs=device\nfusepress measure RUN\n```\n\n## A b c\n[x](y.md#z)\n")
    (found,) = blocks(path)
    assert (found.line, found.language, found.needs) == (4, "bash", "device")
    assert anchors(path) == {"a-b-c", "a-b-c-1"}
    assert links(path) == [("y.md", "z")]


def test_a_console_block_parts_commands_from_what_they_printed() -> None:
    block = Block(ROOT / "x.md", 1, "console", "", "$ fusepress a \\\n  b\none\ntwo\n$ echo $?\n3\n")
    assert [(c.text, c.shown) for c in block.commands()] == [
        ("fusepress a \\\n  b", ["one", "two"]),
        ("echo $?", ["3"]),
    ]


def test_what_is_shown_has_to_have_been_printed_in_order() -> None:
    real = "stage  one  0.75 miou\nnoise\nverdict PASS  1.2 ms\nsha 0a1b2c3d\n"
    assert not_shown_by(["stage one 0.31 miou", "...", "verdict PASS 3.4 ms", "sha ffff0000"], real) == []
    assert not_shown_by(["stage ...", "verdict PASS ..."], real) == []
    assert not_shown_by(["verdict FAIL 1.2 ms"], real) == ["verdict FAIL 1.2 ms"]
    assert not_shown_by(["verdict PASS 1.2 ms", "noise"], real) == ["noise"]
    assert masked("a  -1.5e-3 to +2") == masked("a 7 to 8")


def test_a_block_is_run_in_one_shell_whose_exit_codes_are_exact(tmp_path: Path) -> None:
    def typed(text: str, language: str = "console") -> None:
        _run(Block(ROOT / "x.md", 1, language, "", text), tmp_path)

    typed("$ echo one 1 > f\n$ cat f\none 7\n$ (exit 3)\n$ echo $?\n3\n")
    typed("$ (exit 4)\n$ echo $?\n...\n")
    for wrong in ("$ (exit 3)\n", "$ (exit 3)\n$ echo $?\n4\n", "$ cat f\ntwo 1\n"):
        with pytest.raises(AssertionError):
            typed(wrong)
    with pytest.raises(AssertionError):
        typed("(exit 3)\n", "bash")


def test_a_command_that_is_wrong_is_found() -> None:
    with pytest.raises(click.NoSuchOption):
        _fusepress(["verify", "B", "--no-such"], whole=True)
    with pytest.raises(AssertionError):
        _fusepress(["verify"], whole=True)
    for wrong in ("prune.mac=0.4", "prun.macs=0.4", "gates.latency.mean_s=3"):
        with pytest.raises(AssertionError, match="unknown key"):
            _fusepress(["compress", "r.yaml", "-o", wrong], whole=True)
    _fusepress(["compress", "r.yaml", "-o", "gates.robustness.my_failure.min=0.4", "-o", "sparsify=null"], whole=True)
    with pytest.raises(RecipeError):
        validate("prune: {mac: 0.4}")


# ---- running it


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder as the pages take it for granted: the examples, a recipe, a finished run and an ONNX file of its."""
    folder = tmp_path_factory.mktemp("workshop")
    _copy_examples(folder)
    for command in (
        "fusepress init scaffold && mv scaffold/* . && rmdir scaffold",
        "fusepress compress recipe.yaml --run runs/NAME",
        "cp runs/NAME/export/model.onnx model.onnx && echo mine > WEIGHTS-LICENSE",
    ):
        made = _typed(folder, command)
        assert made.returncode == 0, made.stdout
    return folder


def _copy_examples(folder: Path) -> None:
    shutil.copytree(ROOT / "examples", folder / "examples", ignore=shutil.ignore_patterns("runs", "__pycache__"))


def _typed(folder: Path, command: str, before: int = 0) -> subprocess.CompletedProcess[str]:
    """What a shell makes of a command, with `$?` of the one before it."""
    return subprocess.run(
        ["bash", "-c", f"(exit {before})\n{command}"],
        cwd=folder,
        env={**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )


def _run(block: Block, folder: Path) -> None:
    """Run a block; a command may fail where its exit code is asked for, and outside of a console where it judges."""
    before = 0
    commands = block.commands()
    for command, after in zip(commands, [*commands[1:], None], strict=True):
        result = _typed(folder, command.text.replace("PATH/TO/KITTI/DRIVE", shlex.quote(KITTI)), before)
        before = result.returncode
        asked = after is not None and after.text == ASKS
        judged = block.language != "console" and any(f"fusepress {verb}" in command.text for verb in JUDGES)
        assert asked or before in (ANSWERS if judged else (0,)), f"{block.where}: {command.text}\n{result.stdout}"
        exit_code = command.text == ASKS and command.shown != ["..."]
        missing = [] if not exit_code or command.shown == result.stdout.split() else command.shown
        missing = missing or not_shown_by(command.shown, result.stdout)
        assert not missing, f"{block.where}: {command.text}\nnot printed: {missing}\n{result.stdout}"


@pytest.mark.long
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("path", [p for p in PAGES if any(b.path == p for b in TYPED)], ids=_name)
def test_the_commands_of_a_page_do_what_it_says(path: Path, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = tmp_path / "page"
    if path.name in ALONE:
        _copy_examples(folder)
    else:
        shutil.copytree(request.getfixturevalue("workshop"), folder, symlinks=True)
    for block in blocks(path):
        if block.is_commands and not block.needs:
            _run(block, folder)


@pytest.mark.long
@pytest.mark.parametrize("block", [b for b in TYPED if b.needs and b.path in PAGES], ids=lambda block: block.where)
@pytest.mark.timeout(3600)
def test_commands_that_need_more_are_run_where_it_is_there(block: Block, tmp_path: Path) -> None:
    if block.needs == "data" and KITTI:
        _copy_examples(tmp_path / "page")
        _run(block, tmp_path / "page")
    else:
        pytest.skip(f"not run, it needs {NEEDS[block.needs]}: {'; '.join(c.text for c in block.commands())}")
