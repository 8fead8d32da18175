"""What each model family is, one file per family, named as diffusers or transformers names the original's file."""

from torch import nn

from sdconvert.adapters import (
    autoencoder_kl,
    controlnet,
    modeling_clip,
    pixart_transformer_2d,
    unet_2d_condition,
)
from sdconvert.adapters.base import AdapterRegistry, ModelAdapter
from sdconvert.adapters.capabilities import AdapterCapabilities, require_capabilities
from sdconvert.adapters.layers import LayerRegistry, LayerRewrite
from sdconvert.adapters.spec import AttentionLayer, BlockRef, GraphSize, IOSpec, Tensors, TensorSpec, specs

__all__ = [
    "AdapterCapabilities",
    "AdapterRegistry",
    "AttentionLayer",
    "BlockRef",
    "GraphSize",
    "IOSpec",
    "LayerRegistry",
    "LayerRewrite",
    "ModelAdapter",
    "TensorSpec",
    "Tensors",
    "adapter_for",
    "require_capabilities",
    "specs",
]

# Importing a family registers it; naming the modules keeps the imports from looking unused.
FAMILIES = (autoencoder_kl, controlnet, modeling_clip, pixart_transformer_2d, unet_2d_condition)


def adapter_for(model: nn.Module) -> ModelAdapter:
    """The adapter of a model.

    Raises:
        UnsupportedModelError: No family covers its class.
    """
    return AdapterRegistry.lookup(type(model))(model)
