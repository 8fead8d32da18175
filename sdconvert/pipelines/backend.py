"""Swap a model of a pipeline by a static graph: simulated, in ONNX Runtime, or in the HTP simulator."""

from collections.abc import Callable, Mapping
from typing import Any

from sdconvert.adapters import ModelAdapter, Tensors, adapter_for
from sdconvert.adapters.controlnet import ControlNetModelAdapter
from sdconvert.models.autoencoder_kl import AutoencoderKLEncoder
from sdconvert.pipelines.pasd import PASDPipeline

GRAPHS = ("text_encoder", "vae_encoder", "controlnet", "unet", "vae_decoder")
"""Device graphs of a PASD, in the order in which a picture needs them."""

GraphRunner = Callable[[Tensors], Tensors]


class GraphBackend:
    """Takes a model's calls and has a graph answer them.

    Args:
        adapter: Translates between the call and the graph.
        runner: Named inputs in, named outputs out.
    """

    def __init__(self, adapter: ModelAdapter, runner: GraphRunner) -> None:
        self.adapter = adapter
        self.runner = runner

    @property
    def config(self) -> Any:
        """The model's, which a pipeline reads."""
        model: Any = self.adapter.model
        return model.config

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Answer as the model would with `return_dict=False`."""
        call = dict(zip(self.adapter.positional[: len(args)], args, strict=True)) | kwargs
        return self.adapter.unpack(self.runner(self.adapter.pack(call)))


def graph_adapters(pipe: PASDPipeline, conditioning_scale: float) -> dict[str, ModelAdapter]:
    """The adapters of a pipeline's device graphs, by graph name, in the order of `GRAPHS`."""
    adapters = (
        adapter_for(pipe.text_encoder),
        adapter_for(AutoencoderKLEncoder.of(pipe.vae)),
        ControlNetModelAdapter(pipe.controlnet, conditioning_scale),
        adapter_for(pipe.unet),
        adapter_for(pipe.vae),
    )
    return dict(zip(GRAPHS, adapters, strict=True))


def swap_backends(pipe: PASDPipeline, adapters: dict[str, ModelAdapter], runners: Mapping[str, GraphRunner]) -> None:
    """Have `runners` answer in place of the pipeline's models of the same names."""
    for name, runner in runners.items():
        setattr(pipe, name, GraphBackend(adapters[name], runner))
