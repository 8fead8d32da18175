"""Which form of attention the HTP compiler takes best: one layer of Stable Diffusion 1.5, written in many ways.

python benchmarks/attention_forms.py [--tokens 1024] [--soc SM8650] [--layers self] [--forms sha naive …] [--simulate]

320 channels, 8 heads, behind a LayerNorm; to itself, or to 77 tokens of text. Every form has the same weights and
inputs, is quantized and exported as the product does it (W8A16), and compiled in a process of its own, whose CPU
seconds and peak RSS are taken. At 4096 tokens the naive form takes 100 CPU seconds and 3 GB, all others 4 to 11 CPU
seconds; `--simulate` then takes minutes per form. None of these figures is a device's time.
"""

import argparse
import os
import platform
import resource
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import onnx
import torch
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.adapters.spec import GraphSize, IOSpec
from sdconvert.export.bias_range import make_room_for_biases
from sdconvert.export.factors import quantize_factors
from sdconvert.export.onnx_graph import to_onnx
from sdconvert.export.transposed_keys import take_keys_as_rows
from sdconvert.metrics import worst_sqnr_db
from sdconvert.models.attention import per_head
from sdconvert.models.attention_steps import as_image
from sdconvert.models.convolutions import PointwiseConv2d
from sdconvert.models.image_layout import in_rows
from sdconvert.models.layer_norm import ChannelLayerNorm
from sdconvert.models.per_head import head_convs
from sdconvert.qnn.context import compile_context
from sdconvert.qnn.nodes import read_nodes
from sdconvert.qnn.simulator import Simulator
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Simulation
from sdconvert.soc import find_soc

CHANNELS, HEADS, TEXT_TOKENS, TEXT_CHANNELS = 320, 8, 77, 768
DIM = CHANNELS // HEADS
MIB, KIB = 1 << 20, 1 << 10


class Heads(nn.Module):
    """1x1 convolutions of each head, as the product cuts them, and of the output; subclasses say what lies between."""

    def __init__(self, attn: Any) -> None:
        super().__init__()
        projections = (attn.to_q, attn.to_k, attn.to_v)
        self.queries, self.keys, self.values = (head_convs(one, range(CHANNELS), DIM) for one in projections)
        self.out = PointwiseConv2d.from_rows(attn.to_out[0].weight, attn.to_out[0].bias)
        self.scale = attn.scale

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """(1, C, H, W), and tokens (1, Tk, C') -> (1, C, H, W)."""
        image = as_image(x)
        return in_rows(self.attend(image, image if context is None else as_image(context)), x.shape[2])

    def attend(self, image: Tensor, source: Tensor) -> Tensor:
        """(1, C, 1, Tq) and (1, C', 1, Tk) -> (1, C, 1, Tq)."""
        heads = zip(self.queries, self.keys, self.values, strict=True)
        outputs = [self.head(q(image), k(source), v(source)) for q, k, v in heads]
        return self.out(torch.cat(outputs, dim=-1).permute(0, 3, 1, 2))

    def head(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(1, d, 1, T) each -> (1, 1, Tq, d)."""
        query, key, value = query.permute(0, 2, 3, 1), key.permute(0, 2, 1, 3), value.permute(0, 2, 3, 1)
        return torch.softmax((query * self.scale) @ key, dim=-1) @ value


class Naive(Heads):
    """Images all the way: reshapes around the products, heads joined over channels."""

    def __init__(self, attn: Any, *, scale_scores: bool) -> None:
        super().__init__(attn)
        self.scale_scores = scale_scores

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """See `Heads.forward`."""
        source = x if context is None else as_image(context)
        outputs = []
        for to_q, to_k, to_v in zip(self.queries, self.keys, self.values, strict=True):
            query, key, value = (one.flatten(2) for one in (to_q(x), to_k(source), to_v(source)))  # (1, d, T)
            query = query.transpose(1, 2)
            scores = (query @ key) * self.scale if self.scale_scores else (query * self.scale) @ key
            product = torch.softmax(scores, dim=-1) @ value.transpose(1, 2)
            outputs.append(product.transpose(1, 2).reshape(1, DIM, *x.shape[2:]))
        return self.out(torch.cat(outputs, dim=1))


class Tokens(nn.Module):
    """Tokens all the way: matrices instead of convolutions, heads joined last, a matrix behind them."""

    def __init__(self, attn: Any) -> None:
        super().__init__()
        projections = (attn.to_q, attn.to_k, attn.to_v)
        self.queries, self.keys, self.values = (nn.ModuleList(map(_linear, _rows(one))) for one in projections)
        self.out, self.scale = attn.to_out[0], attn.scale

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """See `Heads.forward`."""
        tokens = x.permute(0, 2, 3, 1).flatten(1, 2)
        source = tokens if context is None else context
        outputs = []
        for to_q, to_k, to_v in zip(self.queries, self.keys, self.values, strict=True):
            scores = (to_q(tokens) * self.scale) @ to_k(source).transpose(1, 2)
            outputs.append(torch.softmax(scores, dim=-1) @ to_v(source))
        return _as_image(self.out(torch.cat(outputs, dim=-1)), x)


class Summed(Heads):
    """Each head projected by its own columns of `to_out`, and the results added: no concat."""

    def __init__(self, attn: Any) -> None:
        super().__init__(attn)
        weight, bias = attn.to_out[0].weight.detach(), attn.to_out[0].bias
        parts = enumerate(weight.split(DIM, dim=1))
        convs = [PointwiseConv2d.from_rows(part, bias if head == 0 else None) for head, part in parts]
        self.outs = nn.ModuleList(convs)
        del self.out

    def attend(self, image: Tensor, source: Tensor) -> Tensor:
        """See `Heads.attend`."""
        heads = zip(self.queries, self.keys, self.values, self.outs, strict=True)
        first, *others = [out(self.head(q(image), k(source), v(source)).permute(0, 3, 1, 2)) for q, k, v, out in heads]
        for other in others:
            first = first + other
        return first


class Chunked(Heads):
    """Queries in four parts, each with scores of its own; keys and values shared."""

    def head(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Heads.head`."""
        query, key, value = query.permute(0, 2, 3, 1), key.permute(0, 2, 1, 3), value.permute(0, 2, 3, 1)
        parts = (query * self.scale).chunk(4, dim=2)
        return torch.cat([torch.softmax(part @ key, dim=-1) @ value for part in parts], dim=2)


class Blocks(Heads):
    """Queries in blocks along the batch of the products, keys and values broadcast: chunks without a slice."""

    def __init__(self, attn: Any, *, block: int) -> None:
        super().__init__(attn)
        self.block = block

    def head(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """See `Heads.head`."""
        tokens = query.shape[-1]
        query = (query.permute(0, 2, 3, 1) * self.scale).reshape(1, tokens // self.block, self.block, DIM)
        key, value = key.permute(0, 2, 1, 3), value.permute(0, 2, 3, 1)
        return (torch.softmax(query @ key, dim=-1) @ value).reshape(1, 1, tokens, DIM)


class Batched(Heads):
    """Some heads in the batch of each product."""

    def __init__(self, attn: Any, *, heads: int) -> None:
        super().__init__(attn)
        projections = (attn.to_q, attn.to_k, attn.to_v)
        self.together = heads
        self.queries, self.keys, self.values = (head_convs(one, range(CHANNELS), heads * DIM) for one in projections)

    def head(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """(1, n * d, 1, T) each -> (1, 1, Tq, n * d)."""
        query, key, value = (self._split(one) for one in (query, key, value))
        products = torch.softmax((query * self.scale) @ key.transpose(-1, -2), dim=-1) @ value
        return products.permute(0, 2, 1, 3).flatten(2).unsqueeze(1)

    def _split(self, projected: Tensor) -> Tensor:
        """(1, n * d, 1, T) -> (1, n, T, d)."""
        tokens = projected.shape[-1]
        return projected.permute(0, 2, 3, 1).reshape(1, tokens, self.together, DIM).permute(0, 2, 1, 3)


class Sliced(Heads):
    """Queries, keys and values of all heads by one convolution each, then sliced."""

    def __init__(self, attn: Any) -> None:
        super().__init__(attn)
        projections = (attn.to_q, attn.to_k, attn.to_v)
        self.all = nn.ModuleList(PointwiseConv2d.from_rows(one.weight, one.bias) for one in projections)
        del self.queries, self.keys, self.values

    def attend(self, image: Tensor, source: Tensor) -> Tensor:
        """See `Heads.attend`."""
        inputs = (image, source, source)
        projected = (conv(one).chunk(HEADS, dim=1) for conv, one in zip(self.all, inputs, strict=True))
        outputs = [self.head(q, k, v) for q, k, v in zip(*projected, strict=True)]
        return self.out(torch.cat(outputs, dim=-1).permute(0, 3, 1, 2))


class Multi(nn.Module):
    """All heads at once, on tokens: diffusers' layer as the product writes it out for a traced graph."""

    def __init__(self, attn: Attention) -> None:
        super().__init__()
        self.attn = attn

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """See `Heads.forward`."""
        return _as_image(self.attn(x.permute(0, 2, 3, 1).flatten(1, 2), encoder_hidden_states=context), x)


def sha(attn: Any, *, fold_scale: bool = False) -> nn.Module:
    """The product's own form, after the rewrites beside it."""
    layer: Any = per_head(attn)
    linear = layer.to_out[0]
    layer.to_out[0] = PointwiseConv2d.from_rows(linear.weight, linear.bias)
    if fold_scale:
        layer.fold_scale()
    module: nn.Module = layer
    return module


@dataclass(frozen=True)
class Form:
    """How to make a form of the layer, and what it is."""

    what: str
    build: Callable[[Any], nn.Module]
    float_scale: bool = False
    """Leave the scale a float, as AIMET's exporter writes it."""


FORMS: dict[str, Form] = {
    "naive": Form("images and reshapes, scores scaled", lambda attn: Naive(attn, scale_scores=True), float_scale=True),
    "naive_integers": Form("the same, on integers", lambda attn: Naive(attn, scale_scores=True)),
    "naive_queries": Form("images and reshapes, queries scaled", lambda attn: Naive(attn, scale_scores=False)),
    "sha": Form("the product's", sha),
    "sha_float": Form("the product's, queries scaled in floats", sha, float_scale=True),
    "sha_folded": Form("the product's, with fold_scale", lambda attn: sha(attn, fold_scale=True)),
    "tokens": Form("tokens, matrices, concat last", Tokens),
    "summed": Form("to_out per head, added", Summed),
    "sliced": Form("one convolution to q, k, v each, sliced", Sliced),
    "chunked": Form("queries in 4 chunks", Chunked),
    "blocks": Form("queries in blocks of 64, as a batch", lambda attn: Blocks(attn, block=64)),
    "pairs": Form("two heads in a batch", lambda attn: Batched(attn, heads=2)),
    "mha": Form("all heads in a batch (MHA)", Multi),
}


class Block(nn.Module):
    """A norm, and attention behind it, as in a transformer's block."""

    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        self.norm, self.attention = ChannelLayerNorm(CHANNELS), attention
        for parameter in self.norm.parameters():
            parameter.data += 0.2 * torch.randn(parameter.shape, generator=generator)

    def forward(self, x: Tensor, context: Tensor | None = None) -> Tensor:
        """See `Heads.forward`."""
        attended: Tensor = self.attention(self.norm(x), context)
        return attended


class Layer(ModelAdapter):
    """A block as a graph: an image `x`, for attention to a text its tokens as `context`, and an image `y`."""

    graph_name = "attention"
    positional = ("x",)

    def pack(self, call: Mapping[str, Any]) -> Tensors:
        """See `ModelAdapter.pack`."""
        return dict(call)

    def unpack(self, outputs: Tensors) -> Tensor:
        """See `ModelAdapter.unpack`."""
        return outputs["y"]

    def graph_forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See `ModelAdapter.graph_forward`."""
        return (self.model(*inputs),)

    def output_names(self, count: int) -> tuple[str, ...]:
        """See `ModelAdapter.output_names`."""
        return ("y",)

    def io_spec(self, size: GraphSize | None = None) -> IOSpec:
        """It has no config to tell its inputs from."""
        raise NotImplementedError

    def block_paths(self) -> Sequence[str]:
        """See `ModelAdapter.block_paths`."""
        return ("",)


@dataclass(frozen=True)
class Case:
    """One graph: a form of a layer at a size, and two inputs."""

    form: str
    cross: bool
    tokens: int

    def adapter(self) -> Layer:
        """The same weights for every form."""
        torch.manual_seed(0)
        attn = Attention(CHANNELS, TEXT_CHANNELS if self.cross else None, heads=HEADS, dim_head=DIM)
        return Layer(Block(FORMS[self.form].build(attn)).eval())

    def samples(self) -> list[Tensors]:
        """The same inputs for every form."""
        generator = torch.Generator().manual_seed(1)
        side = int(self.tokens**0.5)
        text = {"context": (1, TEXT_TOKENS, TEXT_CHANNELS)} if self.cross else {}
        shapes = {"x": (1, CHANNELS, side, side), **text}
        return [{name: torch.randn(shape, generator=generator) for name, shape in shapes.items()} for _ in range(2)]


@dataclass(frozen=True)
class Figures:
    """What compiling a case took, and what came out."""

    cpu_s: float
    peak_bytes: int
    context_bytes: int
    """Beyond the weights at 8 bits."""
    nodes: dict[str, int]
    simulator_vs_fp32_db: float | None = None
    simulator_vs_quantized_db: float | None = None


@torch.no_grad()
def measure(case: Case, soc_name: str, folder: Path, *, simulate: bool) -> Figures:
    """Quantize, export and compile a case, and run it in the simulator if asked."""
    soc, adapter, samples = find_soc(soc_name), case.adapter(), case.samples()
    simulation = Simulation(adapter, samples[0], load_settings({soc.arch}))
    simulation.calibrate(samples)
    model = to_onnx(simulation, samples[0], opset=21)
    make_room_for_biases(model)
    if not FORMS[case.form].float_scale:
        quantize_factors(model)
    take_keys_as_rows(model)
    path = folder / f"{case.form}.onnx"
    onnx.save(model, str(path))
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    context = compile_context(path, folder, soc)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    weights = sum(one.numel() for one in adapter.model.parameters() if one.dim() > 1)
    figures = Figures(
        cpu_s=after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime,
        peak_bytes=context.peak_rss_bytes,
        context_bytes=context.bin.stat().st_size - weights,
        nodes=read_nodes(context.bin),
    )
    if not simulate:
        return figures
    answer = Simulator(context.ctx_onnx)(samples[0])
    references = (adapter.run(samples[0]), simulation(samples[0]))
    return Figures(
        figures.cpu_s,
        figures.peak_bytes,
        figures.context_bytes,
        figures.nodes,
        *(worst_sqnr_db(reference, answer) for reference in references),
    )


def line(form: str, figures: Figures) -> str:
    """A row of the table."""
    decibels = (figures.simulator_vs_fp32_db, figures.simulator_vs_quantized_db)
    shown = "".join(f"{'-' if one is None else f'{one:.1f}':>8}" for one in decibels)
    nodes = ", ".join(f"{count} {name}" for name, count in figures.nodes.items())
    sizes = f"{figures.cpu_s:8.1f}{figures.peak_bytes / MIB:8.0f}{figures.context_bytes / KIB:8.0f}"
    return f"{form:16}{sizes}{shown}{sum(figures.nodes.values()):7d}  {nodes}"


def main() -> None:
    """Print a table per size, layer and SoC."""
    parser = argparse.ArgumentParser(description="Compare forms of attention by what the HTP compiler makes of them.")
    parser.add_argument("--tokens", type=int, nargs="+", default=[1024], choices=(256, 1024, 4096))
    parser.add_argument("--soc", nargs="+", default=["SM8650"])
    parser.add_argument("--layers", nargs="+", default=["self"], choices=("self", "cross"))
    parser.add_argument("--forms", nargs="+", default=list(FORMS), choices=FORMS)
    parser.add_argument("--simulate", action="store_true", help="run each context in the HTP simulator")
    given = parser.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, Python {platform.python_version()}, ", end="")
    print(f"onnxruntime-qnn {version('onnxruntime-qnn')}, load {os.getloadavg()[0]:.1f}")
    for form in given.forms:
        print(f"  {form:16}{FORMS[form].what}")
    for tokens, layer, soc in ((t, one, s) for t in given.tokens for one in given.layers for s in given.soc):
        print(f"\n{tokens} tokens, {layer}-attention, {soc}")
        print(f"{'form':16}   CPU s     MiB     KIB vs fp32  vs sim  nodes".replace("KIB", "KiB"), flush=True)
        for form in given.forms:
            with tempfile.TemporaryDirectory() as folder:
                figures = measure(Case(form, layer == "cross", tokens), soc, Path(folder), simulate=given.simulate)
            print(line(form, figures), flush=True)


def _rows(linear: nn.Linear) -> Sequence[Tensor]:
    """The matrix of each head."""
    return linear.weight.detach().split(DIM)


def _linear(weight: Tensor) -> nn.Linear:
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight = nn.Parameter(weight)
    return linear


def _as_image(tokens: Tensor, like: Tensor) -> Tensor:
    """(1, H*W, C) -> (1, C, H, W)."""
    return tokens.reshape(1, like.shape[2], like.shape[3], -1).permute(0, 3, 1, 2)


if __name__ == "__main__":
    main()
