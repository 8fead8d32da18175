"""`sdconvert adapters`: which model families there are, what each can do, and whether a model takes the road."""

from pathlib import Path
from typing import Annotated, Any

import typer

from sdconvert.cli.session import Session, Table

app = typer.Typer(help="Show model families, and check a model of one.")

_LOWEST_DB = 80.0

Tokens = Annotated[int, typer.Option(min=1, help="Tokens of the text.")]
Side = Annotated[int | None, typer.Option(min=1, help="Side of the square sample; default: the config's sample_size.")]
Onnx = Annotated[Path | None, typer.Option(metavar="FILE", help="Keep the ONNX file here.")]


@app.command("list")
def list_(ctx: typer.Context) -> None:
    """List families, attention processors and layers, those of other packages included."""
    from dataclasses import asdict

    from sdconvert.adapters import AdapterRegistry, LayerRegistry
    from sdconvert.models.attention_processors import AttentionProcessorRegistry, RefusedProcessor

    families: list[dict[str, Any]] = [
        {
            "model": origin.__name__,
            "adapter": adapter.__name__,
            "module": adapter.__module__,
            "graph": adapter.graph_name,
            "capabilities": asdict(adapter.capabilities),
        }
        for origin, adapter in AdapterRegistry.entries().items()
    ]
    processors = {
        origin.__name__: rewrite.reason if issubclass(rewrite, RefusedProcessor) else None
        for origin, rewrite in AttentionProcessorRegistry.entries().items()
    }
    layers = {origin.__name__: rewrite.__name__ for origin, rewrite in LayerRegistry.entries().items()}
    session: Session = ctx.obj
    capabilities = list(families[0]["capabilities"])
    rows = [
        (f["model"], f["graph"], *("yes" if f["capabilities"][one] else "no" for one in capabilities), f["module"])
        for f in families
    ]
    refused = [(name, f"refused: it {reason}" if reason else "split per head") for name, reason in processors.items()]
    session.show(
        {"families": families, "attention_processors": processors, "layers": layers},
        Table(("model", "graph", *capabilities, "module"), rows),
        Table(("attention processor", "mha2sha"), refused),
    )


@app.command()
def check(
    ctx: typer.Context,
    model: Annotated[Path, typer.Argument(help="A folder with config.json and weights of one model.")],
    tokens: Tokens = 77,
    side: Side = None,
    onnx: Onnx = None,
) -> None:
    """Check whether a model takes the road.

    Its static graph is written as fp32 ONNX, and ONNX Runtime is compared with torch on random inputs.
    """
    import tempfile

    from sdconvert.adapters import GraphSize, adapter_for
    from sdconvert.adapters.loading import load_model
    from sdconvert.errors import QualityGateError
    from sdconvert.export.float32 import float32_agreement_db, write_float32

    adapter = adapter_for(load_model(model))
    inputs = adapter.dummy_inputs(adapter.io_spec(GraphSize(side, side, tokens)))
    with tempfile.TemporaryDirectory() as folder:
        path = onnx or Path(folder) / "graph.onnx"
        write_float32(adapter, inputs, path)
        agreement = float32_agreement_db(adapter, inputs, path)
    layers = adapter.attention_layers()
    facts: dict[str, Any] = {
        "model": type(adapter.model).__name__,
        "graph": adapter.graph_name,
        "inputs": {name: list(tensor.shape) for name, tensor in inputs.items()},
        "blocks": [block.path for block in adapter.blocks()],
        "attention_layers": [vars(layer) for layer in layers],
        "onnx_vs_torch_db": agreement,
    }
    session: Session = ctx.obj
    rows = [("model", facts["model"]), ("graph", facts["graph"]), ("blocks", len(facts["blocks"]))]
    rows += [("attention layers", len(layers)), ("heads", sum(layer.heads for layer in layers))]
    rows += [("ONNX Runtime vs torch", f"{agreement:.1f} dB")]
    session.show(facts, Table(("what", "value"), rows), Table(("input", "shape"), list(facts["inputs"].items())))
    if not agreement >= _LOWEST_DB:
        raise QualityGateError(
            f"ONNX Runtime agrees with torch to {agreement:.1f} dB only (gate {_LOWEST_DB:.0f} dB)",
            hint="graph_forward of the adapter and the model's own call differ, or the exporter is wrong",
        )
