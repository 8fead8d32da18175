"""What every pipeline has: models by name, units around one sampling loop, and guidance in batch-1 runs."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from sdconvert.errors import MissingModelError
from sdconvert.pipelines.unit import Inputs, PipelineUnit, PipelineUnitRunner

Side = Literal["positive", "negative"]


class Observer(Protocol):
    """Sees every model call of a run, before it is made."""

    def record(self, component: str, inputs: Inputs, *, step: int, side: Side, tile: int) -> None:
        """Take note of one call.

        Args:
            component: Attribute of the pipeline that is called, for example `"unet"`.
            inputs: What the call gets, by argument name; not to be modified.
            step: Index of the sampling step; the number of steps for calls after the loop.
            side: Side of guidance.
            tile: Index of the latent tile.
        """


class BasePipeline:
    """Units, a sampling loop whose models are attributes, and what comes after it.

    A subclass sets its models as attributes (None while not loaded), `units`, `post_units`, `in_iteration_models`
    and `model_fn`. A model may be any callable with the model's calling convention; that is how a backend is swapped.

    Args:
        device: Where models run and intermediate tensors live.
        torch_dtype: Type of the intermediate tensors.
    """

    model_fn: Callable[..., Tensor]

    def __init__(self, device: str | torch.device = "cpu", torch_dtype: torch.dtype = torch.float32) -> None:
        self.device = torch.device(device)
        self.torch_dtype = torch_dtype
        self.units: Sequence[PipelineUnit] = ()
        self.post_units: Sequence[PipelineUnit] = ()
        self.in_iteration_models: tuple[str, ...] = ()
        self.unit_runner = PipelineUnitRunner()

    @property
    def all_units(self) -> tuple[PipelineUnit, ...]:
        """Units before and after the sampling loop, in order."""
        return (*self.units, *self.post_units)

    def require_models(self, model_names: Iterable[str]) -> None:
        """Check that every name is a loaded model.

        Raises:
            MissingModelError: A name is no attribute of the pipeline, or the model is not loaded.
        """
        for name in model_names:
            if not hasattr(self, name):
                near = difflib.get_close_matches(name, vars(self), n=1)
                raise MissingModelError(
                    f"{type(self).__name__} has no model {name!r}", hint=f"did you mean {near[0]!r}?" if near else ""
                )
            if getattr(self, name) is None:
                raise MissingModelError(
                    f"{type(self).__name__} needs {name!r}, which is not loaded",
                    hint=f"load it and set the attribute {name!r} of the pipeline",
                )

    def load_models_to_device(self, model_names: Sequence[str]) -> None:
        """Bring the named models to the pipeline's device.

        Raises:
            MissingModelError: As `require_models`.
        """
        self.require_models(model_names)
        for name in model_names:
            model = getattr(self, name)
            if isinstance(model, nn.Module):
                model.to(self.device)

    def run_units(
        self, units: Sequence[PipelineUnit], inputs_shared: Inputs, inputs_posi: Inputs, inputs_nega: Inputs
    ) -> tuple[Inputs, Inputs, Inputs]:
        """Run `units` in order and return the three dictionaries of inputs."""
        for unit in units:
            inputs_shared, inputs_posi, inputs_nega = self.unit_runner(
                unit, self, inputs_shared, inputs_posi, inputs_nega
            )
        return inputs_shared, inputs_posi, inputs_nega

    def guided_prediction(
        self, inputs_shared: Inputs, inputs_posi: Inputs, inputs_nega: Inputs, **iteration: Any
    ) -> Tensor:
        """Prediction of one step, `nega + s·(posi - nega)` with `s = cfg_scale`; the positive side alone at 1.

        The two sides are two runs of batch 1, as a static device graph needs it.

        Args:
            inputs_shared: Shared inputs; those that `model_fn` names are passed on.
            inputs_posi: Inputs of the positive side.
            inputs_nega: Inputs of the negative side.
            **iteration: Inputs of this step.
        """
        models = {name: getattr(self, name) for name in self.in_iteration_models}

        def predict(side: Side, inputs: Inputs) -> Tensor:
            offered = dict(**models, **inputs_shared, **inputs, **iteration, side=side)
            return self.model_fn(**_accepted(self.model_fn, offered))

        positive = predict("positive", inputs_posi)
        if inputs_shared["cfg_scale"] == 1.0:
            return positive
        negative = predict("negative", inputs_nega)
        scale: float = inputs_shared["cfg_scale"]
        return negative + scale * (positive - negative)


def _accepted(function: Callable[..., Any], offered: Inputs) -> Inputs:
    """The part of `offered` that `function` has parameters for: model functions need no `**kwargs` sink."""
    parameters = inspect.signature(function).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return offered
    return {key: value for key, value in offered.items() if key in parameters}
