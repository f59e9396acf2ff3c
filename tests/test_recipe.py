from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from fusepress.pipeline.errors import RecipeError
from fusepress.pipeline.recipe import LoadedRecipe, load_recipe

ROOT = Path(__file__).resolve().parent.parent
GOOD = {"task": "task.py:T", "checkpoint": "c.safetensors", "prune": {"macs": 0.4}}


def _write(folder: Path, content: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def _load(folder: Path, content: object, *overrides: str) -> LoadedRecipe:
    return load_recipe(_write(folder, content), overrides)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({**GOOD, "prun": {"macs": 0.4}}, r"unknown key `prun`; did you mean `prune`\?"),
        ({**GOOD, "prune": {"mac": 0.4}}, r"unknown key `prune.mac`; did you mean `macs`\?"),
        ({**GOOD, "prune": {"macs": 1.4}}, r"`prune.macs`: .*less than or equal to 1; got 1.4"),
        ({**GOOD, "prune": {"macs": 0}}, r"`prune.macs`: .*greater than 0; got 0"),
        ({**GOOD, "prune": {}}, r"exactly one of `macs`, `params` and `latency_ms`"),
        ({**GOOD, "prune": {"macs": 0.4, "params": 0.4}}, r"exactly one of `macs`, `params` and `latency_ms`"),
        ({**GOOD, "prune": {"macs": 0.4, "blocks": True, "allocation": "global"}}, r"which ranks single channels"),
        ({**GOOD, "prune": {"latency_ms": 4, "branches": {"camera": 0.5}}}, r"a latency is of the whole model"),
        ({**GOOD, "score": {"method": "auto", "candidates": ["auto"]}}, r"different methods, none of them auto"),
        ({**GOOD, "score": {"candidates": ["snip", "snip"]}}, r"different methods, none of them auto"),
        ({**GOOD, "score": {"beta": "much"}}, r"`score.beta`: expected a number of at least 0, or auto; got 'much'"),
        ({**GOOD, "score": {"method": "altermona"}}, r"`score.method`: .*'altermoma'.*got 'altermona'"),
        ({**GOOD, "quantize": {"precision": "int4"}}, r"`quantize.precision`: .*'int8'.*got 'int4'"),
        ({**GOOD, "gates": {"latency": {"mean_s": 5}}}, r"unknown key `gates.latency.mean_s`; did you mean `mean_ms`"),
        ({**GOOD, "gates": {"latency": {}}}, r"expected `mean_ms` or `p99_ms`"),
        ({**GOOD, "gates": {"latency": {"p99_ms": 5, "evidence": ["predicted"]}}}, r"a prediction has no tail"),
        ({**GOOD, "finetune": {"steps": "many"}}, r"`finetune.steps`: .*integer.*got 'many'"),
        ({**GOOD, "gates": {"floors": {"miou": float("nan")}}}, r"`gates.floors.miou`: .*finite number; got nan"),
        ({**GOOD, "gates": {"accuracy": {"max_drop": float("inf")}}}, r"`gates.accuracy.max_drop`: .*finite.*got inf"),
        ({**GOOD, "gates": {"latency": {"mean_ms": float("inf")}}}, r"`gates.latency.mean_ms`: .*finite.*got inf"),
        ({**GOOD, "task": "task.py"}, r"expected `path/to/file.py:ClassName`"),
        ({"task": "task.py:T"}, r"`checkpoint`: Field required"),
        ("a: [1", r"expected YAML; got a syntax error"),
        ("just text", r"expected a mapping of recipe keys; got str"),
    ],
)
def test_a_recipe_that_does_not_fit_is_refused_with_the_key_and_the_reason(
    tmp_path: Path, content: object, message: str
) -> None:
    with pytest.raises(RecipeError, match=message):
        _load(tmp_path, content)


def test_all_faults_are_listed_at_once(tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as caught:
        _load(tmp_path, {**GOOD, "finetune": {"steps": -1, "lr": 0, "emma": 0.9}})
    for part in ("finetune.steps", "finetune.lr", "finetune.emma"):
        assert part in str(caught.value)


def test_a_missing_recipe_says_where_it_was_looked_for(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"got none at .*nowhere\.yaml; .*fusepress init"):
        load_recipe(tmp_path / "nowhere.yaml")


def test_overrides_reach_nested_keys_and_keep_yaml_types(tmp_path: Path) -> None:
    recipe = _load(
        tmp_path, GOOD, "prune.macs=0.25", "gates.floors.iou_car=0.5", "score.method=taylor", "finetune.distill=false"
    ).recipe
    assert recipe.prune is not None
    assert recipe.prune.macs == 0.25
    assert recipe.gates.floors == {"iou_car": 0.5}
    assert recipe.score.method == "taylor"
    assert recipe.finetune is not None
    assert recipe.finetune.distill is False


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("prune.macs", r"an override as key=value"),
        ("prune.macs=[1", r"expected a YAML value"),
        ("task.x=1", r"expected 'task' to be a section"),
        ("prune.mcs=0.3", r"unknown key `prune.mcs`"),
    ],
)
def test_a_wrong_override_is_refused(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        _load(tmp_path, GOOD, override)


def test_null_switches_a_section_off(tmp_path: Path) -> None:
    assert _load(tmp_path, GOOD, "prune=null").recipe.prune is None


def test_the_hash_names_the_content_not_the_writing(tmp_path: Path) -> None:
    first = _load(tmp_path, GOOD).sha256()
    reordered = _load(
        tmp_path, "# a comment\nprune: {macs: 0.4}\ncheckpoint: c.safetensors\ntask: task.py:T\n"
    ).sha256()
    other = _load(tmp_path, GOOD, "prune.macs=0.5").sha256()
    assert first == reordered != other


def test_a_relative_path_is_looked_up_beside_the_recipe_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    beside, cwd = tmp_path / "recipes", tmp_path / "cwd"
    beside.mkdir()
    cwd.mkdir()
    monkeypatch.chdir(cwd)
    loaded = _load(beside, GOOD)
    (cwd / "c.safetensors").touch()
    assert loaded.resolve("c.safetensors") == Path("c.safetensors")
    (beside / "c.safetensors").touch()
    assert loaded.resolve("c.safetensors") == beside / "c.safetensors"


@pytest.mark.parametrize(
    "path", sorted(ROOT.glob("examples/*/recipe*.yaml")), ids=lambda p: p.parent.name + "-" + p.stem
)
def test_every_shipped_recipe_loads_and_has_gates(path: Path) -> None:
    recipe = load_recipe(path).recipe
    assert recipe.gates.accuracy is not None
    assert recipe.gates.latency is not None
