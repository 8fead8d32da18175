"""CLIPTextModel: the text encoder of Stable Diffusion; token ids in, one vector per token out."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor
from transformers.models.clip.modeling_clip import CLIPTextModel

from sdconvert.adapters.base import AdapterRegistry, ModelAdapter, require_known_arguments
from sdconvert.adapters.capabilities import AdapterCapabilities
from sdconvert.adapters.spec import GraphSize, IOSpec, Tensors, TensorSpec, numbered
from sdconvert.errors import UsageError


@AdapterRegistry.register(CLIPTextModel)
class CLIPTextModelAdapter(ModelAdapter):
    """Graph: input_ids (int32) → last_hidden_state.

    The pooled output, which no pipeline of Stable Diffusion takes from this class, stays outside.
    """

    graph_name = "text_encoder"
    positional = ("input_ids",)
    capabilities: ClassVar = AdapterCapabilities(cfg_split=True, block_parallel=True)

    def pack(self, call: Mapping[str, Any]) -> Tensors:
        """See `ModelAdapter.pack`.

        Raises:
            UsageError: The call has other arguments; a mask of the padding would change the constant causal mask.
        """
        require_known_arguments(call, {"input_ids"})
        return {"input_ids": call["input_ids"].to(torch.int32)}

    def unpack(self, outputs: Tensors) -> tuple[Tensor]:
        """See `ModelAdapter.unpack`."""
        return (outputs["last_hidden_state"],)

    def graph_forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See `ModelAdapter.graph_forward`."""
        (input_ids,) = inputs
        return (self.model(input_ids=input_ids)[0],)

    def output_names(self, count: int) -> tuple[str, ...]:
        """See `ModelAdapter.output_names`."""
        return ("last_hidden_state",)

    def io_spec(self, size: GraphSize | None = None) -> IOSpec:
        """See `ModelAdapter.io_spec`.

        Raises:
            UsageError: More tokens are asked for than the model has positions.
        """
        model: Any = self.model
        config = model.config
        tokens = (size or GraphSize()).tokens
        if tokens > config.max_position_embeddings:
            raise UsageError(
                f"{tokens} tokens asked of a text encoder with {config.max_position_embeddings} positions",
                hint="lower GraphSize.tokens",
            )
        ids = TensorSpec("input_ids", (1, tokens), "int32", (0.0, float(config.vocab_size - 1)))
        return IOSpec((ids,), (TensorSpec("last_hidden_state", (1, tokens, config.hidden_size)),))

    def block_paths(self) -> list[str]:
        """See `ModelAdapter.block_paths`."""
        prefix = self._prefix()
        layers = numbered(f"{prefix}encoder.layers", self.model)
        return [f"{prefix}embeddings", *layers, f"{prefix}final_layer_norm"]

    def _prefix(self) -> str:
        """Transformers before 5 kept everything below `text_model`."""
        return "text_model." if hasattr(self.model, "text_model") else ""
