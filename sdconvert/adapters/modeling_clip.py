"""CLIP's text encoders: token ids in, one vector per token out, and one for the whole text if SDXL takes it."""

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput
from transformers.models.clip.modeling_clip import CLIPTextModel, CLIPTextModelOutput, CLIPTextModelWithProjection

from sdconvert.adapters.base import AdapterRegistry, ModelAdapter, require_known_arguments
from sdconvert.adapters.capabilities import AdapterCapabilities
from sdconvert.adapters.spec import GraphSize, IOSpec, Tensors, TensorSpec, numbered
from sdconvert.errors import UsageError

# transformers before 4.31 wrote this eos_token_id into all configs, and looked for the greatest id instead.
_UNKNOWN_EOS = 2


@AdapterRegistry.register(CLIPTextModel)
class CLIPTextModelAdapter(ModelAdapter):
    """Graph: input_ids (int32) → last_hidden_state, or what SDXL takes of its first encoder, prompt_embeds.

    The pooled output, which no pipeline of Stable Diffusion takes from this class, stays outside.

    Args:
        model: The text encoder.
        penultimate: Give the hidden state before the last layer, without the final norm, as `prompt_embeds`; the last
            layer is then no part of the graph. A call asks for it with `output_hidden_states=True`.
    """

    graph_name = "text_encoder"
    positional = ("input_ids",)
    capabilities: ClassVar = AdapterCapabilities(quantize=True, mha2sha=True, cfg_split=True, block_parallel=True)

    def __init__(self, model: nn.Module, *, penultimate: bool = False) -> None:
        super().__init__(model)
        self.penultimate = penultimate

    def pack(self, call: Mapping[str, Any]) -> Tensors:
        """See `ModelAdapter.pack`.

        Raises:
            UsageError: The call has other arguments, such as a mask of the padding, which would change the constant
                causal mask; or it asks for hidden states and the graph has none, or the other way round.
        """
        require_known_arguments(call, {"input_ids", "output_hidden_states"})
        if bool(call.get("output_hidden_states")) is not self.penultimate:
            raise UsageError(
                f"output_hidden_states={call.get('output_hidden_states')!r} asked of a graph whose output is "
                f"{self.output_names(1)[0]}",
                hint="SDXL alone takes them; its first encoder is CLIPTextModelAdapter(model, penultimate=True)",
            )
        return {"input_ids": call["input_ids"].to(torch.int32)}

    def unpack(self, outputs: Tensors) -> Any:
        """See `ModelAdapter.unpack`; of the hidden states, only the last but one is there."""
        if self.penultimate:
            return BaseModelOutput(hidden_states=_last_but_one(outputs))
        return (outputs["last_hidden_state"],)

    def graph_forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See `ModelAdapter.graph_forward`."""
        (input_ids,) = inputs
        answer = self.model(input_ids=input_ids, output_hidden_states=self.penultimate)
        return (answer.hidden_states[-2] if self.penultimate else answer[0],)

    def output_names(self, count: int) -> tuple[str, ...]:
        """See `ModelAdapter.output_names`."""
        return ("prompt_embeds",) if self.penultimate else ("last_hidden_state",)

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
        return IOSpec((ids,), (TensorSpec(self.output_names(1)[0], (1, tokens, config.hidden_size)),))

    def block_paths(self) -> list[str]:
        """See `ModelAdapter.block_paths`."""
        prefix = self._prefix()
        layers = list(numbered(f"{prefix}encoder.layers", self.model))
        last = [] if self.penultimate else [f"{prefix}final_layer_norm"]
        return [f"{prefix}embeddings", *(layers[:-1] if self.penultimate else layers), *last]

    def in_graph(self, path: str) -> bool:
        """See `ModelAdapter.in_graph`: the last layer gives nothing to its own input."""
        layers = list(numbered(f"{self._prefix()}encoder.layers", self.model))
        return not (self.penultimate and path.startswith(f"{layers[-1]}."))

    def _prefix(self) -> str:
        """Transformers before 5 kept everything below `text_model`."""
        return "text_model." if hasattr(self.model, "text_model") else ""


@AdapterRegistry.register(CLIPTextModelWithProjection)
class CLIPTextModelWithProjectionAdapter(CLIPTextModelAdapter):
    """Graph: input_ids, eos_position (both int32) → prompt_embeds, pooled_prompt_embeds: SDXL's second encoder.

    `eos_position` (1,) is where the end token stands, whose vector is projected. It is an input, though the HTP can
    look for it: which token it is depends on the config's age, padding repeats it, and the tokenizer knows the place.
    """

    graph_name = "text_encoder_2"

    def __init__(self, model: nn.Module) -> None:
        super().__init__(model, penultimate=True)

    def pack(self, call: Mapping[str, Any]) -> Tensors:
        """See `CLIPTextModelAdapter.pack`.

        Raises:
            UsageError: As there; or the text has no end.
        """
        inputs = super().pack(call)
        model: Any = self.model
        ids, eos = inputs["input_ids"], model.config.eos_token_id
        ends = ids == (ids.max() if eos == _UNKNOWN_EOS else eos)
        if not ends.any():
            raise UsageError(f"no token is the end of the text, {eos}", hint="have the tokenizer add it")
        return inputs | {"eos_position": ends.int().argmax(dim=-1).to(torch.int32)}

    def unpack(self, outputs: Tensors) -> CLIPTextModelOutput:
        """See `CLIPTextModelAdapter.unpack`."""
        return CLIPTextModelOutput(text_embeds=outputs["pooled_prompt_embeds"], hidden_states=_last_but_one(outputs))

    def graph_forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        """See `ModelAdapter.graph_forward`."""
        input_ids, eos_position = inputs
        model: Any = self.model
        answer = model.text_model(input_ids=input_ids, output_hidden_states=True)
        pooled = answer.last_hidden_state.index_select(1, eos_position).reshape(1, -1)
        return answer.hidden_states[-2], model.text_projection(pooled)

    def output_names(self, count: int) -> tuple[str, ...]:
        """See `ModelAdapter.output_names`."""
        return ("prompt_embeds", "pooled_prompt_embeds")

    def io_spec(self, size: GraphSize | None = None) -> IOSpec:
        """See `CLIPTextModelAdapter.io_spec`."""
        model: Any = self.model
        spec = super().io_spec(size)
        (ids,) = spec.inputs
        position = TensorSpec("eos_position", (1,), "int32", (0.0, float(ids.shape[1] - 1)))
        pooled = TensorSpec("pooled_prompt_embeds", (1, model.config.projection_dim))
        return IOSpec((ids, position), (*spec.outputs, pooled))

    def block_paths(self) -> list[str]:
        """See `ModelAdapter.block_paths`."""
        prefix = self._prefix()
        layers = numbered(f"{prefix}encoder.layers", self.model)
        return [f"{prefix}embeddings", *layers, f"{prefix}final_layer_norm", "text_projection"]

    def in_graph(self, path: str) -> bool:
        """See `ModelAdapter.in_graph`."""
        return True


def _last_but_one(outputs: Tensors) -> Any:
    """A tuple of hidden states in which the only one that a graph gives has its place from the end."""
    return outputs["prompt_embeds"], None
