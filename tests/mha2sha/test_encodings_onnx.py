"""Activations keyed by ONNX tensors: the names that land are those of real exports of both forms."""

import contextlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from aimet_torch.common import quantsim
from aimet_torch.quantsim import QuantizationSimModel
from diffusers.models.attention_processor import Attention, AttnProcessor, AttnProcessor2_0
from torch import Tensor, nn

from sdconvert.io.encodings import EncodingsFile, parse_encodings, read_encodings_file
from sdconvert.mha2sha.encodings import merge_encodings, split_encodings
from sdconvert.mha2sha.encodings_modules import ModuleMap
from sdconvert.mha2sha.encodings_onnx import BEFORE_BIAS, COUNTED, INSIDE, LeftOut, TensorNames
from sdconvert.mha2sha.heads import head_splits
from sdconvert.mha2sha.row_split import even_split
from sdconvert.models.attention import SHAAttentionPatch
from sdconvert.models.attention_processors import ExplicitAttnProcessor

pytestmark = pytest.mark.filterwarnings("ignore")
LAYERS = ("blocks.0.attn1", "blocks.0.attn2")
PROCESSORS = [ExplicitAttnProcessor, AttnProcessor, AttnProcessor2_0]
INPUTS = (torch.linspace(-1, 1, 40).reshape(1, 5, 8), torch.linspace(-2, 1, 18).reshape(1, 3, 6))


class Block(nn.Module):
    """Attention with biases to itself, and without to the text."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.attn1 = Attention(8, heads=2, dim_head=4, bias=True)
        self.attn2 = Attention(8, cross_attention_dim=6, heads=2, dim_head=4)

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        """(b, T, 8) and (b, T', 6) -> (b, T, 8)."""
        tokens = tokens + self.attn1(self.norm(tokens))
        output: Tensor = tokens + self.attn2(tokens, text)
        return output


class Net(nn.Module):
    """A list of blocks, whose elements exporters write in ways of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.proj_in = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block()])

    def forward(self, tokens: Tensor, text: Tensor) -> Tensor:
        """As `Block.forward`."""
        tokens = self.proj_in(tokens)
        for block in self.blocks:
            tokens = block(tokens, text)
        return tokens


def net(*, sha: bool, processor: Any = ExplicitAttnProcessor) -> Net:
    torch.manual_seed(0)
    model = Net().eval()
    for layer in LAYERS:
        model.get_submodule(layer).set_processor(processor())
    if sha:
        for patch in SHAAttentionPatch.wrap_model("sha", model).values():
            patch.fuse()
    return model


SHAPES = {key: tuple(tensor.shape) for key, tensor in net(sha=False).state_dict().items()}
SPLITS = head_splits(SHAPES, dict.fromkeys(LAYERS, 2))


@contextlib.contextmanager
def aimet_version(version: str) -> Iterator[None]:
    before, quantsim.encoding_version = quantsim.encoding_version, version
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        quantsim.encoding_version = before


def simulation(*, sha: bool) -> Any:
    sim = QuantizationSimModel(net(sha=sha), INPUTS, default_output_bw=16, default_param_bw=8, in_place=True)
    sim.compute_encodings(lambda model: model(*INPUTS))
    return sim


@pytest.fixture(scope="module")
def aimet(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both forms by both of AIMET's exporters: `<form>.encodings` with `<form>_torch…`, and `<form>_traced…`."""
    folder = tmp_path_factory.mktemp("aimet")
    for form in ("mha", "sha"):
        sim = simulation(sha=form == "sha")
        with aimet_version("1.0.0"):
            sim.export(str(folder), form, INPUTS)
            sim.onnx.export(INPUTS, str(folder / f"{form}_traced.onnx"), encoding_version="2.0.0")
    return folder


def tensors(path: Path, *ops: str) -> list[str]:
    nodes = onnx.load(path, load_external_data=False).graph.node
    return [node.output[0] for node in nodes if not ops or node.op_type in ops]


def assert_reverse(file: EncodingsFile, result: Any) -> None:
    record = json.loads(json.dumps(result.record))
    assert merge_encodings(parse_encodings(result.file.dumps()), SPLITS, record).dumps() == file.dumps()


@pytest.mark.parametrize("processor", PROCESSORS)
def test_names_of_torch_s_exporter_land(tmp_path: Path, processor: Any) -> None:
    graphs = {form: tmp_path / f"{form}.onnx" for form in ("mha", "sha")}
    for form, path in graphs.items():
        model = net(sha=form == "sha", processor=processor)
        names = {"input_names": ["tokens", "text"], "output_names": ["out"]}
        torch.onnx.export(model, INPUTS, str(path), dynamo=False, opset_version=17, **names)
    entry = [{"bitwidth": 16, "dtype": "float"}]
    names = ["tokens", "text", *tensors(graphs["mha"], "MatMul", "Softmax", "Add", "LayerNormalization", "Mul")]
    file = parse_encodings(json.dumps({"activation_encodings": dict.fromkeys(names, entry), "param_encodings": {}}))
    result = split_encodings(file, SPLITS, list(SHAPES), inputs=["tokens", "text"])
    found, sha = set(result.file.activations), set(tensors(graphs["sha"])) | {"tokens", "text"}
    assert found <= sha
    convolutions = set(tensors(graphs["sha"], "Conv"))
    assert len(convolutions) == 12
    assert convolutions | set(tensors(graphs["sha"], "Softmax", "Concat")) - {"/Concat_output_0"} <= found
    reasons = {one.name: one.reason for one in result.left_out}
    assert set(reasons.values()) <= {BEFORE_BIAS, INSIDE, COUNTED}
    assert reasons["/blocks.0/attn1/to_q/MatMul_output_0"] == BEFORE_BIAS
    assert set(reasons) | (set(names) & found) | {
        n for n in names if "/to_" in n or "Softmax" in n or "MatMul" in n
    } == set(names)
    assert_reverse(file, result)


def test_names_of_aimet_s_exporter_land(aimet: Path) -> None:
    file, sha = (read_encodings_file(aimet / f"{form}.encodings") for form in ("mha", "sha"))
    result = split_encodings(file, SPLITS, list(SHAPES))
    assert list(result.file.params) == list(sha.params)
    assert set(result.file.activations) <= set(tensors(aimet / "sha.onnx"))
    convolutions = set(tensors(aimet / "sha.onnx", "Conv"))
    assert convolutions <= result.file.activations.keys()
    assert all("/to_q_convs/to_q_convs." in name for name in convolutions if "to_q" in name)
    assert {one.reason for one in result.left_out} == {COUNTED, INSIDE}
    assert_reverse(file, result)


@pytest.mark.parametrize("stem", ["", "_traced"])
def test_two_graphs_place_every_computed_tensor(aimet: Path, stem: str) -> None:
    """Of AIMET's own file for the SHA form only moved tensors are missing, whose ranges are those of what is moved."""
    file, sha = (read_encodings_file(aimet / f"{form}{stem}.encodings") for form in ("mha", "sha"))
    graphs = (aimet / f"mha{stem}.onnx", aimet / f"sha{stem}.onnx")
    result = split_encodings(file, SPLITS, list(SHAPES), graphs=graphs)
    found, wanted = (dict(one.every_tensor()).keys() for one in (result.file, sha))
    moved = {name for name in wanted if any(op in name.lower() for op in ("permute", "transpose", "unsqueeze"))}
    moved |= {name for name in wanted if "Constant" in name or name.startswith("val_")}
    assert wanted - found <= moved
    assert found <= set(tensors(graphs[1])) | SHAPES_OF_SHA | set(inputs(graphs[1]))
    assert_reverse(file, result)


SHAPES_OF_SHA = set(net(sha=True).state_dict()) | {f"{key}_0" for key in SHAPES}


def inputs(path: Path) -> list[str]:
    return [value.name for value in onnx.load(path, load_external_data=False).graph.input]


def test_aimet_loads_the_result(aimet: Path, tmp_path: Path) -> None:
    file = read_encodings_file(aimet / "mha_torch.encodings")
    result = split_encodings(file, SPLITS, list(SHAPES))
    assert not result.left_out
    result.file.write(tmp_path / "sha_torch.encodings")
    sim = simulation(sha=True)
    # AIMET's SHA graph has no quantizer at inputs that come from a functional add, where its MHA graph has one.
    sim.load_encodings(str(tmp_path / "sha_torch.encodings"), strict=False)
    for path, places in result.file.modules.items():
        (output,) = sim.model.get_submodule(path).output_quantizers
        assert output.get_scale().item() == pytest.approx(places["output"]["0"]["scale"], rel=1e-6)
    parents = {part.name: (split.parent, part) for split in SPLITS for part in split}
    for name, encoding in result.file.params.items():
        path, _, parameter = name.rpartition(".")
        scale = sim.model.get_submodule(path).param_quantizers[parameter].get_scale().flatten().tolist()
        parent, part = parents.get(name, (name, None))
        assert encoding.fields["scale"] == file.params[parent].fields["scale"][part.rows if part else slice(None)]
        assert scale == pytest.approx(encoding.fields["scale"], rel=1e-6)
    assert_reverse(file, result)


@pytest.mark.parametrize(
    ("name", "children"),
    [
        ("/a/to_q/Add_output_0", ("/a/to_q_convs.0/Conv_output_0", "/a/to_q_convs.1/Conv_output_0")),
        ("/a/to_q/Gemm_output_0", ("/a/to_q_convs.0/Conv_output_0", "/a/to_q_convs.1/Conv_output_0")),
        ("/a/to_k/MatMul_output_0", ("/a/to_k_convs.0/Conv_output_0", "/a/to_k_convs.1/Conv_output_0")),
        ("/a/Softmax_output_0", ("/a/Softmax_output_0", "/a/Softmax_1_output_0")),
        ("/a/MatMul_1_output_0", ("/a/MatMul_1_output_0", "/a/MatMul_3_output_0", "/a/Concat_output_0")),
        (
            "/ff/net.0/proj/Add_output_0",
            ("/ff/net.0/proj_convs.0/Conv_output_0", "/ff/net.0/proj_convs.1/Conv_output_0"),
        ),
        ("/ff/net.2/Add_output_0", ("/ff/net.2/Conv_output_0",)),
        ("/ff/net/net.2/MatMul_output_0", BEFORE_BIAS),
        ("/a/norm/LayerNormalization_output_0", ("/a/norm/LayerNormalization_output_0",)),
        ("/Add_3_output_0", ("/Add_3_output_0",)),
        ("sample", ("sample",)),
        ("/a/to_q/MatMul_output_0", BEFORE_BIAS),
        ("/a/Mul_output_0", INSIDE),
        ("/a/MatMul_output_0", INSIDE),
        ("/a/Transpose_2_output_0", INSIDE),
        ("17", COUNTED),
        ("linear_3", COUNTED),
        ("t.1", COUNTED),
    ],
)
def test_each_name_has_a_rule(name: str, children: Any) -> None:
    shapes = {f"a.to_{p}.weight": (4, 2) for p in "qkv"} | {"a.to_q.bias": (4,), "ff.net.0.proj.bias": (4,)}
    shapes["ff.net.2.bias"] = (4,)
    proj = "ff.net.0.proj"
    halves = even_split("ff.net.0", f"{proj}.weight", [f"{proj}_convs.{k}.weight" for k in (0, 1)], 4, True)
    same = even_split("ff.net.2", "ff.net.2.weight", ["ff.net.2.weight"], 4, True)
    module_map = ModuleMap([*head_splits(shapes, {"a": 2}), halves, same])
    found = TensorNames(module_map, ["/blocks.0/a"], shapes, inputs=["sample"]).children(name)
    assert found == (children if isinstance(children, tuple) else LeftOut(name, children))
