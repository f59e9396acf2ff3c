"""What a user writes (a task), its loader and the check before anything is spent.

A task is one plain Python class in the user's own file; it needs no base class of ours. `LoadedTask` wraps an
instance, fills in the defaults and normalises what the user's methods take and return. See docs/task.md.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from fusepress.pipeline.errors import TaskError

if TYPE_CHECKING:
    from torch import Tensor, nn

Split = Literal["train", "calib", "eval"]
Outputs = "Tensor | dict[str, Tensor]"
SINGLE_OUTPUT = "output"
REQUIRED = ("branches", "metrics", "build_model", "batches", "losses", "sample_stats", "score")


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """One batch of a task.

    Attributes:
        inputs: tensors by input name (these are the ONNX input names), batch dimension first.
        targets: whatever the task's losses and statistics need.
        sample_ids: one name a sample, unique within its split.
        groups: one cluster name a sample (scene, drive); the gates resample whole clusters.
    """

    inputs: dict[str, Tensor]
    targets: dict[str, Any] = field(default_factory=dict)
    sample_ids: Sequence[str] = ()
    groups: Sequence[str] = ()

    @property
    def size(self) -> int:
        """Number of samples."""
        return int(next(iter(self.inputs.values())).shape[0])

    def with_inputs(self, **inputs: Tensor) -> Batch:
        """The same batch with some inputs replaced."""
        return replace(self, inputs={**self.inputs, **inputs})


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSource:
    """Where a task class came from: its module file and every local file that module imports."""

    spec: str
    files: tuple[Path, ...]

    def sha256(self) -> str:
        """Hash of the sources, by file name and content, independent of where they lie."""
        digest = hashlib.sha256()
        root = self.files[0].parent
        for path in sorted(self.files):
            digest.update(path.relative_to(root).as_posix().encode() if path.is_relative_to(root) else b"")
            digest.update(hashlib.sha256(path.read_bytes()).digest())
        return digest.hexdigest()


@dataclass(slots=True, kw_only=True)
class LoadedTask:
    """A user's task with its defaults filled in.

    Attributes:
        user: the instance of the user's class.
        source: files that define it.
        branches: modality -> module paths of its backbone up to the fusion input.
        metrics: metric -> "max" or "min" (which way is better); the first is the primary one.
        keep: module paths that must not be pruned.
        single_output: the model returns one tensor, not a dict; known after the first forward pass.
    """

    user: Any
    source: TaskSource
    branches: dict[str, list[str]]
    metrics: dict[str, Literal["max", "min"]]
    keep: list[str]
    single_output: bool | None = None

    @property
    def name(self) -> str:
        """Name of the user's class."""
        return type(self.user).__name__

    @property
    def primary(self) -> str:
        """The primary metric."""
        return next(iter(self.metrics))

    @property
    def outside(self) -> dict[str, Any]:
        """Named parts that are not in the network, with their latency per target in milliseconds."""
        return dict(getattr(self.user, "outside", {}))

    def offers(self, method: str) -> bool:
        """Whether the user's class defines an optional method."""
        return callable(getattr(self.user, method, None))

    def build_model(self) -> nn.Module:
        """The dense architecture."""
        model: nn.Module = self.user.build_model()
        return model

    def build_expert(self, name: str) -> nn.Module:
        """The architecture of an expert, which teaches the outputs that it returns.

        Raises:
            TaskError: the task cannot build it.
        """
        try:
            model: nn.Module = self.user.build_expert(name)
        except Exception as error:
            raise TaskError(
                f"expected {self.name}.build_expert to make the expert {name!r}; got {type(error).__name__}: {error}; "
                "correct finetune.teachers in the recipe, or mend the task"
            ) from error
        return model

    def batches(self, split: Split, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Batches of a split; `start` skips that many, `rank` of `world` takes its share."""
        iterator: Iterator[Batch] = iter(self.user.batches(split, seed, start=start, rank=rank, world=world))
        return iterator

    def train_batches(self, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        """Endless training batches: a finite `train` split is begun again with the next seed.

        Rank r of w gets the numbers r, r + w, r + 2w, ... of the stream that one process gets, also across the ends of
        a finite split; `start` skips that many of its own.

        Raises:
            TaskError: the split yields nothing at all.
        """
        epoch, number = 0, start * world + rank  # the number counts from the epoch's first batch
        while True:
            begun_at = number
            for batch in self.batches("train", seed + epoch, start=number // world, rank=number % world, world=world):
                number += world
                yield batch
            number -= self._epoch_length(seed + epoch, begun_at, number, world)
            epoch += 1

    def _epoch_length(self, seed: int, begun_at: int, ended_at: int, world: int) -> int:
        """Batches of a finite epoch whose share from number `begun_at` on ended before number `ended_at`."""
        if begun_at == ended_at:  # it began behind the end
            length = sum(1 for _ in self.batches("train", seed))
            if length == 0:
                raise TaskError(
                    f"expected batches('train', seed) to yield batches; got none at {self.source.spec}; "
                    "check the data folder that the recipe's `data` names"
                )
            return length
        low, high = ended_at - world + 1, ended_at  # the numbers between are other ranks', who may have one more
        while low < high:
            middle = (low + high) // 2
            there = next(self.batches("train", seed, start=middle // world, rank=middle % world, world=world), None)
            low, high = (low, middle) if there is None else (middle + 1, high)
        return low

    def fingerprint(self, split: Split) -> str:
        """What identifies the data of a split: the task's own answer, else a hash of ids and tensors."""
        if self.offers("fingerprint"):
            return str(self.user.fingerprint(split))
        digest = hashlib.sha256()
        for index, batch in enumerate(self.batches(split, 0)):
            if split == "train" and index >= 8:  # an endless split: its head stands for it
                break
            digest.update("\0".join(batch.sample_ids).encode())
            for name in sorted(batch.inputs):
                digest.update(batch.inputs[name].detach().cpu().contiguous().numpy().tobytes())
            for name in sorted(batch.targets):
                value = batch.targets[name]
                raw = value.detach().cpu().contiguous().numpy().tobytes() if hasattr(value, "detach") else repr(value)
                digest.update(raw if isinstance(raw, bytes) else raw.encode())
        return digest.hexdigest()

    def as_dict(self, outputs: Any) -> dict[str, Tensor]:
        """Outputs as a dict, whatever the model returned."""
        if isinstance(outputs, dict):
            self.single_output = False
            return outputs
        self.single_output = True
        return {SINGLE_OUTPUT: outputs}

    def as_user(self, outputs: Mapping[str, Tensor]) -> Any:
        """Outputs in the form in which the user's model returns them."""
        if self.single_output or (self.single_output is None and list(outputs) == [SINGLE_OUTPUT]):
            return next(iter(outputs.values()))
        return dict(outputs)

    def losses(self, outputs: Mapping[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        """Named losses (scalars); their sum is what training minimises."""
        losses: dict[str, Tensor] = self.user.losses(self.as_user(outputs), batch)
        return losses

    def sample_stats(self, outputs: Mapping[str, Tensor], batch: Batch) -> dict[str, Any]:
        """Per-sample statistics as numpy arrays, leading dimension = samples."""
        import numpy as np

        cpu = {name: value.detach().float().cpu() for name, value in outputs.items()}
        stats = self.user.sample_stats(self.as_user(cpu), batch)
        return {name: np.asarray(value) for name, value in stats.items()}

    def score(self, stats: Mapping[str, Any]) -> dict[str, float]:
        """Metrics from per-sample statistics."""
        return {name: float(value) for name, value in self.user.score(dict(stats)).items()}


def parse_spec(spec: str, base: Path) -> tuple[Path | str, str]:
    """Split `file.py:Name` or `package.module:Name`; a file is relative to `base`.

    Raises:
        TaskError: there is no `:Name`, or the file does not exist.
    """
    where, separator, name = spec.rpartition(":")
    if not separator or not where or not name.isidentifier():
        raise TaskError(
            f"expected a task as `path/to/file.py:ClassName` or `package.module:ClassName`; got {spec!r}; "
            "name the class after a colon"
        )
    if not where.endswith(".py"):
        return where, name
    for root in (base, Path.cwd()):
        path = (root / where).resolve()
        if path.is_file():
            return path, name
    raise TaskError(
        f"expected a task file; got {where!r}, which is neither beside the recipe ({base}) nor in the "
        "working directory; correct the path"
    )


def load_task(spec: str, *, base: Path = Path(), data: Path | None = None) -> LoadedTask:
    """Import the user's class, make an instance and check the parts that need no data.

    Args:
        spec: `path/to/file.py:Name` or `package.module:Name`.
        base: folder that a relative file is looked up in first (the recipe's).
        data: the recipe's `data` folder; given to the class only if its `__init__` takes it.

    Raises:
        TaskError: the module fails to import, the class is missing, or it breaks the contract.
    """
    where, name = parse_spec(spec, base)
    module = _import_file(where) if isinstance(where, Path) else _import_module(where)
    cls = getattr(module, name, None)
    if not inspect.isclass(cls):
        classes = [n for n, c in vars(module).items() if inspect.isclass(c) and c.__module__ == module.__name__]
        raise TaskError(f"expected a class {name!r} in {where}; got the classes {classes}; correct the name")
    missing = [attribute for attribute in REQUIRED if not hasattr(cls, attribute)]
    if missing:
        raise TaskError(
            f"expected a task with {', '.join(REQUIRED)}; got {name} without {', '.join(missing)}; "
            "add what is missing (docs/task.md shows a whole task)"
        )
    user = _instantiate(cls, data)
    return LoadedTask(
        user=user,
        source=TaskSource(spec=f"{Path(module.__file__ or name).name}:{name}", files=_local_files(module)),
        branches=_checked_branches(user, name),
        metrics=_checked_metrics(user, name),
        keep=list(getattr(user, "keep", [])),
    )


def _instantiate(cls: type, data: Path | None) -> Any:
    takes_data = "data" in inspect.signature(cls).parameters
    if data is not None and not takes_data:
        raise TaskError(
            f"expected {cls.__name__}.__init__ to take `data`, because the recipe names a data folder; got "
            f"{inspect.signature(cls)}; add the argument or remove `data` from the recipe"
        )
    return cls(data=data) if takes_data else cls()


def _checked_branches(user: Any, name: str) -> dict[str, list[str]]:
    branches = user.branches
    if not isinstance(branches, Mapping) or not branches:
        raise TaskError(
            f"expected {name}.branches to map each modality to its module paths; got {branches!r}; "
            'write for example {"camera": ["camera"], "lidar": ["lidar"]}'
        )
    return {str(m): [paths] if isinstance(paths, str) else list(paths) for m, paths in branches.items()}


def _checked_metrics(user: Any, name: str) -> dict[str, Literal["max", "min"]]:
    metrics = user.metrics
    if not isinstance(metrics, Mapping) or not metrics or set(metrics.values()) - {"max", "min"}:
        raise TaskError(
            f"expected {name}.metrics to map each metric to 'max' or 'min', the primary one first; got "
            f"{metrics!r}; say which way is better"
        )
    return dict(metrics)


def _import_module(dotted: str) -> ModuleType:
    try:
        return importlib.import_module(dotted)
    except ImportError as error:
        raise TaskError(
            f"expected an importable module {dotted!r}; got {type(error).__name__}: {error}; install it or name a file"
        ) from error


def _import_file(path: Path) -> ModuleType:
    """Import a file under a private name, its folder first on the path while it loads (for its own imports)."""
    name = f"_fusepress_task_{hashlib.sha256(str(path).encode()).hexdigest()[:12]}_{path.stem}"
    specification = importlib.util.spec_from_file_location(name, path)
    assert specification is not None
    assert specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    sys.modules[name] = module
    folder = str(path.parent)
    _forget_siblings_of_other_folders(path.parent)
    sys.path.insert(0, folder)
    try:
        specification.loader.exec_module(module)
    except Exception as error:
        sys.modules.pop(name, None)
        line = error.__traceback__
        while line is not None and line.tb_next is not None:
            line = line.tb_next
        at = f"{line.tb_frame.f_code.co_filename}:{line.tb_lineno}" if line else str(path)
        raise TaskError(
            f"expected {path.name} to import; got {type(error).__name__}: {error} at {at}; mend the file"
        ) from error
    finally:
        sys.path.remove(folder)
    return module


def _forget_siblings_of_other_folders(folder: Path) -> None:
    """Two examples may both have a `model.py`: a module of another task's folder must not be served here."""
    names = {p.stem for p in folder.glob("*.py")} | {p.parent.name for p in folder.glob("*/__init__.py")}
    for name in names:
        loaded = sys.modules.get(name)
        file = getattr(loaded, "__file__", None)
        if file and not Path(file).resolve().is_relative_to(folder) and "site-packages" not in file:
            del sys.modules[name]


def _local_files(module: ModuleType) -> tuple[Path, ...]:
    """The module's file and what it imported from its own folder, found by following loaded modules."""
    root_file = Path(module.__file__ or "").resolve()
    root = root_file.parent
    found = [root_file]
    pending = [module]
    while pending:
        current = pending.pop()
        for value in list(vars(current).values()):
            owner = value if isinstance(value, ModuleType) else sys.modules.get(getattr(value, "__module__", "") or "")
            file = getattr(owner, "__file__", None)
            if owner is None or not file:
                continue
            path = Path(file).resolve()
            if path.is_relative_to(root) and path not in found and "site-packages" not in path.parts:
                found.append(path)
                pending.append(owner)
    return tuple(found)


def first_batch(task: LoadedTask, split: Split, *, size: int | None = None) -> Batch:
    """The first batch of a split, cut to `size` samples.

    Raises:
        TaskError: the split is empty, or what it yields is not a Batch of tensors.
    """
    batch = next(task.batches(split, 0), None)
    if batch is None:
        raise TaskError(
            f"expected batches({split!r}, 0) to yield at least one batch; got none at {task.source.spec}; "
            "check the data folder that the recipe's `data` names"
        )
    if not isinstance(batch, Batch) or not batch.inputs:
        raise TaskError(
            f"expected batches({split!r}, 0) to yield fusepress.Batch with named inputs; got "
            f"{type(batch).__name__} at {task.source.spec}; wrap the tensors in Batch(inputs={{name: tensor}}, ...)"
        )
    if size is None:
        return batch
    return cut_batch(batch, size)


def cut_batch(batch: Batch, size: int) -> Batch:
    """The first `size` samples of a batch."""
    full = batch.size
    targets = {
        name: value[:size] if hasattr(value, "shape") and len(value.shape) and value.shape[0] == full else value
        for name, value in batch.targets.items()
    }
    return Batch(
        inputs={name: value[:size] for name, value in batch.inputs.items()},
        targets=targets,
        sample_ids=list(batch.sample_ids)[:size],
        groups=list(batch.groups)[:size],
    )


def check_task(task: LoadedTask, model: nn.Module) -> dict[str, tuple[int, ...]]:
    """Check a task before anything is spent: names, shapes, one forward and one backward pass, its metrics.

    Returns:
        The shape of each output for a batch of one.

    Raises:
        TaskError: with what was expected, what was found and what to do.
    """
    import torch

    _check_modules(task, model)
    batch = first_batch(task, "eval")
    for name, value in batch.inputs.items():
        if not isinstance(value, torch.Tensor) or value.shape[0] != batch.size:
            raise TaskError(
                f"expected input {name!r} to be a tensor with the batch dimension {batch.size} first; got "
                f"{_describe(value)} at batches('eval', 0); put the batch dimension first"
            )
    if len(batch.sample_ids) != batch.size or len(batch.groups) != batch.size:
        raise TaskError(
            f"expected {batch.size} sample_ids and groups, one a sample; got {len(batch.sample_ids)} and "
            f"{len(batch.groups)} at batches('eval', 0); name every sample and its scene"
        )
    _check_calib_apart_from_eval(task)
    model.eval()
    with torch.no_grad():
        outputs = _call(task, "forward", lambda: task.as_dict(model(**batch.inputs)))
    for name, value in outputs.items():
        if not isinstance(value, torch.Tensor) or value.shape[:1] != (batch.size,):
            raise TaskError(
                f"expected output {name!r} to be a tensor with the batch dimension {batch.size} first; got "
                f"{_describe(value)} at build_model().forward; return tensors or a dict of them"
            )
    stats = _call(task, "sample_stats", lambda: task.sample_stats(outputs, batch))
    for name, value in stats.items():
        if value.shape[:1] != (batch.size,):
            raise TaskError(
                f"expected sample_stats[{name!r}] to have {batch.size} rows, one a sample; got shape {value.shape}; "
                "do not reduce over the batch: the gates resample the samples"
            )
    metrics = _call(task, "score", lambda: task.score(stats))
    absent = [name for name in task.metrics if name not in metrics]
    if absent:
        raise TaskError(
            f"expected score() to return {list(task.metrics)}; got {list(metrics)}, without {absent}; "
            "return every metric that `metrics` names"
        )
    _check_backward(task, model)
    return {name: (1, *value.shape[1:]) for name, value in outputs.items()}


def check_shards(task: LoadedTask, rank: int, world: int) -> None:
    """Check that the splits are dealt out in turn: batch k of rank r of w is number k * w + r of a single process.

    Looks at the first two batches of this rank; everything that processes share relies on it.

    Raises:
        TaskError: with the split and the batch.
    """
    splits: tuple[Split, ...] = ("train", "calib", "eval")
    for split in splits:
        whole = itertools.islice(task.batches(split, 0), rank, rank + world + 1, world)
        share = itertools.islice(task.batches(split, 0, rank=rank, world=world), 2)
        for number, (expected, got) in enumerate(itertools.zip_longest(whole, share)):
            if expected is None or got is None or not _same_batch(expected, got):
                raise TaskError(
                    f"expected batches({split!r}, 0, rank={rank}, world={world}) to deal out batches in turn, so that "
                    f"its batch {number} is number {number * world + rank} of batches({split!r}, 0); got "
                    f"{'none' if got is None else 'another'} at {task.source.spec}; yield every {world}th batch from "
                    f"number {rank} on"
                )


def _same_batch(one: Batch, other: Batch) -> bool:
    import torch

    return (
        list(one.sample_ids) == list(other.sample_ids)
        and set(one.inputs) == set(other.inputs)
        and all(torch.equal(value, other.inputs[name]) for name, value in one.inputs.items())
    )


def _check_calib_apart_from_eval(task: LoadedTask) -> None:
    calib, evaluated = first_batch(task, "calib"), first_batch(task, "eval")
    common = set(calib.sample_ids) & set(evaluated.sample_ids)
    if common:
        raise TaskError(
            f"expected the splits calib and eval to share no sample; got {sorted(common)[:3]} in both; "
            "calibrating on the evaluation data would make every figure too good"
        )


def _check_modules(task: LoadedTask, model: nn.Module) -> None:
    names = {name for name, _ in model.named_modules()}
    top = [name for name, _ in model.named_children()]
    wanted = [(f"branches[{m!r}]", path) for m, paths in task.branches.items() for path in paths]
    for where, path in [*wanted, *(("keep", path) for path in task.keep)]:
        if path not in names:
            raise TaskError(
                f"expected {where} to name a module of the model; got {path!r}; the model's top modules are {top}"
            )


def _check_backward(task: LoadedTask, model: nn.Module) -> None:
    import torch

    batch = cut_batch(first_batch(task, "train"), 2)
    model.train()
    with torch.enable_grad():
        losses = _call(task, "losses", lambda: task.losses(task.as_dict(model(**batch.inputs)), batch))
        if not isinstance(losses, dict) or not losses:
            raise TaskError(
                f"expected losses() to return named scalars; got {_describe(losses)}; "
                'return for example {"segmentation": loss}'
            )
        total = torch.stack([loss.float() for loss in losses.values()]).sum()
        if not torch.isfinite(total):
            values = {name: float(loss.detach()) for name, loss in losses.items()}
            raise TaskError(
                f"expected finite losses on the first training batch; got {values}; check the labels and the checkpoint"
            )
        _call(task, "losses", total.backward)
    model.zero_grad(set_to_none=True)
    model.eval()


def _call(task: LoadedTask, method: str, call: Callable[[], Any]) -> Any:
    try:
        return call()
    except TaskError:
        raise
    except Exception as error:
        raise TaskError(
            f"expected {task.name}.{method} to run on the first batch; got {type(error).__name__}: {error}; "
            "mend the task (use --debug for the traceback)"
        ) from error


def _describe(value: Any) -> str:
    shape = getattr(value, "shape", None)
    return f"{type(value).__name__} of shape {tuple(shape)}" if shape is not None else f"{type(value).__name__}"
