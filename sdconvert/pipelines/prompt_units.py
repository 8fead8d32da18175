"""Units that turn prompts into embeddings, one side of guidance at a time."""

import copy
import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sdconvert.errors import UsageError
from sdconvert.pipelines.base import Observer
from sdconvert.pipelines.loop import Side
from sdconvert.pipelines.unit import Inputs, PipelineUnit

if TYPE_CHECKING:
    from sdconvert.pipelines.pixart_alpha import PixArtAlphaPipeline
    from sdconvert.pipelines.stable_diffusion import StableDiffusionPipeline
    from sdconvert.pipelines.stable_diffusion_xl import StableDiffusionXLPipeline

_logger = logging.getLogger(__name__)


def guided_sides(
    posi: Inputs, nega: Inputs, guidance_scale: float, *, embeds: Sequence[str] = ("prompt_embeds",)
) -> tuple[Inputs, Inputs]:
    """The two sides of a request, checked: what nothing reads is refused, and without guidance there is no negative.

    Args:
        posi: Positive inputs by key, `prompt` and `embeds` among them; None: not given.
        nega: Negative inputs by key, `negative_prompt` and `embeds` among them.
        guidance_scale: Classifier-free guidance; 1: none.
        embeds: Keys that a side gives instead of prompts, all or none of them.

    Raises:
        UsageError: A guidance scale below 1, a negative input without guidance, a side with both prompt and
            embeddings, a part of the embeddings, or a positive side with neither.
    """
    if guidance_scale < 1.0:
        raise UsageError(f"guidance_scale={guidance_scale} is below 1", hint="1 is no guidance; more guides")
    posi, nega = ({key: value for key, value in side.items() if value is not None} for side in (posi, nega))
    if guidance_scale == 1.0 and nega:
        name = f"negative_{next(iter(nega)).removeprefix('negative_')}"
        raise UsageError(f"{name} has no effect without guidance", hint=f"give guidance_scale above 1, or no {name}")
    for side, prefix in ((posi, ""), (nega, "negative_")):
        given = [key for key in embeds if key in side]
        prompts = [key for key in side if key.startswith(f"{prefix}prompt") and key not in embeds]
        if given and prompts:
            raise UsageError(
                f"{prompts[0]} has no effect beside {prefix}{given[0]}", hint="give one of the two, not both"
            )
        if given and len(given) < len(embeds):
            absent = ", ".join(prefix + key for key in embeds if key not in given)
            raise UsageError(f"{prefix}{given[0]} comes without {absent}", hint="give all of them, or the prompt")
    if not posi.keys() & {"prompt", *embeds}:
        raise UsageError("no prompt is given", hint=f"give prompt, or {' and '.join(embeds)}")
    if guidance_scale != 1.0 and embeds[0] not in nega:
        nega.setdefault("negative_prompt", "")
    return posi, nega


def tokenize(tokenizer: Any, prompt: str, length: int) -> Any:
    """Token ids and attention mask, each (1, length); warns if the prompt is longer."""
    # Padding is a state of the tokenizer, and runs in lockstep share one: another's would come in between.
    tokenizer = copy.deepcopy(tokenizer)
    tokens = tokenizer(prompt, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
    used = len(tokenizer(prompt).input_ids)
    if used > length:
        _logger.warning("the prompt has %d tokens; the text encoder reads the first %d", used, length)
    return tokens


class PromptEmbedder(PipelineUnit):
    """Encodes the prompt of each side with the CLIP text encoder, unless its embeddings are given."""

    def __init__(self) -> None:
        super().__init__(
            separate_cfg=True,
            input_params=("observer",),
            input_params_posi={"prompt": "prompt", "prompt_embeds": "prompt_embeds"},
            input_params_nega={"prompt": "negative_prompt", "prompt_embeds": "prompt_embeds"},
            output_params=("prompt_embeds",),
            onload_model_names=("text_encoder",),
            trigger_params=("prompt", "negative_prompt"),
        )

    def process(
        self,
        pipe: "StableDiffusionPipeline",
        prompt: str | None = None,
        prompt_embeds: Tensor | None = None,
        observer: Observer | None = None,
        side: Side = "positive",
    ) -> Inputs:
        """Return `prompt_embeds` (1, tokens, channels): the last hidden state after the final norm."""
        if prompt is None:
            return {"prompt_embeds": prompt_embeds}
        pipe.load_models_to_device(self.onload_model_names)
        config = pipe.text_encoder.config
        tokens = tokenize(pipe.tokenizer, prompt, config.max_position_embeddings)
        masked = getattr(config, "use_attention_mask", False)
        mask = {"attention_mask": tokens.attention_mask.to(pipe.device)} if masked else {}
        input_ids = tokens.input_ids.to(pipe.device)
        if observer is not None:
            observer.record("text_encoder", {"input_ids": input_ids, **mask}, step=0, side=side, tile=0)
        return {"prompt_embeds": pipe.text_encoder(input_ids, **mask)[0].to(pipe.torch_dtype)}


class DualPromptEmbedder(PipelineUnit):
    """Encodes the prompts of each side with SDXL's two CLIP text encoders, unless their embeddings are given."""

    def __init__(self) -> None:
        keys = ("prompt_embeds", "text_embeds")
        super().__init__(
            separate_cfg=True,
            input_params_posi={key: key for key in ("prompt", "prompt_2", "zero_embeds", *keys)},
            input_params_nega={"prompt": "negative_prompt", "prompt_2": "negative_prompt_2"}
            | {key: key for key in ("zero_embeds", *keys)},
            output_params=keys,
            onload_model_names=("text_encoder", "text_encoder_2"),
            trigger_params=("prompt", "negative_prompt"),
        )

    def process(
        self,
        pipe: "StableDiffusionXLPipeline",
        prompt: str | None = None,
        prompt_2: str | None = None,
        prompt_embeds: Tensor | None = None,
        text_embeds: Tensor | None = None,
        zero_embeds: bool = False,
    ) -> Inputs:
        """Return `prompt_embeds` (1, tokens, channels of both) and `text_embeds` (1, projection).

        The first are the last hidden states but one, side by side, the second the pooled state of the second encoder.
        `zero_embeds` puts zeros in their place, which is what SDXL was trained on for "no prompt".
        """
        if prompt is None:
            return {"prompt_embeds": prompt_embeds, "text_embeds": text_embeds}
        pipe.load_models_to_device(self.onload_model_names)
        first = self._encode(pipe, pipe.text_encoder, pipe.tokenizer, prompt)
        second = self._encode(pipe, pipe.text_encoder_2, pipe.tokenizer_2, prompt_2 or prompt)
        embeds = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1).to(pipe.torch_dtype)
        pooled = second.text_embeds.to(pipe.torch_dtype)
        if zero_embeds:
            embeds, pooled = torch.zeros_like(embeds), torch.zeros_like(pooled)
        return {"prompt_embeds": embeds, "text_embeds": pooled}

    @staticmethod
    def _encode(pipe: "StableDiffusionXLPipeline", encoder: Any, tokenizer: Any, prompt: str) -> Any:
        tokens = tokenize(tokenizer, prompt, encoder.config.max_position_embeddings)
        return encoder(tokens.input_ids.to(pipe.device), output_hidden_states=True)


class T5PromptEmbedder(PipelineUnit):
    """Encodes the prompt of each side with the T5 encoder, unless embeddings and mask are given."""

    def __init__(self) -> None:
        keys = ("prompt_embeds", "prompt_attention_mask")
        super().__init__(
            separate_cfg=True,
            input_params=("max_sequence_length",),
            input_params_posi={key: key for key in ("prompt", *keys)},
            input_params_nega={"prompt": "negative_prompt"} | {key: key for key in keys},
            output_params=keys,
            onload_model_names=("text_encoder",),
            trigger_params=("prompt", "negative_prompt"),
        )

    def process(
        self,
        pipe: "PixArtAlphaPipeline",
        max_sequence_length: int,
        prompt: str | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_attention_mask: Tensor | None = None,
    ) -> Inputs:
        """Return `prompt_embeds` (1, tokens, channels) and `prompt_attention_mask` (1, tokens), 1 where there is text.

        The prompt is read in lower case without spaces around it, as PixArt was trained.
        """
        if prompt is None:
            return {"prompt_embeds": prompt_embeds, "prompt_attention_mask": prompt_attention_mask}
        pipe.load_models_to_device(self.onload_model_names)
        tokens = tokenize(pipe.tokenizer, prompt.lower().strip(), max_sequence_length)
        mask = tokens.attention_mask.to(pipe.device)
        embeds = pipe.text_encoder(tokens.input_ids.to(pipe.device), attention_mask=mask)[0]
        return {"prompt_embeds": embeds.to(pipe.torch_dtype), "prompt_attention_mask": mask}
