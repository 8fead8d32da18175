"""AutoencoderKL: its encoder, which runs once per tile at the start, and its decoder, once per tile at the end."""

from collections.abc import Mapping
from typing import Any, ClassVar

from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL
from torch import Tensor

from sdconvert.adapters.base import (
    AdapterRegistry,
    ModelAdapter,
    require_known_arguments,
    sample_size,
    sample_spec,
)
from sdconvert.adapters.capabilities import AdapterCapabilities
from sdconvert.adapters.spec import GraphSize, IOSpec, Tensors, TensorSpec, numbered
from sdconvert.errors import UsageError
from sdconvert.models.autoencoder_kl import AutoencoderKLEncoder


class _HalfAdapter(ModelAdapter):
    """A graph of one tensor in and one out."""

    output: ClassVar[str]
    capabilities: ClassVar = AdapterCapabilities(quantize=True, mha2sha=True, adaround=True, block_parallel=True)

    def pack(self, call: Mapping[str, Any]) -> Tensors:
        """See `ModelAdapter.pack`."""
        require_known_arguments(call, set(self.positional))
        return {name: call[name] for name in self.positional}

    def unpack(self, outputs: Tensors) -> Tensor:
        """See `ModelAdapter.unpack`."""
        return outputs[self.output]

    def output_names(self, count: int) -> tuple[str, ...]:
        """See `ModelAdapter.output_names`."""
        return (self.output,)


@AdapterRegistry.register(AutoencoderKL)
class AutoencoderKLAdapter(_HalfAdapter):
    """Graph of the decoder: latent_sample, already divided by the scaling factor → sample in [-1, 1]."""

    graph_name = "vae_decoder"
    positional = ("latent_sample",)
    output = "sample"

    def graph_forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See `ModelAdapter.graph_forward`."""
        (latent_sample,) = inputs
        vae: Any = self.model
        output: tuple[Tensor, ...] = vae.decode(latent_sample, return_dict=False)
        return output

    def io_spec(self, size: GraphSize | None = None) -> IOSpec:
        """See `ModelAdapter.io_spec`; height and width are those of the latent, `sample_size` is the picture's."""
        size = size or GraphSize()
        model: Any = self.model
        config = model.config
        factor = 2 ** (len(config.block_out_channels) - 1)
        if not (size.height and size.width):
            picture = sample_size(config, GraphSize())
            size = GraphSize(size.height or picture[0] // factor, size.width or picture[1] // factor)
        area = sample_size(config, size)
        shape = (1, config.out_channels, area[0] * factor, area[1] * factor)
        latent = sample_spec("latent_sample", config.latent_channels, area)
        return IOSpec((latent,), (TensorSpec("sample", shape, range=(-1.0, 1.0)),))

    def block_paths(self) -> list[str]:
        """See `ModelAdapter.block_paths`."""
        model: Any = self.model
        first = ["post_quant_conv"] if model.post_quant_conv is not None else []
        middle = ["decoder.conv_in", "decoder.mid_block", *numbered("decoder.up_blocks", model)]
        return [*first, *middle, "decoder.conv_norm_out", "decoder.conv_out"]

    def in_graph(self, path: str) -> bool:
        """See `ModelAdapter.in_graph`: the encoder is no part of the graph."""
        return path.startswith(("decoder.", "post_quant_conv"))


@AdapterRegistry.register(AutoencoderKLEncoder)
class AutoencoderKLEncoderAdapter(_HalfAdapter):
    """Graph of the encoder: sample in [-1, 1] → moments, mean and logarithmic variance of the latents, side by side."""

    graph_name = "vae_encoder"
    positional = ("sample",)
    output = "moments"

    def graph_forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See `ModelAdapter.graph_forward`."""
        (sample,) = inputs
        encoder: Any = self.model
        return (encoder.moments(sample),)

    def io_spec(self, size: GraphSize | None = None) -> IOSpec:
        """See `ModelAdapter.io_spec`; height and width are those of the picture.

        Raises:
            UsageError: The latents of such a picture would not be whole.
        """
        model: Any = self.model
        config = model.config
        height, width = sample_size(config, size or GraphSize())
        factor = 2 ** (len(config.block_out_channels) - 1)
        if height % factor or width % factor:
            raise UsageError(
                f"a picture of {height}x{width} pixels has no whole latents", hint=f"give multiples of {factor}"
            )
        latents = (1, 2 * config.latent_channels, height // factor, width // factor)
        sample = TensorSpec("sample", (1, config.in_channels, height, width), range=(-1.0, 1.0))
        return IOSpec((sample,), (TensorSpec("moments", latents),))

    def block_paths(self) -> list[str]:
        """See `ModelAdapter.block_paths`."""
        model: Any = self.model
        last = ["quant_conv"] if model.quant_conv is not None else []
        blocks = ["encoder.conv_in", *numbered("encoder.down_blocks", model), "encoder.mid_block"]
        return [*blocks, "encoder.conv_norm_out", "encoder.conv_out", *last]
