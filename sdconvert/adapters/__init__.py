"""What each model family is, one file per family, named as diffusers names the original's file."""

from torch import nn

from sdconvert.adapters import autoencoder_kl, controlnet, unet_2d_condition
from sdconvert.adapters.base import AdapterRegistry, AttentionLayer, ModelAdapter, Tensors, TensorSpec, specs

__all__ = ["AttentionLayer", "ModelAdapter", "TensorSpec", "Tensors", "adapter_for", "specs"]

# Importing a family registers it; naming the modules keeps the imports from looking unused.
FAMILIES = (autoencoder_kl, controlnet, unet_2d_condition)


def adapter_for(model: nn.Module) -> ModelAdapter:
    """The adapter of a model.

    Raises:
        UnsupportedModelError: No family covers its class.
    """
    return AdapterRegistry.lookup(type(model))(model)
