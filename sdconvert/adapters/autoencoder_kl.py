"""AutoencoderKL: its decoder, which runs once per tile at the end."""

from collections.abc import Mapping
from typing import Any

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from sdconvert.adapters.base import AdapterRegistry, AttentionLayer, ModelAdapter, Tensors


@AdapterRegistry.register(AutoencoderKL)
class AutoencoderKLAdapter(ModelAdapter):
    """Graph of the decoder: latent_sample, already divided by the scaling factor → sample in [-1, 1]."""

    graph_name = "vae_decoder"
    positional = ("latent_sample",)

    def pack(self, call: Mapping[str, Any]) -> Tensors:
        """See `ModelAdapter.pack`."""
        return {"latent_sample": call["latent_sample"]}

    def unpack(self, outputs: Tensors) -> Tensor:
        """See `ModelAdapter.unpack`."""
        return outputs["sample"]

    def graph_forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See `ModelAdapter.graph_forward`."""
        (latent_sample,) = inputs
        vae: Any = self.model
        output: tuple[Tensor, ...] = vae.decode(latent_sample, return_dict=False)
        return output

    def output_names(self, count: int) -> tuple[str, ...]:
        """See `ModelAdapter.output_names`."""
        return ("sample",)

    def attention_layers(self) -> list[AttentionLayer]:
        """The decoder's own; the encoder is no part of the graph."""
        return [layer for layer in super().attention_layers() if layer.path.startswith("decoder.")]
