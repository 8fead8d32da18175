"""The timestep's sine and cosine enter the graph as an input.

Sine of an angle up to 1000 rad is not representable with 16-bit angles: outside, in fp32, it costs nothing.
"""

from contextlib import ExitStack
from typing import Any, ClassVar

from torch import Tensor, nn

from sdconvert.plugins import PatchPluginBlock, PatchPluginContainer


class _FedContainer(PatchPluginContainer):
    """Answers with what was fed, whatever it is asked."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.plugins[0].input_data["t_emb"]


class TimeProjectionInput(PatchPluginBlock):
    """Replaces `time_proj` (timestep → sinusoids) by the tensor given to `feeding(model, t_emb=…)`."""

    container_cls: ClassVar[type[PatchPluginContainer]] = _FedContainer

    def __init__(self, model: nn.Module) -> None:
        super().__init__("t_emb_input", model.get_submodule("time_proj"), host_model=model)
        self.register_input_feeder_to(model)


def attach_time_projection_input(model: nn.Module) -> ExitStack:
    """Attach the plugin until the returned stack is closed."""
    stack = ExitStack()
    stack.callback(TimeProjectionInput(model).remove)
    return stack


def project_timestep(model: Any, timestep: Tensor) -> Tensor:
    """Sinusoids (1, C) of one timestep, as the model's own `time_proj` makes them."""
    projection: Tensor = model.time_proj(timestep.reshape(1)).float()
    return projection
