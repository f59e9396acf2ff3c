"""A network cut into branches and the rest: the parts one after the other compute what the whole does."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from fusepress.export.branches import split_branches
from fusepress.export.onnx import export_onnx
from fusepress.export.runtime import OnnxSession
from fusepress.pipeline.errors import ExportError
from tests.export_toys import arrays, inputs, two_branch

BRANCHES = {"camera": ["camera"], "lidar": ["pillar", "pillar2", "lidar"]}


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("whole") / "model.onnx"
    export_onnx(two_branch(), inputs(1), ["seg", "cls"], path, opset=17)
    return path


def test_parts_one_after_the_other_are_the_whole(whole: Path, tmp_path: Path) -> None:
    parts = split_branches(whole, BRANCHES, tmp_path)
    assert list(parts) == ["camera", "lidar", "rest"]
    feeds = arrays(1)
    want = OnnxSession(whole).run_numpy(feeds)
    known = dict(feeds)
    for name, path in parts.items():
        session = OnnxSession(path)
        found = session.run_numpy({each: known[each] for each in session.inputs})
        known |= found
        assert set(session.inputs) <= set(known)
        if name == "camera":
            assert set(session.inputs) == {"image"}
        if name == "lidar":
            assert set(session.inputs) == {"points", "index"}
    for output, value in want.items():
        np.testing.assert_allclose(known[output], value, rtol=1e-5, atol=1e-6)


class Exchanging(torch.nn.Module):
    """The camera's second layer takes what the LiDAR's first one made."""

    def __init__(self) -> None:
        super().__init__()
        self.camera = torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)])
        self.lidar = torch.nn.Linear(4, 4)

    def forward(self, image: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
        first, other = torch.relu(self.camera[0](image)), torch.relu(self.lidar(points))
        return torch.relu(self.camera[1](first + other)) + other


def test_branches_that_exchange_tensors_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    feeds = {"image": torch.rand(1, 4), "points": torch.rand(1, 4)}
    export_onnx(Exchanging().eval(), feeds, ["output"], path, opset=17)
    branches = {"camera": ["camera"], "lidar": ["lidar"]}
    with pytest.raises(ExportError, match=r"expected the branch 'camera' to be computed from its own inputs; got the"):
        split_branches(path, branches, tmp_path)


def test_a_branch_without_nodes_is_refused(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(ExportError, match=r"expected nodes of the branch 'radar'; got none at .*model.onnx"):
        split_branches(whole, {"radar": ["radar"]}, tmp_path)
