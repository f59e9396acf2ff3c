"""What builders say about layers: the log of TensorRT-RTX, the JSON of TensorRT 10 and 11, and profiles."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from fusepress.export.inspector import parse_inspection, parse_layers, parse_profile, read_layers
from fusepress.pipeline.errors import BuildError


def test_layers_are_read_from_the_dump() -> None:
    tensor = "{ Name: t, Dimensions: [1,20,4], Strides: [80,4,1], Datatype: %s, Format: (Linear) Row major }"
    line = (
        f"Name: fuse/Conv_myl0_6, LayerType: correlation, Inputs: [ {tensor % 'Int8'}], "
        f"Constants: [ {tensor % 'Int8'}, {tensor % 'Float'}], Outputs: [ {tensor % 'Half'}], "
        "TacticName: stub, StreamId: 0, Metadata: [ONNX Layer: fuse/Conv][ONNX Layer: q]"
    )
    move = f"Name: m, LayerType: kgen, Inputs: [], Constants: [], Outputs: [ {tensor % 'Half'}], TacticName: t, "
    layers = parse_layers(f"[VERBOSE] Layers:\n{line}\n{move}\n[INFO] done\n")
    assert [(e.name, e.type, e.precision, e.nodes) for e in layers] == [
        ("fuse/Conv_myl0_6", "correlation", "int8", ("fuse/Conv", "q")),
        ("m", "kgen", "fp16", ()),
    ]
    assert (layers[0].inputs, layers[0].outputs, layers[0].tactic) == (("int8",), ("fp16",), "stub")
    assert [e.computes for e in layers] == [True, False]


def _tensor(layout: str, words: str, datatype: str) -> dict[str, Any]:
    if layout == "10":
        return {"Name": "t", "Dimensions": [1, 8, 4, 4], "Format/Datatype": words}
    return {"Name": "t", "Dimensions": [1, 8, 4, 4], "Format": words.rpartition(" ")[0], "Datatype": datatype}


def _inspection(layout: str) -> str:
    int8 = _tensor(layout, "Thirty-two wide channel vectorized row major Int8 format", "Int8")
    half = _tensor(layout, "Two wide channel vectorized row major FP16 format", "Half")
    layers = [
        {
            "Name": "conv1/Conv + conv1/Relu",
            "LayerType": "CaskConvolution",
            "Inputs": [int8],
            "Outputs": [half],
            "HasSparseWeights": 1,
            "TacticName": "sm80_xmma_fprop_sparse_conv_interleaved_i8i8",
            "Metadata": "[ONNX Layer: conv1/Conv]\u001e[ONNX Layer: conv1/Relu]",
        },
        {
            "Name": "Reformatting CopyNode for Input Tensor 0 to head",
            "LayerType": "Reformat",
            "Inputs": [half],
            "Outputs": [int8],
        },
        {"Name": "{ForeignNode[a...b]}", "LayerType": "Myelin", "Inputs": [], "Outputs": []},
        {"Name": "head + bias", "LayerType": "CaskGemmConvolution", "Inputs": [half], "Outputs": [half]},
    ]
    tensors = {"Bindings": ["x"]} if layout == "10" else {"I/O Tensors": [{"Name": "x"}]}
    return json.dumps({"Layers": layers, **tensors})


@pytest.mark.parametrize("layout", ["10", "11"])
def test_both_layouts_of_the_inspector_say_the_same(layout: str) -> None:
    found = parse_inspection(_inspection(layout))
    assert found.layout == layout
    assert found.tensors == ("x",)
    assert [(e.type, e.precision, e.inputs, e.outputs) for e in found.layers] == [
        ("CaskConvolution", "int8", ("int8",), ("fp16",)),
        ("Reformat", "int8", ("fp16",), ("int8",)),
        ("Myelin", "unknown", (), ()),
        ("CaskGemmConvolution", "fp16", ("fp16",), ("fp16",)),
    ]
    assert [e.nodes for e in found.layers] == [("conv1/Conv", "conv1/Relu"), (), (), ("head", "bias")]
    assert [e.has_sparse_weights for e in found.layers] == [True, None, None, None]
    assert [e.computes for e in found.layers] == [True, False, False, True]
    assert [e.reformats for e in found.layers] == [False, True, False, False]


def test_without_detailed_verbosity_there_are_only_names() -> None:
    found = parse_inspection(json.dumps({"Layers": ["conv1 + relu1", "Reformatting CopyNode for x"], "Bindings": []}))
    assert found.layout == "names"
    assert [(e.precision, e.nodes, e.reformats) for e in found.layers] == [
        ("unknown", ("conv1", "relu1"), False),
        ("unknown", (), True),
    ]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "expected the JSON of an engine inspector; got something else at f"),
        ("[]", "expected a list `Layers`; got list at f"),
        ('{"Bindings": []}', "expected a list `Layers`; got Bindings at f"),
    ],
    ids=["text", "list", "without-layers"],
)
def test_what_is_no_inspection_is_refused(text: str, message: str) -> None:
    with pytest.raises(BuildError, match=message):
        parse_inspection(text, where="f")


def test_a_profile_is_read_even_where_its_names_are_not_escaped() -> None:
    entry = '{ "name" : "%s", "timeMs" : 20, "averageMs" : %s, "medianMs" : 0.09, "percentage" : 50 }'
    clean = f'[ {{ "count" : 200 }}\n, {entry % ("a + b", 0.1)}\n, {entry % ("a + b", 0.2)} ]'
    assert parse_profile(clean) == {"a + b": pytest.approx(0.3)}
    broken = f'[ {{ "count" : 200 }}\n, {entry % (chr(34) + "q" + chr(34), 0.1)}\n, {entry % ("b", 1e-3)} ]'
    with pytest.raises(json.JSONDecodeError):
        json.loads(broken)
    assert parse_profile(broken) == {'"q"': 0.1, "b": 0.001}
    with pytest.raises(BuildError, match="expected layers with averageMs; got none at p"):
        parse_profile("[]", where="p")


def test_layers_are_read_from_either_kind_of_file(tmp_path: Path) -> None:
    (tmp_path / "layers.json").write_text(_inspection("11"))
    assert len(read_layers(tmp_path / "layers.json")) == 4
    (tmp_path / "m.log").write_text("nothing of use\n")
    with pytest.raises(BuildError, match=r"expected the layers of an engine; got none at .*m\.log"):
        read_layers(tmp_path / "m.log")
    with pytest.raises(BuildError, match="expected a list of layers; got no file at"):
        read_layers(tmp_path / "none")
