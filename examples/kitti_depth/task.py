"""Depth completion on KITTI-format folders: a task for Fusepress (see docs/task.md for the contract).

The camera image and one random half of the projected LiDAR points go in; the other half is the label.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from depth_model import FAR_METRES, DepthFusionNet
from kitti_io import Floats, Frame, View, depth_map, find_drives, split_halves
from numpy.typing import NDArray
from PIL import Image, ImageDraw
from safetensors.torch import save_file
from torch import Tensor, nn

from fusepress import Batch
from fusepress.pipeline.errors import TaskError, TrainingError

HEIGHT, WIDTH = 96, 320
NEAR_METRES = 1.0
TRAIN_BATCH = 4
FAR_OFF_METRES = 10.0
# Frames of one cluster of consecutive frames; the gates resample whole clusters, and one makes an evaluation batch.
WINDOW = 3
# Shares of each drive, in time order; gap frames are never read, so that no split sees its neighbour's view.
SHARES = (("train", 0.50), ("gap", 0.05), ("calib", 0.10), ("gap", 0.05), ("eval", 0.30))
FAILURES = ("camera_blank", "camera_dark", "lidar_blank", "lidar_half", "lidar_sparse")
KEPT_FRAMES = 1000
DARK_GAIN = {1: 0.4, 2: 0.2, 3: 0.08}
HALF_KEEPS = {1: 0.8, 2: 0.65, 3: 0.5}
SPARSE_EVERY = {1: 2, 2: 4, 3: 8}
DIFFERENCE_METRES = 5.0
Picture = NDArray[np.uint8]
Sample = tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.float32]]


class KittiDepthTask:
    """Depth completion at 96x320 on the recipe's `data` folder.

    Attributes:
        dense_steps: optimiser steps of `train_dense`.
        dense_lr: peak learning rate of `train_dense`.
        dropout: chance that `train_dense` blanks a modality of a sample, so that the network outlives a dead sensor.
    """

    branches = {"camera": ["camera"], "lidar": ["lidar"]}
    metrics = {"rmse": "min", "mae": "min", "delta1": "max"}
    keep = ["choice", "correction", "lidar.carry"]
    inputs_by_modality = {"camera": ["image"], "lidar": ["sparse_depth"]}
    failures = FAILURES
    dense_steps = 600
    dense_lr = 3e-3
    dropout = {"image": 0.08}

    def __init__(self, data: Path | None = None) -> None:
        self.data = data
        self._splits: dict[str, list[tuple[Frame, int]]] | None = None
        self._decoded: dict[str, tuple[Image.Image, Floats]] = {}
        self._hashes: dict[str, str] = {}

    # -- data ----------------------------------------------------------------------------------------------------

    def frames(self, split: str) -> list[tuple[Frame, int]]:
        """Frames of a split with their place in the split's part of their drive.

        Raises:
            TaskError: no `data` was given, the folder is no KITTI folder, or a split would be empty.
        """
        if self._splits is None:
            if self.data is None:
                raise TaskError(
                    "expected a folder of KITTI frames; got none; name it in the recipe (`data: path/to/drive`) "
                    "or on the command line (-o data=path/to/drive)"
                )
            self._splits = _split_by_time(find_drives(Path(self.data)), Path(self.data))
        if split not in self._splits:
            raise TaskError(f"expected a split of {sorted(self._splits)}; got {split!r}; use one of them")
        return self._splits[split]

    def batches(self, split: str, seed: int, *, start: int = 0, rank: int = 0, world: int = 1) -> Iterator[Batch]:
        frames = self.frames(split)
        if split == "train":
            index = start * world + rank
            while True:
                yield self._train_batch(frames, seed, index)
                index += world
        else:
            windows = [frames[i : i + WINDOW] for i in range(0, len(frames), WINDOW)]
            for window in windows[rank::world][start:]:
                samples = [self.sample(frame) for frame, _ in window]
                yield _collate(samples, [f.sample_id for f, _ in window], [_group(f, i) for f, i in window])

    def fingerprint(self, split: str) -> str:
        digest = hashlib.sha256(f"{HEIGHT}x{WIDTH} {SHARES} {WINDOW}".encode())
        for frame, _ in self.frames(split):
            if frame.sample_id not in self._hashes:
                self._hashes[frame.sample_id] = frame.sha256()
            digest.update(self._hashes[frame.sample_id].encode())
        return digest.hexdigest()

    def decoded(self, frame: Frame) -> tuple[Image.Image, Floats]:
        """Image at twice the network's resolution and the points in it; kept in memory (0.7 MB a frame)."""
        if frame.sample_id not in self._decoded:
            while len(self._decoded) >= KEPT_FRAMES:
                del self._decoded[next(iter(self._decoded))]
            image, points = frame.read()
            double = View.fit(image.width, image.height, 2 * HEIGHT, 2 * WIDTH)
            self._decoded[frame.sample_id] = Image.fromarray(double.image(image)), double.pixels(points)
        return self._decoded[frame.sample_id]

    def sample(self, frame: Frame) -> Sample:
        """The fixed sample of a frame: image (H, W, 3), given depth (H, W) and held-out depth (H, W)."""
        image, points = self.decoded(frame)
        return _seen(image, points, View.fit(2 * WIDTH, 2 * HEIGHT, HEIGHT, WIDTH), _generator(frame.sample_id))

    def _train_batch(self, frames: list[tuple[Frame, int]], seed: int, index: int) -> Batch:
        """Batch `index` of an endless shuffled stream; everything random follows from (seed, place in the stream)."""
        samples, ids, groups = [], [], []
        for place in range(index * TRAIN_BATCH, (index + 1) * TRAIN_BATCH):
            epoch, position = divmod(place, len(frames))
            order = np.random.default_rng([seed, 1, epoch]).permutation(len(frames))
            frame, in_drive = frames[order[position]]
            samples.append(_augment(*self.decoded(frame), np.random.default_rng([seed, 2, place])))
            ids.append(f"{frame.sample_id}#{place}")
            groups.append(_group(frame, in_drive))
        return _collate(samples, ids, groups)

    # -- model, losses, metrics ----------------------------------------------------------------------------------

    def build_model(self) -> nn.Module:
        return DepthFusionNet()

    def losses(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        label = batch.targets["depth"].to(outputs["depth"].device)
        known = (label > 0).to(label.dtype)
        error = ((outputs["depth"] - label) * known).abs()
        count = known.sum().clamp(min=1)
        # RMSE counts squares; beyond FAR_OFF_METRES the penalty grows linearly, or samples without LiDAR would drown
        # the others. The absolute error keeps near surfaces sharp.
        near = error.clamp(max=FAR_OFF_METRES)
        square = near * (2 * error - near)
        return {"absolute": error.sum() / count / 10.0, "square": square.sum() / count / 10.0}

    def sample_stats(self, outputs: dict[str, Tensor], batch: Batch) -> dict[str, Tensor]:
        label = batch.targets["depth"].double().cpu()
        depth = outputs["depth"].double().clamp(min=1e-3)
        known = label > 0
        error = torch.where(known, depth - label, 0.0)
        ratio = torch.where(known, torch.maximum(depth / label.clamp(min=1e-3), label / depth), torch.inf)
        pixels = (1, 2, 3)
        return {
            "square": error.square().sum(pixels),
            "absolute": error.abs().sum(pixels),
            "close": (ratio < 1.25).sum(pixels).double(),
            "count": known.sum(pixels).double(),
        }

    def score(self, stats: Mapping[str, Any]) -> dict[str, float]:
        total = {name: float(np.sum(values)) for name, values in stats.items()}
        return {
            "rmse": float(np.sqrt(total["square"] / total["count"])),
            "mae": total["absolute"] / total["count"],
            "delta1": total["close"] / total["count"],
        }

    def corrupt(self, batch: Batch, failure: str, severity: int) -> Batch:
        """Sensor failures: a dead or dark camera; a dead LiDAR, one that loses points, or one with fewer beams."""
        image, sparse = batch.inputs["image"], batch.inputs["sparse_depth"]
        if failure == "camera_blank":
            return batch.with_inputs(image=torch.zeros_like(image))
        if failure == "lidar_blank":
            return batch.with_inputs(sparse_depth=torch.zeros_like(sparse))
        if failure == "camera_dark":
            noise = _per_sample(batch, image, lambda g, shape: 0.02 * g.standard_normal(shape))
            return batch.with_inputs(image=(image * DARK_GAIN[severity] + noise).clamp(0, 1))
        if failure == "lidar_half":
            draw = _per_sample(batch, sparse, lambda g, shape: g.random(shape))
            return batch.with_inputs(sparse_depth=sparse * (draw < HALF_KEEPS[severity]))
        if failure == "lidar_sparse":
            # The map has no beam numbers; a beam is nearly one row, so rows stand for beams.
            rows = torch.arange(sparse.shape[2]) % SPARSE_EVERY[severity] == 0
            return batch.with_inputs(sparse_depth=sparse * rows.view(1, 1, -1, 1))
        raise TaskError(f"expected a failure of {FAILURES}; got {failure!r}; correct the recipe's robustness gates")

    # -- the dense checkpoint ------------------------------------------------------------------------------------

    def train_dense(self, path: Path, progress: Callable[[float, str], None]) -> None:
        """Train the dense network and write it to `path` (safetensors).

        AdamW under a one-cycle schedule; the same bytes for the same data, torch version and thread count.

        Raises:
            TaskError: the data cannot be read.
            TrainingError: the loss is not finite.
        """
        with torch.random.fork_rng(devices=[]), torch.enable_grad():
            torch.manual_seed(0)
            # channels_last is a quarter faster on a CPU; the file that is written does not depend on it.
            model = self.build_model().train()
            model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stubs lack it
            optimizer = torch.optim.AdamW(model.parameters(), lr=self.dense_lr, weight_decay=1e-3)
            schedule = torch.optim.lr_scheduler.OneCycleLR(
                optimizer, max_lr=self.dense_lr, total_steps=self.dense_steps, pct_start=0.15
            )
            stream = self.batches("train", 0)
            for step in range(self.dense_steps):
                batch = _drop_modalities(next(stream), self.dropout, np.random.default_rng([0, 3, step]))
                loss = torch.stack(list(self.losses(model(**batch.inputs), batch).values())).sum()
                value = float(loss.detach())
                if not np.isfinite(value):
                    raise TrainingError(
                        f"expected a finite loss; got {value} at step {step} of the dense training; "
                        "check the frames, or lower dense_lr"
                    )
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
                optimizer.step()
                schedule.step()
                progress((step + 1) / self.dense_steps, f"step {step + 1}/{self.dense_steps} loss {value:.3f}")
        _save(model, path)

    # -- pictures for the report ---------------------------------------------------------------------------------

    def pictures(
        self, batch: Batch, dense_outputs: dict[str, Tensor], outputs: dict[str, Tensor]
    ) -> dict[str, Picture]:
        """What went in, what was asked and what came out for the first sample, for a person to look at."""
        image = (batch.inputs["image"][0].permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)
        sparse = batch.inputs["sparse_depth"][0, 0].numpy()
        label = batch.targets["depth"][0, 0].cpu().numpy()
        dense, small = (o["depth"][0, 0].detach().float().cpu().numpy() for o in (dense_outputs, outputs))
        difference = np.abs(small - dense)
        # Far from any point (the sky) nothing judges or teaches the network: what it says there means nothing.
        known = (batch.inputs["sparse_depth"][:1] + batch.targets["depth"][:1].cpu() > 0).float()
        judged = nn.functional.max_pool2d(known, 9, stride=1, padding=4)[0, 0].numpy() > 0
        legend = "depth, metres (grey: no LiDAR point near, not judged)"
        return {
            "Camera image": _captioned(image, f"frame {batch.sample_ids[0]}"),
            "LiDAR points given to the network": _captioned(_coloured(sparse, sparse > 0), "depth, metres", FAR_METRES),
            "LiDAR points held out (label)": _captioned(_coloured(label, label > 0), "depth, metres", FAR_METRES),
            "Depth, dense model": _captioned(_coloured(dense, judged), legend, FAR_METRES),
            "Depth, compressed model": _captioned(_coloured(small, judged), legend, FAR_METRES),
            "Difference, compressed against dense": _captioned(
                _coloured(difference, judged, far=DIFFERENCE_METRES, linear=True),
                "absolute difference, metres (grey: not judged)",
                DIFFERENCE_METRES,
                linear=True,
            ),
        }


def _split_by_time(drives: dict[str, list[Frame]], root: Path) -> dict[str, list[tuple[Frame, int]]]:
    splits: dict[str, list[tuple[Frame, int]]] = {"train": [], "calib": [], "eval": []}
    for frames in drives.values():
        edge = 0.0
        for name, share in SHARES:
            first, edge = edge, edge + share
            part = frames[round(first * len(frames)) : round(edge * len(frames))]
            if name != "gap":
                splits[name].extend((frame, index) for index, frame in enumerate(part))
            elif not part:
                # A drive too short for a gap would put neighbouring frames into two splits.
                raise TaskError(
                    f"expected at least 10 frames a drive, to split it by time with gaps; got {len(frames)} in "
                    f"{frames[0].drive!r} at {root}; give a longer drive"
                )
    return splits


def _group(frame: Frame, in_drive: int) -> str:
    return f"{frame.drive}/{in_drive // WINDOW:04d}"


def _generator(name: str) -> np.random.Generator:
    return np.random.default_rng(int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little"))


def _seen(image: Image.Image, points: Floats, view: View, generator: np.random.Generator) -> Sample:
    depth = depth_map(view.pixels(points), HEIGHT, WIDTH, near=NEAR_METRES, far=FAR_METRES)
    return view.image(image), *split_halves(depth, generator)


def _augment(image: Image.Image, points: Floats, generator: np.random.Generator) -> Sample:
    """Zoom and mirror image and points alike, change the light, deal the points anew."""
    view = View.random(2 * WIDTH, 2 * HEIGHT, HEIGHT, WIDTH, generator)
    picture, given, held_out = _seen(image, points, view, generator)
    if generator.random() < 0.5:
        picture, given, held_out = picture[:, ::-1], given[:, ::-1], held_out[:, ::-1]
    gain = generator.uniform(0.7, 1.3) * generator.uniform(0.9, 1.1, size=3)
    contrast = generator.uniform(0.8, 1.2)
    mean = picture.mean()
    jittered = np.clip(((picture - mean) * contrast + mean) * gain, 0, 255).round().astype(np.uint8)
    return jittered, given, held_out


def _collate(samples: list[Sample], ids: list[str], groups: list[str]) -> Batch:
    images, given, held_out = zip(*samples, strict=True)
    return Batch(
        inputs={
            "image": torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).contiguous().float() / 255,
            "sparse_depth": torch.from_numpy(np.stack(given))[:, None],
        },
        targets={"depth": torch.from_numpy(np.stack(held_out))[:, None]},
        sample_ids=ids,
        groups=groups,
    )


def _drop_modalities(batch: Batch, chances: Mapping[str, float], generator: np.random.Generator) -> Batch:
    """Blank at most one modality of each sample; a sample without any sensor would teach nothing."""
    draw = torch.from_numpy(generator.random(batch.size))
    inputs, edge = {}, 0.0
    for name, chance in chances.items():
        dropped = (draw >= edge) & (draw < edge + chance)
        edge += chance
        inputs[name] = batch.inputs[name] * ~dropped.view(-1, 1, 1, 1)
    return batch.with_inputs(**inputs)


def _per_sample(
    batch: Batch, like: Tensor, draw: Callable[[np.random.Generator, tuple[int, ...]], NDArray[np.float64]]
) -> Tensor:
    """Random numbers that follow from the sample's name, so that every model meets the same failure."""
    shape = tuple(like.shape[1:])
    return torch.from_numpy(np.stack([draw(_generator(f"{name} failure"), shape) for name in batch.sample_ids])).to(
        like
    )


def _save(model: nn.Module, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        save_file({name: value.contiguous() for name, value in model.state_dict().items()}, aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def _coloured(
    depth: NDArray[np.floating[Any]],
    known: NDArray[np.bool_] | None = None,
    *,
    far: float = FAR_METRES,
    linear: bool = False,
) -> Picture:
    """Colours of a depth map: near red to far blue on a logarithmic scale, or dark to bright on a linear one."""
    from matplotlib import colormaps

    if linear:
        colours = colormaps["magma"](np.clip(depth / far, 0, 1))
    else:
        place = np.log(np.clip(depth, NEAR_METRES, far) / NEAR_METRES) / np.log(far / NEAR_METRES)
        colours = colormaps["turbo_r"](place)
    picture: Picture = (colours[..., :3] * 255).round().astype(np.uint8)
    if known is not None:
        picture[~known] = 72 if linear else 24
    return picture


def _captioned(picture: Picture, caption: str, far: float | None = None, *, linear: bool = False) -> Picture:
    """Enlarge three times; a strip above says what it is, with the colour scale in metres."""
    large = np.kron(picture, np.ones((3, 3, 1), dtype=np.uint8))
    width = large.shape[1]
    strip = Image.new("RGB", (width, 36), (255, 255, 255))
    draw = ImageDraw.Draw(strip)
    draw.text((8, 10), caption, fill=(20, 20, 20), font_size=16)
    if far is not None:
        ramp = np.linspace(0, 1, 240)
        metres = ramp * far if linear else NEAR_METRES * (far / NEAR_METRES) ** ramp
        bar = _coloured(np.tile(metres, (14, 1)), far=far, linear=linear)
        strip.paste(Image.fromarray(bar), (width - 300, 11))
        near = "0" if linear else f"{NEAR_METRES:g}"
        draw.text((width - 324, 10), near, fill=(20, 20, 20), font_size=16)
        draw.text((width - 52, 10), f"{far:g} m", fill=(20, 20, 20), font_size=16)
    return np.concatenate([np.asarray(strip, dtype=np.uint8), large])
