"""PixArtTransformer2DModel: the diffusion transformer of PixArt-α and PixArt-Σ."""

from collections.abc import Iterator, Mapping
from contextlib import ExitStack
from typing import Any, ClassVar

import torch
from diffusers.models.transformers.pixart_transformer_2d import PixArtTransformer2DModel
from torch import Tensor

from sdconvert.adapters.base import (
    AdapterRegistry,
    ModelAdapter,
    require_known_arguments,
    sample_size,
    sample_spec,
)
from sdconvert.adapters.capabilities import AdapterCapabilities
from sdconvert.adapters.layers import HIDDEN
from sdconvert.adapters.spec import GraphSize, IOSpec, Tensors, TensorSpec, numbered
from sdconvert.adapters.time_projection import ProjectedInput
from sdconvert.errors import UsageError
from sdconvert.plugins import PatchPluginBlock

_ARGUMENTS = {"hidden_states", "encoder_hidden_states", "timestep", "added_cond_kwargs", "encoder_attention_mask"}
_SIZES = ("resolution", "aspect_ratio")


@AdapterRegistry.register(PixArtTransformer2DModel)
class PixArtTransformer2DModelAdapter(ModelAdapter):
    """Graph → sample, noise and (with 8 channels) its variance.

    Inputs: hidden_states, encoder_hidden_states, t_emb, encoder_attention_mask, and for models of 1024x1024 pictures
    resolution and aspect_ratio. The mask is a bias (1, 1, tokens): 0 keeps a token, -100 hides it as well as
    diffusers' -10000, beside which no grid could hold scores. `t_emb`, `resolution` and `aspect_ratio` are sinusoids.
    """

    graph_name = "transformer"
    positional = ("hidden_states",)
    capabilities: ClassVar = AdapterCapabilities(
        quantize=True, mha2sha=True, adaround=True, cfg_split=True, block_parallel=True
    )
    input_ranges: ClassVar = {"encoder_attention_mask": (HIDDEN, 0.0)}

    def pack(self, call: Mapping[str, Any]) -> Tensors:
        """See `ModelAdapter.pack`; a call without a mask keeps every token.

        Raises:
            UsageError: The call has other arguments, or lacks the sizes that the model takes.
        """
        require_known_arguments(call, _ARGUMENTS)
        model: Any = self.model
        text = call["encoder_hidden_states"]
        embeddings = model.adaln_single.emb
        inputs = {
            "hidden_states": call["hidden_states"],
            "encoder_hidden_states": text,
            "t_emb": embeddings.time_proj(torch.as_tensor(call["timestep"]).reshape(-1)[:1]).float(),
            "encoder_attention_mask": _bias(call.get("encoder_attention_mask"), text),
        }
        given = {name: one for name, one in (call.get("added_cond_kwargs") or {}).items() if one is not None}
        wanted = _SIZES if model.use_additional_conditions else ()
        if sorted(given) != sorted(wanted):
            raise UsageError(
                f"added_cond_kwargs holds {', '.join(sorted(given)) or 'nothing'}, and this PixArt takes "
                f"{' and '.join(wanted) or 'nothing'} there",
                hint="models of 1024x1024 pictures take both, others neither",
            )
        for name in wanted:
            sinusoids = embeddings.additional_condition_proj(given[name].flatten()).float()
            inputs[name] = sinusoids.reshape(1, -1)
        return inputs

    def unpack(self, outputs: Tensors) -> tuple[Tensor]:
        """See `ModelAdapter.unpack`."""
        return (outputs["sample"],)

    def graph_forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See `ModelAdapter.graph_forward`."""
        hidden_states, encoder_hidden_states, t_emb, mask, *sizes = inputs
        output: tuple[Tensor, ...] = self.model(
            hidden_states,
            encoder_hidden_states=encoder_hidden_states,
            timestep=t_emb,
            added_cond_kwargs=dict(zip(_SIZES, sizes or (None, None), strict=True)),
            encoder_attention_mask=mask,
            return_dict=False,
        )
        return output

    def output_names(self, count: int) -> tuple[str, ...]:
        """See `ModelAdapter.output_names`."""
        return ("sample",)

    def io_spec(self, size: GraphSize | None = None) -> IOSpec:
        """See `ModelAdapter.io_spec`."""
        size = size or GraphSize()
        model: Any = self.model
        config = model.config
        area = sample_size(config, size)
        channels = config.caption_channels or config.cross_attention_dim
        inputs = [
            sample_spec("hidden_states", config.in_channels, area),
            TensorSpec("encoder_hidden_states", (1, size.tokens, channels)),
            TensorSpec("t_emb", (1, model.adaln_single.emb.time_proj.num_channels), range=(-1.0, 1.0)),
            TensorSpec("encoder_attention_mask", (1, 1, size.tokens), range=(HIDDEN, 0.0)),
        ]
        if model.use_additional_conditions:
            width = model.adaln_single.emb.additional_condition_proj.num_channels
            inputs += [
                TensorSpec(name, (1, count * width), range=(-1.0, 1.0))
                for name, count in zip(_SIZES, (2, 1), strict=True)
            ]
        return IOSpec(tuple(inputs), (sample_spec("sample", model.out_channels, area),))

    def block_paths(self) -> list[str]:
        """See `ModelAdapter.block_paths`; `scale_shift_table` belongs to the model itself."""
        model: Any = self.model
        text = ["caption_projection"] if model.caption_projection is not None else []
        return ["pos_embed", "adaln_single", *text, *numbered("transformer_blocks", model), "proj_out"]

    def surgery(self) -> ExitStack:
        """See `ModelAdapter.surgery`."""
        stack = ExitStack()
        for path in self._projections():
            stack.callback(ProjectedInput(self.model, path).remove)
        stack.callback(_SqueezableOutput("squeezable", self.model.get_submodule("proj_out"), self.model).remove)
        return stack

    def _projections(self) -> Iterator[str]:
        model: Any = self.model
        yield "adaln_single.emb.time_proj"
        if model.use_additional_conditions:
            yield "adaln_single.emb.additional_condition_proj"


class _SqueezableOutput(PatchPluginBlock):
    """Gives the tokens (b, tokens, c) an axis of one, which the model's `squeeze(1)` then takes away.

    torch squeezes nothing where the axis is not one, and ONNX refuses a Squeeze like that.
    """

    def post_forward(self, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return output.unsqueeze(1)


def _bias(mask: Tensor | None, text: Tensor) -> Tensor:
    """A mask (1, tokens) of zeros and ones, or a bias (1, 1, tokens) such as diffusers', as a bias down to -100."""
    if mask is None:
        return torch.zeros(text.shape[0], 1, text.shape[1])
    if mask.ndim == 2:
        return ((1 - mask.float()) * HIDDEN).unsqueeze(1)
    return mask.float().clamp(min=HIDDEN)
