from __future__ import annotations

import textwrap
from pathlib import Path

import pytest
import torch

from fusepress.pipeline.errors import TaskError
from fusepress.pipeline.evaluate import evaluate, torch_predict
from fusepress.pipeline.task import Batch, LoadedTask, check_task, cut_batch, load_task

TEMPLATE = Path(__file__).resolve().parent.parent / "pipeline" / "templates" / "task.py.txt"


def _task(folder: Path, *changes: tuple[str, str], name: str = "MyTask") -> LoadedTask:
    """The task that `fusepress init` writes, with some of its text replaced."""
    source = TEMPLATE.read_text()
    for old, new in changes:
        assert old in source, old
        source = source.replace(old, new)
    (folder / "task.py").write_text(source)
    return load_task(f"task.py:{name}", base=folder)


def test_the_template_passes_its_own_check(tmp_path: Path) -> None:
    task = _task(tmp_path)
    assert check_task(task, task.build_model()) == {"output": (1, 3, 32, 32)}
    assert task.primary == "miou"


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("task.py", r"expected a task as `path/to/file\.py:ClassName`"),
        ("nowhere.py:MyTask", r"expected a task file; got 'nowhere\.py'"),
        ("task.py:NoTask", r"expected a class 'NoTask' .* got the classes \['Net', 'MyTask'\]"),
        ("task.py:Net", r"got Net without branches, metrics, .*docs/task\.md"),
        ("no_such_package.module:Task", r"expected an importable module 'no_such_package\.module'"),
    ],
)
def test_a_task_that_cannot_be_found_says_what_was_looked_for(tmp_path: Path, spec: str, message: str) -> None:
    _task(tmp_path)
    with pytest.raises(TaskError, match=message):
        load_task(spec, base=tmp_path)


def test_a_module_that_fails_to_import_names_the_line(tmp_path: Path) -> None:
    (tmp_path / "task.py").write_text("x = 1\nraise ValueError('no data here')\n")
    with pytest.raises(TaskError, match=r"ValueError: no data here at .*task\.py:2"):
        load_task("task.py:MyTask", base=tmp_path)


def test_data_is_given_only_to_a_task_that_takes_it(tmp_path: Path) -> None:
    _task(tmp_path)
    with pytest.raises(TaskError, match=r"__init__ to take `data`"):
        load_task("task.py:MyTask", base=tmp_path, data=tmp_path)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('{"camera": ["camera"],', '{"camera": ["camra"],', r"branches\['camera'\] .* got 'camra'; .*top modules are"),
        ('keep = ["head"]', 'keep = ["heads"]', r"expected keep to name a module .* got 'heads'"),
        ('"iou_red_disc": "max"}', '"iou_blue": "max"}', r"without \['iou_blue'\]"),
        ('metrics = {"miou": "max"', 'metrics = {"miou": "up"', r"to map each metric to 'max' or 'min'"),
        ("(is_p & is_l).sum(1)", "(is_p & is_l).sum((0, 1))", r"sample_stats\['intersection'\] to have 16 rows"),
        ("image=", "picture=", r"forward"),
        ('F.cross_entropy(outputs, batch.targets["label"])', "outputs.sum() / 0", r"finite losses"),
        ('batch.targets["label"])}', 'batch.targets["lable"])}', r"losses to run .* KeyError: 'lable'"),
        ("sample_ids=ids", "sample_ids=ids[:3]", r"expected 16 sample_ids and groups"),
        ('f"{split}-{seed}-{index}-{k}"', 'f"{seed}-{index}-{k}"', r"calib and eval to share no sample"),
        (
            'SAMPLES = {"calib": 64, "eval": 128}',
            'SAMPLES = {"calib": 64, "eval": 0}',
            r"'eval', 0\) to yield at least",
        ),
    ],
)
def test_a_broken_task_is_refused_with_the_fault(tmp_path: Path, old: str, new: str, message: str) -> None:
    if old == "image=":
        old, new = 'inputs={"image": image,', 'inputs={"picture": image,'

    def load_and_check() -> None:
        task = _task(tmp_path, (old, new))
        check_task(task, task.build_model())

    with pytest.raises(TaskError, match=message):
        load_and_check()


def test_the_source_hash_sees_the_module_and_what_it_imports_from_its_folder(tmp_path: Path) -> None:
    (tmp_path / "helper_of_task.py").write_text("SCALE = 1\n")
    text = TEMPLATE.read_text().replace("import torch\n", "import helper_of_task\nimport torch\n", 1)
    (tmp_path / "task.py").write_text(text)
    first = load_task("task.py:MyTask", base=tmp_path).source
    assert {path.name for path in first.files} == {"task.py", "helper_of_task.py"}
    before = first.sha256()
    (tmp_path / "helper_of_task.py").write_text("SCALE = 2\n")
    assert first.sha256() != before
    (tmp_path / "unrelated.py").write_text("")
    assert load_task("task.py:MyTask", base=tmp_path).source.sha256() == first.sha256()


def test_the_source_hash_does_not_depend_on_the_folder(tmp_path: Path) -> None:
    hashes = set()
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        hashes.add(_task(tmp_path / name).source.sha256())
    assert len(hashes) == 1


def test_two_tasks_with_modules_of_the_same_name_do_not_mix(tmp_path: Path) -> None:
    found = []
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "shape_of_it.py").write_text(f"WORD = {name!r}\n")
        text = TEMPLATE.read_text().replace("import torch\n", "import shape_of_it\nimport torch\n", 1)
        (folder / "task.py").write_text(text + "\n\nclass Named(MyTask):\n    word = shape_of_it.WORD\n")
        found.append(load_task("task.py:Named", base=folder).user.word)
    assert found == ["one", "two"]


def test_training_batches_are_endless_and_start_skips(tmp_path: Path) -> None:
    finite = textwrap.dedent("last = 2")
    task = _task(tmp_path, ('last = 10**9 if split == "train" else SAMPLES[split] // 16', finite))
    batches = task.train_batches(0)
    ids = [next(batches).sample_ids[0] for _ in range(5)]
    assert ids == ["train-0-0-0", "train-0-1-0", "train-1-0-0", "train-1-1-0", "train-2-0-0"]
    for start in range(5):
        assert next(task.train_batches(0, start=start)).sample_ids[0] == ids[start]


def test_an_empty_training_split_says_so(tmp_path: Path) -> None:
    task = _task(tmp_path, ('last = 10**9 if split == "train" else SAMPLES[split] // 16', "last = 0"))
    with pytest.raises(TaskError, match=r"to yield batches; got none .* data folder"):
        next(task.train_batches(0))


def test_the_default_fingerprint_follows_the_data(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    plain = ("    def fingerprint(self, split: str)", "    def unused(self, split: str)")
    first = _task(tmp_path / "a", plain)
    second = _task(tmp_path / "b", plain, ("0.25 * torch.randn", "0.26 * torch.randn"))
    assert first.fingerprint("eval") == first.fingerprint("eval") != first.fingerprint("calib")
    assert first.fingerprint("eval") != second.fingerprint("eval")


def test_evaluation_sees_every_sample_once_and_refuses_nan(tmp_path: Path) -> None:
    task = _task(tmp_path)
    model = task.build_model()
    evaluation = evaluate(task, torch_predict(task, model))
    assert evaluation.n == len(set(evaluation.sample_ids)) == 128
    assert evaluation.metrics.keys() == {"miou", "iou_red_disc"}
    with torch.no_grad():
        next(model.parameters()).fill_(float("nan"))
    with pytest.raises(TaskError, match=r"expected finite outputs; got NaN .* 'output'"):
        evaluate(task, torch_predict(task, model))


def test_cutting_a_batch_cuts_inputs_targets_and_names() -> None:
    batch = Batch(
        inputs={"x": torch.zeros(4, 2)},
        targets={"y": torch.arange(4), "scale": 3.0},
        sample_ids=list("abcd"),
        groups=list("ssst"),
    )
    cut = cut_batch(batch, 3)
    assert cut.size == 3
    assert cut.targets["y"].tolist() == [0, 1, 2]
    assert cut.targets["scale"] == 3.0
    assert list(cut.sample_ids) == ["a", "b", "c"]
