"""Encodings of every version and granularity: by hand, by Hypothesis, and as AIMET itself writes them."""

import contextlib
import io
import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from aimet_torch.common import quantsim
from aimet_torch.quantization.affine import QuantizeDequantize
from aimet_torch.quantization.float import FloatQuantizeDequantize
from aimet_torch.quantsim import QuantizationSimModel
from aimet_torch.quantsim.config_utils import (
    set_blockwise_quantization_for_weights,
    set_grouped_blockwise_quantization_for_weights,
)
from hypothesis import strategies as st
from torch import Tensor, nn

from sdconvert.io.encodings import Kind

GRANULARITIES = ("channel", "block", "lpbq", "shift", "float")
SHAPES = {"conv.weight": (6, 8, 1, 1), "conv.bias": (6,), "lin.weight": (4, 8), "lin.bias": (4,), "last.weight": (3, 8)}
EXPORTERS = {"export": ("0.6.1", "1.0.0"), "torch": ("0.6.1", "1.0.0"), "onnx": ("0.6.1", "1.0.0", "2.0.0", "2.1.0")}


class Net(nn.Module):
    """One layer of each kind; weights of eight columns, so that blocks of four are two."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(8, 6, 1)
        self.lin = nn.Linear(8, 4)
        self.last = nn.Linear(8, 3, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(1, 8, 3, 3) -> (1, 9, 3)."""
        hidden = self.conv(x)
        tokens = torch.cat([hidden, hidden[:, :2]], 1).flatten(2).transpose(1, 2)
        hidden = self.lin(tokens)
        output: Tensor = self.last(torch.cat([hidden, hidden], -1))
        return output


@cache
def aimet_simulation(granularity: str) -> tuple[Any, tuple[Tensor, ...]]:
    """A simulation, and the inputs that its ranges are of."""
    torch.manual_seed(0)
    x = torch.randn(1, 8, 3, 3)
    sim = QuantizationSimModel(Net().eval(), x, default_output_bw=16, default_param_bw=8, in_place=True)
    if granularity == "block":
        set_blockwise_quantization_for_weights(sim, [nn.Conv2d, nn.Linear], 4, True, 4)
    if granularity == "lpbq":
        set_grouped_blockwise_quantization_for_weights(sim, [nn.Conv2d, nn.Linear], 4, True, 8, 4)
    if granularity == "float":
        sim.model.lin.param_quantizers["weight"] = FloatQuantizeDequantize(dtype=torch.float16)
        sim.model.lin.output_quantizers[0] = FloatQuantizeDequantize(dtype=torch.float16)
    if granularity == "shift":
        sim.model.lin.param_quantizers["weight"] = QuantizeDequantize(
            (4, 1), bitwidth=2, symmetric=True, zero_point_shift=0.5
        )
    sim.compute_encodings(lambda model: model(x))
    return sim, (x,)


@cache
def aimet_file(granularity: str, exporter: str, version: str, folder: Path) -> Path:
    """What AIMET writes for a simulation; `torch` is the file for `load_encodings` beside that of `export`."""
    sim, inputs = aimet_simulation(granularity)
    return export(sim, inputs, exporter, version, folder / f"{granularity}_{exporter}_{version}")


def export(sim: Any, inputs: tuple[Tensor, ...], exporter: str, version: str, path: Path) -> Path:
    """Have AIMET write ONNX and encodings of a simulation; returns the encodings."""
    before = quantsim.encoding_version
    with contextlib.redirect_stdout(io.StringIO()):
        if exporter == "onnx":
            sim.onnx.export(inputs, f"{path}.onnx", encoding_version=version)
            return Path(f"{path}.encodings")
        quantsim.encoding_version = version
        try:
            sim.export(str(path.parent), path.name, inputs)
        finally:
            quantsim.encoding_version = before
    return Path(f"{path}{'_torch' if exporter == 'torch' else ''}.encodings")


def files_of_aimet() -> list[Any]:
    """Granularity, exporter and version of all that AIMET writes; most of the slow exporter's only in slow tests."""
    fast = {("lpbq", "2.0.0"), ("lpbq", "2.1.0"), ("block", "2.0.0"), ("shift", "2.0.0")}
    return [
        pytest.param(
            *(granularity, exporter, version),
            marks=[pytest.mark.slow] if exporter == "onnx" and (granularity, version) not in fast else [],
        )
        for exporter, versions in EXPORTERS.items()
        for version in versions
        for granularity in GRANULARITIES
    ]


def kind_of(granularity: str, exporter: str, version: str) -> Kind | None:
    """The kind of `lin.weight` in a file of AIMET's; the onnx exporter leaves float tensors out."""
    if granularity == "float":
        return None if exporter == "onnx" else Kind.FLOAT
    if exporter == "torch" or version == "0.6.1" or granularity in ("channel", "shift"):
        return Kind.CHANNEL
    return Kind(granularity)


def same_json(first: str, second: str) -> bool:
    """Whether two texts are the same JSON, with the same order of keys."""
    return json.dumps(json.loads(first)) == json.dumps(json.loads(second))


scales = st.one_of(st.floats(2**-40, 2**10, width=32), st.floats(1e-12, 1e3))


@dataclass(frozen=True)
class Model:
    """A file of form 1.0.0, and the shapes of its parameters by their names in the weights."""

    content: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


@st.composite
def models(draw: st.DrawFn, kinds: Sequence[str] = ("tensor", "channel", "block", "lpbq", "float")) -> Model:
    """A few parameters and activations of every kind; matrices stand transposed now and then."""
    shapes: dict[str, tuple[int, ...]] = {}
    params = []
    for index in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(kinds))
        blocks, size, rows = draw(st.integers(2, 3)), draw(st.sampled_from([2, 4])), draw(st.integers(2, 5))
        rank = draw(st.sampled_from([2, 4] if kind in ("block", "lpbq") else [1, 2, 4]))
        key = f"layers.{index}.{draw(st.sampled_from(['weight', 'bias'] if rank == 1 else ['weight']))}"
        shapes[key] = (rows, blocks * size, 1, 1)[:rank]
        constant = rank == 2 and draw(st.booleans())
        name = f"{key}_{draw(st.integers(0, 9))}" if constant else key
        params.append(draw(entries(name, kind, {"tensor": 1, "float": 1}.get(kind, rows), blocks, size)))
    activations = [draw(entries(f"/a/Add_{k}_output_0", "tensor", 1, 1, 1)) for k in range(draw(st.integers(0, 2)))]
    head = {"version": "1.0.0", "producer": {"package": "x"}}
    return Model({**head, "activation_encodings": activations, "param_encodings": params}, shapes)


@st.composite
def entries(draw: st.DrawFn, name: str, kind: str, rows: int, blocks: int, size: int) -> dict[str, Any]:
    """One entry of form 1.0.0."""
    if kind == "float":
        return {"name": name, "enc_type": "PER_TENSOR", "dtype": "FLOAT", "bw": 16}
    count = rows * blocks if kind == "block" else rows
    bits = draw(st.sampled_from([2, 4, 8, 16, 32]))
    symmetric = kind == "lpbq" or draw(st.booleans())
    bits = 2 * min(bits, 16) if kind == "lpbq" else bits
    middle = -(2 ** (bits - 1))
    offset = [middle if symmetric else draw(st.integers(2 * middle + 1, 0)) for _ in range(count)]
    enc_type = {"tensor": "PER_TENSOR", "channel": "PER_CHANNEL", "block": "PER_BLOCK", "lpbq": "LPBQ"}[kind]
    entry = {"name": name, "enc_type": enc_type, "dtype": "INT", "bw": bits, "is_sym": symmetric}
    entry |= {"scale": [draw(scales) for _ in range(count)], "offset": offset}
    if kind in ("block", "lpbq"):
        entry["block_size"] = size
    if kind == "lpbq":
        entry["compressed_bw"] = bits // 2
        entry["per_block_int_scale"] = [draw(st.integers(1, 2 ** (bits // 2))) for _ in range(rows * blocks)]
    elif symmetric and draw(st.booleans()):
        entry["zero_point_shift"] = [0.5] * count
    return entry
