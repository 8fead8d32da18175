"""Models that the rewrites beside attention per head are shown, each with a call that has an effect on every layer."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from diffusers.models.controlnets.controlnet import ControlNetModel
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from static_graphs import SMALL, SMALL_UNET, Case, golden_case, small_case
from torch import Tensor, nn

from sdconvert.models.attention import SHAAttentionPatch

SDXL: dict[str, Any] = {
    "use_linear_projection": True,
    "transformer_layers_per_block": [2, 1],
    "attention_head_dim": [1, 4],
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 10 + 6 * 4,
}


@dataclass(frozen=True)
class RewriteCase:
    """A model and the arguments of one call."""

    model: Any
    call: dict[str, Any]

    @torch.no_grad()
    def run(self) -> list[Tensor]:
        """All tensors that the call returns."""
        answer = self.model(**self.call, return_dict=False)
        return [one for part in answer if part is not None for one in (part if isinstance(part, list) else [part])]

    def relative_error(self, reference: list[Tensor]) -> float:
        """max |x - reference| / max |reference| of the worst tensor."""
        pairs = zip(self.run(), reference, strict=True)
        return max(float((x - other).abs().max() / other.abs().max()) for x, other in pairs)

    def to(self, dtype: torch.dtype) -> "RewriteCase":
        """The same case in another precision; the model itself changes."""
        return RewriteCase(self.model.to(dtype), _to(self.call, dtype))

    def per_head(self) -> "RewriteCase":
        """The same case, its attention rewritten per head for good."""
        SHAAttentionPatch.wrap_model("sha", self.model).fuse()
        return self


def _to(value: Any, dtype: torch.dtype) -> Any:
    match value:
        case dict():
            return {name: _to(one, dtype) for name, one in value.items()}
        case list() | tuple():
            return [_to(one, dtype) for one in value]
        case Tensor() if value.is_floating_point():
            return value.to(dtype)
    return value


def made(cls: Callable[..., nn.Module], config: dict[str, Any], **extras: Any) -> RewriteCase:
    torch.manual_seed(0)
    model = cls(**config).eval()
    for parameter in model.parameters():
        # ControlNets begin with zeros behind which nothing shows, and norms with ones.
        if parameter.ndim == 1 or not parameter.any():
            parameter.data += 0.1 * torch.randn_like(parameter)
    inputs = {"sample": torch.randn(2, 4, 8, 4), "timestep": 601, "encoder_hidden_states": torch.randn(2, 5, 12)}
    return RewriteCase(model, inputs | extras)


def of(case: Case) -> RewriteCase:
    return RewriteCase(case.adapter.model, case.call)


CASES: dict[str, Callable[[], RewriteCase]] = {
    "sd15": lambda: made(UNet2DConditionModel, SMALL_UNET),
    "sdxl": lambda: made(
        UNet2DConditionModel,
        SMALL_UNET | SDXL,
        added_cond_kwargs={"text_embeds": torch.randn(2, 10), "time_ids": torch.rand(2, 6)},
    ),
    "controlnet": lambda: made(
        ControlNetModel,
        SMALL | {"conditioning_embedding_out_channels": [4, 4]},
        controlnet_cond=torch.rand(2, 3, 16, 8),
    ),
    "small_pasd": lambda: of(small_case()),
    "pasd": lambda: of(golden_case("unet", "pasd")),
    "pasd_controlnet": lambda: of(golden_case("controlnet", "pasd")),
    "pasd_light": lambda: of(golden_case("unet", "pasd_light")),
}
SMALL_CASES = ("sd15", "sdxl", "controlnet", "small_pasd")
