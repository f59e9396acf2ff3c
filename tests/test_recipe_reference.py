"""docs/recipe-reference.md is what the schema says, and says all of it."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

from fusepress.pipeline import reference
from fusepress.pipeline.recipe import Recipe

ROOT = Path(__file__).resolve().parent.parent
FILE = ROOT / "docs/recipe-reference.md"
KEYS = {key.path: key for path, model in reference.sections() for key in reference.keys(path, model)}
COUNTS_OF_NOTHING = {"seed", "sparsify.rank", "gates.robustness.severity"}  # whole numbers without a unit


@pytest.fixture(scope="module")
def written() -> str:
    return reference.reference()


def test_the_committed_reference_is_what_the_schema_gives(written: str) -> None:
    assert FILE.read_text() == written, f"run: {reference.COMMAND}"


def test_every_key_of_the_schema_is_listed_with_a_meaning(written: str) -> None:
    leaves = set(_leaves(Recipe.model_json_schema()["$defs"], Recipe.model_json_schema(), ""))
    assert leaves == set(KEYS)
    for path, key in KEYS.items():
        assert key.meaning, f"{path}: add a line under Attributes in its section's docstring"
        assert f"| `{path.rpartition('.')[2]}` |" in written


def _leaves(definitions: dict[str, dict], schema: dict, path: str) -> list[str]:  # type: ignore[type-arg]
    """Paths of all keys that hold no section, read from the JSON schema of the whole recipe."""
    found = []
    for name, value in schema["properties"].items():
        inner = re.findall(r"'#/\$defs/(\w+)'", str(value))
        here = f"{path}.{name}".lstrip(".")
        found += _leaves(definitions, definitions[inner[0]], here) if inner else [here]
    return found


@pytest.mark.parametrize("path", KEYS)
def test_every_key_has_an_example_that_the_schema_takes(path: str) -> None:
    key = KEYS[path]
    assert path in reference.EXAMPLES, f"add an example of {path} to pipeline/reference.py"
    recipe = reference.validate(reference.example_text(key), reference.company_of(key))
    value = recipe.model_dump(mode="json")
    for part in path.replace("robustness.", f"robustness.{reference.FAILURE}.").split("."):
        value = value[part]
    assert value is not None


@pytest.mark.parametrize("path", KEYS)
def test_every_key_shows_an_error_that_names_it(path: str) -> None:
    key = KEYS[path]
    said = reference.refusals(reference.nested(key, reference.wrong_value(key.schema)))
    named = path.replace("robustness.", f"robustness.{reference.FAILURE}.")
    assert any(line.startswith(f"`{named}") for line in said)


def test_whole_numbers_have_units() -> None:
    counted = {p for p, key in KEYS.items() if key.schema.get("type") == "integer"} - COUNTS_OF_NOTHING
    assert counted <= set(reference.UNITS)


def test_the_tables_name_no_key_that_is_gone() -> None:
    sections = {path for path, _ in reference.sections()}
    assert set(reference.EXAMPLES) <= set(KEYS)
    assert set(reference.UNITS) <= set(KEYS)
    assert set(reference.STAGES) == sections
    assert set(reference.COMBINATIONS) <= sections
    named = set(re.findall(r"`(\w+)`", " ".join(reference.STAGES.values())))
    stages = {word for word in named if (ROOT / f"pipeline/stages/{word}.py").exists()}
    assert stages >= {"baseline", "score", "prune", "finetune", "sparsify", "qat", "quantize", "verify"}


def test_every_refusal_of_the_schema_is_shown(written: str) -> None:
    shown = _plain(written)
    for node in ast.walk(ast.parse((ROOT / "pipeline/recipe.py").read_text())):
        if isinstance(node, ast.Raise) and getattr(getattr(node.exc, "func", None), "id", "") == "ValueError":
            assert isinstance(node.exc, ast.Call)
            literal = _first_literal(node.exc.args[0])
            assert _plain(literal) in shown, f"add a case of it to COMBINATIONS in pipeline/reference.py: {literal!r}"


def _first_literal(message: ast.expr) -> str:
    parts = message.values if isinstance(message, ast.JoinedStr) else [message]
    return next(str(p.value) for p in parts if isinstance(p, ast.Constant))


def _plain(text: str) -> str:
    return " ".join(text.split())


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "number", "exclusiveMinimum": 0, "maximum": 1}, "number above 0, at most 1"),
        ({"type": "integer", "minimum": 2}, "whole number at least 2"),
        ({"anyOf": [{"type": "number"}, {"type": "null"}]}, "number"),
        ({"type": "array", "items": {"enum": ["a", "b"]}}, "list of `a`, `b`"),
        ({"type": "object", "additionalProperties": {"type": "string"}}, "mapping to text"),
    ],
)
def test_types_read_as_words(schema: dict[str, object], words: str) -> None:
    assert reference.type_text(schema) == words
