"""diffusers' processors that compute more than plain attention: known by name, and refused with what is missing."""

from typing import Any, ClassVar

import diffusers.models.attention_processor as of_diffusers
from torch import nn

from sdconvert.errors import UnsupportedAttentionProcessorError
from sdconvert.models.attention_rewrite import BRING_TO_PLAIN_FORM, AttentionProcessorRegistry, AttentionRewrite


class RefusedProcessor(AttentionRewrite):
    """A processor that computes more than plain attention, known by name; the reason says what is missing."""

    reason: ClassVar[str]

    def reason_against_graph(self) -> str:
        """See `AttentionRewrite.reason_against_graph`."""
        return f"its processor {type(self.attn.processor).__name__} {self.reason}"

    def reason_against_heads(self) -> str:
        """See `AttentionRewrite.reason_against_heads`."""
        return self.reason_against_graph()

    def explicit_processor(self) -> Any:
        """Refuse.

        Raises:
            UnsupportedAttentionProcessorError: Always.
        """
        raise UnsupportedAttentionProcessorError(self.reason_against_graph(), hint=BRING_TO_PLAIN_FORM)

    def per_head(self) -> nn.Module:
        """Refuse, as `explicit_processor` does."""
        module: nn.Module = self.explicit_processor()
        return module


@AttentionProcessorRegistry.register(of_diffusers.JointAttnProcessor2_0)
@AttentionProcessorRegistry.register(of_diffusers.XFormersJointAttnProcessor)
@AttentionProcessorRegistry.register(of_diffusers.FusedJointAttnProcessor2_0)
class JointAttention(RefusedProcessor):
    """SD3: image and text tokens attend to both, and two tensors come out."""

    reason = (
        "attends over image and text jointly (SD3) and returns both: cutting add_{q,k,v}_proj and their encodings "
        "per head, the norms of q and k, to_add_out, and an adapter for SD3Transformer2DModel are missing"
    )


@AttentionProcessorRegistry.register(of_diffusers.IPAdapterAttnProcessor)
@AttentionProcessorRegistry.register(of_diffusers.IPAdapterAttnProcessor2_0)
@AttentionProcessorRegistry.register(of_diffusers.IPAdapterXFormersAttnProcessor)
@AttentionProcessorRegistry.register(of_diffusers.SD3IPAdapterJointAttnProcessor2_0)
class IPAdapterAttention(RefusedProcessor):
    """IP-Adapter: a second attention, to an image's embedding, is added."""

    reason = (
        "adds attention to an image embedding (IP-Adapter): graph inputs for it and a rewrite of to_{k,v}_ip are "
        "missing; unload_ip_adapter() leaves the plain model"
    )


@AttentionProcessorRegistry.register(of_diffusers.PAGIdentitySelfAttnProcessor2_0)
@AttentionProcessorRegistry.register(of_diffusers.PAGCFGIdentitySelfAttnProcessor2_0)
@AttentionProcessorRegistry.register(of_diffusers.PAGJointAttnProcessor2_0)
@AttentionProcessorRegistry.register(of_diffusers.PAGCFGJointAttnProcessor2_0)
class PerturbedAttention(RefusedProcessor):
    """PAG: part of the batch gets the identity instead of attention."""

    reason = (
        "perturbs attention in part of the batch (PAG), and a static graph has a batch of one: a second graph with "
        "identity attention is missing; load the pipeline without PAG"
    )


@AttentionProcessorRegistry.register(of_diffusers.CustomDiffusionAttnProcessor)
@AttentionProcessorRegistry.register(of_diffusers.CustomDiffusionAttnProcessor2_0)
@AttentionProcessorRegistry.register(of_diffusers.CustomDiffusionXFormersAttnProcessor)
class CustomDiffusionAttention(RefusedProcessor):
    """Custom Diffusion: the processor has projections of its own."""

    reason = "has projections of its own (to_{k,v}_custom_diffusion): write them into the layer's to_k and to_v first"


@AttentionProcessorRegistry.register(of_diffusers.LuminaAttnProcessor2_0)
@AttentionProcessorRegistry.register(of_diffusers.HunyuanAttnProcessor2_0)
@AttentionProcessorRegistry.register(of_diffusers.FusedHunyuanAttnProcessor2_0)
@AttentionProcessorRegistry.register(of_diffusers.AllegroAttnProcessor2_0)
@AttentionProcessorRegistry.register(of_diffusers.CogVideoXAttnProcessor2_0)
@AttentionProcessorRegistry.register(of_diffusers.FusedCogVideoXAttnProcessor2_0)
class RotaryAttention(RefusedProcessor):
    """Queries and keys are turned by an angle that depends on their place."""

    reason = "turns queries and keys by a rotary embedding: a rewrite of it, and a graph input for it, are missing"
