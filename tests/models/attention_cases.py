"""Every option of diffusers' attention as a small layer in fp64 and a call of it, with diffusers' own answer."""

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers.models import attention_processor as of_diffusers
from diffusers.models.attention_processor import Attention
from torch import Tensor, nn

WIDTH, CONTEXT, TOKENS = 16, 12, 7
LIMIT = 1e-10
Make = Callable[[], Any]


@dataclass(frozen=True)
class AttentionCase:
    """A layer of diffusers, and how it is called.

    Attributes:
        options: Of the layer, beside query_dim 16, heads 4, dim_head 4.
        processor: Makes its processor; None: the layer chooses.
        image: Whether it takes (b, c, h, w).
        context: Channels of what it looks at; None: itself.
        mask: Queries that the mask tells apart: 1, all (0), or None for no mask.
        temb: Channels of `temb`, if it takes one.
        change: What is done to the layer after it is built.
    """

    options: Mapping[str, Any] = field(default_factory=dict)
    processor: Make | None = None
    image: bool = False
    context: int | None = None
    mask: int | None = None
    temb: int | None = None
    change: Callable[[Attention], None] = lambda attn: None

    def layer(self) -> Attention:
        """Build the layer; its norms are no identities."""
        torch.manual_seed(0)
        attn = Attention(**({"query_dim": WIDTH, "heads": 4, "dim_head": 4} | dict(self.options)))
        if self.processor:
            attn.set_processor(self.processor())
        self.change(attn)
        attn = attn.double().eval()
        for parameter in attn.parameters():
            parameter.data = parameter.data + 0.3 * torch.randn_like(parameter)
        return attn

    def call(self, batch: int = 2) -> dict[str, Tensor]:
        """Random arguments."""
        torch.manual_seed(1)
        shape = (batch, self.options.get("query_dim", WIDTH), 3, 2) if self.image else (batch, 6, WIDTH)
        call = {"hidden_states": torch.randn(shape, dtype=torch.float64)}
        if self.context:
            call["encoder_hidden_states"] = torch.randn(batch, TOKENS, self.context, dtype=torch.float64)
        if self.mask is not None:
            looked_at = TOKENS if self.context else 6
            call["attention_mask"] = 3 * torch.randn(batch, self.mask or 6, looked_at, dtype=torch.float64)
        if self.temb:
            call["temb"] = torch.randn(batch, self.temb, 2, 2, dtype=torch.float64)
        return call


def relative_error(found: Tensor, reference: Tensor) -> float:
    """max |x - reference| / max |reference|."""
    assert found.shape == reference.shape
    assert found.dtype == reference.dtype
    return float((found - reference).detach().abs().max() / reference.detach().abs().max())


def fuse(attn: Attention) -> None:
    """Fuse as UNet2DConditionModel.fuse_qkv_projections does, and drop the originals, of which it keeps a copy."""
    attn.fuse_projections()
    attn.set_processor(of_diffusers.FusedAttnProcessor2_0())
    for name in ("to_k", "to_v") if attn.is_cross_attention else ("to_q", "to_k", "to_v"):
        delattr(attn, name)


def biases(**by_projection: bool) -> Callable[[Attention], None]:
    """Give each projection a bias or none."""

    def change(attn: Attention) -> None:
        for name, bias in by_projection.items():
            linear = getattr(attn, name)
            setattr(attn, name, nn.Linear(linear.in_features, linear.out_features, bias=bias))

    return change


def _without_output(attn: Attention) -> None:
    attn.to_out = nn.ModuleList([nn.Identity(), nn.Identity()])


VERSIONS: dict[str, Make] = {"": of_diffusers.AttnProcessor, "2_0 ": of_diffusers.AttnProcessor2_0}
CROSS: dict[str, Any] = {"cross_attention_dim": CONTEXT}
# Without upcast_softmax and upcast_attention, by which diffusers means float32, a step down from fp64.
VAE: dict[str, Any] = {
    "heads": 1,
    "dim_head": WIDTH,
    "bias": True,
    "norm_num_groups": 4,
    "residual_connection": True,
    "rescale_output_factor": 1.5,
    "eps": 1e-6,
}
ADDED: dict[str, Any] = {"added_kv_proj_dim": CONTEXT, "norm_num_groups": 4, "bias": True}
ADDED_CALL: dict[str, Any] = {"image": True, "context": CONTEXT}

OF_BOTH_VERSIONS: dict[str, AttentionCase] = {
    "self": AttentionCase(),
    "cross": AttentionCase(CROSS, context=CONTEXT),
    "pixel": AttentionCase({"cross_attention_dim": 40}, context=40),
    "one head": AttentionCase({"heads": 1, "dim_head": WIDTH}),
    "bias": AttentionCase(CROSS | {"bias": True}, context=CONTEXT),
    "bias of q only": AttentionCase(CROSS, context=CONTEXT, change=biases(to_q=True)),
    "bias of v only": AttentionCase(CROSS, context=CONTEXT, change=biases(to_v=True)),
    "no bias of to_out": AttentionCase({"out_bias": False}),
    "output of other width": AttentionCase({"out_dim": 8}),
    "no output projection": AttentionCase(change=_without_output),
    "residual": AttentionCase({"residual_connection": True}),
    "rescale": AttentionCase({"rescale_output_factor": 2.5, "residual_connection": True}),
    "group_norm of tokens": AttentionCase({"norm_num_groups": 4}),
    "image": AttentionCase(image=True),
    "image and text": AttentionCase(CROSS, image=True, context=CONTEXT),
    "VAE": AttentionCase(VAE, image=True),
    "spatial_norm": AttentionCase(VAE | {"query_dim": 32, "spatial_norm_dim": 8}, image=True, temb=8),
    "temb without effect": AttentionCase(VAE, image=True, temb=8),
    "cross_attention_norm layer": AttentionCase(CROSS | {"cross_attention_norm": "layer_norm"}, context=CONTEXT),
    "cross_attention_norm group": AttentionCase(
        CROSS | {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 3}, context=CONTEXT
    ),
    "unscaled": AttentionCase({"scale_qk": False}),
    "mask": AttentionCase(CROSS, context=CONTEXT, mask=1),
    "mask of each query": AttentionCase(CROSS, context=CONTEXT, mask=0),
    "mask of itself": AttentionCase(mask=1),
}
OF_ONE: dict[str, AttentionCase] = {
    **{
        f"qk_norm {norm}": AttentionCase(CROSS | {"qk_norm": norm, **more}, context=CONTEXT)
        for norm, more in (("layer_norm", {}), ("fp32_layer_norm", {}), ("rms_norm", {}), ("l2", {}))
    },
    "qk_norm without weights": AttentionCase({"qk_norm": "layer_norm", "elementwise_affine": False}),
    **{
        f"{heads} heads for keys": AttentionCase(
            CROSS | {"kv_heads": heads, "qk_norm": norm}, of_diffusers.StableAudioAttnProcessor2_0, context=CONTEXT
        )
        for heads, norm in ((1, None), (2, "layer_norm"), (4, None))
    },
    "sliced": AttentionCase(CROSS, lambda: of_diffusers.SlicedAttnProcessor(2), context=CONTEXT, mask=1),
    "fused self": AttentionCase({"bias": True}, change=fuse),
    "fused cross": AttentionCase(CROSS, context=CONTEXT, change=fuse, mask=1),
    "fused and normalized": AttentionCase(VAE | {"qk_norm": "layer_norm"}, image=True, change=fuse),
    **{
        f"added KV {version.__name__}{name}": AttentionCase(ADDED | more, version, **(ADDED_CALL | call))
        for version in (of_diffusers.AttnAddedKVProcessor, of_diffusers.AttnAddedKVProcessor2_0)
        for name, more, call in (
            ("", {}, {}),
            (" masked", {}, {"mask": 1}),
            (" normalized", {"cross_attention_norm": "group_norm", "cross_attention_norm_num_groups": 3}, {}),
            (" text only", {"only_cross_attention": True}, {}),
            (" without text", {"added_kv_proj_dim": WIDTH}, {"context": None}),
            (" without bias", {"bias": False, "added_proj_bias": False}, {}),
        )
    },
    "added KV sliced": AttentionCase(ADDED, lambda: of_diffusers.SlicedAttnAddedKVProcessor(3), **ADDED_CALL),
}
CASES: dict[str, AttentionCase] = OF_ONE | {
    f"{name} {version}".strip(): AttentionCase(**(vars(case) | {"processor": make}))
    for name, case in OF_BOTH_VERSIONS.items()
    for version, make in VERSIONS.items()
}


def in_model(attn: Attention) -> nn.Module:
    """A model whose only layer is a copy of this one: `attn`."""
    return nn.ModuleDict({"attn": copy.deepcopy(attn)})
