"""Sine and cosine of timesteps and sizes enter the graph as inputs.

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


class _RowsContainer(PatchPluginContainer):
    """Answers with its argument: it is sinusoids already, and models flatten what they take for numbers."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return args[0].reshape(-1, self._host.num_channels)


class ProjectedInput(PatchPluginBlock):
    """Replaces a projection (numbers → sinusoids) by its argument, which then is sinusoids."""

    container_cls: ClassVar[type[PatchPluginContainer]] = _RowsContainer

    def __init__(self, model: nn.Module, path: str) -> None:
        super().__init__("projected_input", model.get_submodule(path), host_model=model)


def attach_time_projection_input(model: nn.Module) -> ExitStack:
    """Attach the plugin until the returned stack is closed; SDXL's projection of sizes gets one too."""
    stack = ExitStack()
    stack.callback(TimeProjectionInput(model).remove)
    if getattr(model, "add_time_proj", None) is not None:
        stack.callback(ProjectedInput(model, "add_time_proj").remove)
    return stack


def project_timestep(model: Any, timestep: Tensor) -> Tensor:
    """Sinusoids (1, C) of one timestep, as the model's own `time_proj` makes them."""
    projection: Tensor = model.time_proj(timestep.reshape(1)).float()
    return projection
