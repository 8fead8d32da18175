"""The sampling loop as a unit: it reads what the model function names, and writes the latents."""

import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeVar

from torch import Tensor

from sdconvert.errors import UnitError
from sdconvert.pipelines.unit import Inputs, PipelineUnit, given_keys

if TYPE_CHECKING:
    from sdconvert.pipelines.base import BasePipeline

Side = Literal["positive", "negative"]
Callback = Callable[[int, Tensor, Tensor], None]
_Item = TypeVar("_Item")
_Result = TypeVar("_Result")


class Each(Protocol):
    """Answers of a function to items that do not depend on each other, in their order: `map`, or several at a time."""

    def __call__(self, function: Callable[[_Item], _Result], items: Iterable[_Item], /) -> Iterable[_Result]:
        """Return the answers."""


# What the loop itself tells a model function, besides the models.
_OF_THE_STEP = ("timestep", "progress_id", "side", "each")
_OF_THE_LOOP = ("latents", "scheduler", "generator", "cfg_scale")


class DenoisingLoop(PipelineUnit):
    """Samples: one prediction per timestep of the scheduler, guided, and the scheduler's step.

    A model function that ends in `**kwargs` reads what it names; a parameter that no unit and no caller gives must
    have a default.

    Args:
        model_fn: Prediction of one side at one step.
        in_iteration_models: Attributes of the pipeline that `model_fn` gets by name.
        triggers: Of the models that not every run needs: the key that asks for it.
    """

    def __init__(
        self,
        model_fn: Callable[..., Tensor],
        in_iteration_models: Sequence[str],
        triggers: Mapping[str, str] | None = None,
    ) -> None:
        named = [
            name
            for name, parameter in inspect.signature(model_fn).parameters.items()
            if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
        ]
        read = [name for name in named if name not in (*in_iteration_models, *_OF_THE_STEP)]
        super().__init__(
            take_over=True,
            input_params=tuple(dict.fromkeys((*_OF_THE_LOOP, *read, "callback"))),
            # It draws from the generator and moves the scheduler on: who comes later finds them changed.
            output_params=("latents", "generator", "scheduler"),
            onload_model_names=tuple(in_iteration_models),
        )
        self.triggers = dict(triggers or {})

    def models_needed(self, given: Collection[str]) -> dict[str, str]:
        """See `PipelineUnit.models_needed`: a model with a trigger is needed only when that key has a value."""
        needed = {name: self.triggers.get(name, "") for name in self.onload_model_names}
        return {name: key for name, key in needed.items() if not key or key in given}

    def process(
        self, pipe: "BasePipeline", inputs_shared: Inputs, inputs_posi: Inputs, inputs_nega: Inputs
    ) -> tuple[Inputs, Inputs, Inputs]:
        """Return the three dictionaries with the final `latents`.

        Raises:
            UnitError: The latents, the scheduler or `cfg_scale` is absent.
        """
        for key in ("latents", "scheduler", "cfg_scale"):
            if inputs_shared.get(key) is None:
                raise UnitError(
                    f"{self.name} needs {key!r}, which is absent", hint=f"give it, or add a unit that writes {key!r}"
                )
        pipe.load_models_to_device(tuple(self.models_needed(given_keys(inputs_shared, inputs_posi, inputs_nega))))
        scheduler, latents = inputs_shared["scheduler"], inputs_shared["latents"]
        callback: Callback | None = inputs_shared.get("callback")
        for progress_id, timestep in enumerate(scheduler.timesteps):
            sample = scheduler.scale_model_input(latents, timestep)
            prediction = pipe.guided_prediction(
                {**inputs_shared, "latents": sample},
                inputs_posi,
                inputs_nega,
                timestep=timestep.reshape(1),
                progress_id=progress_id,
            )
            latents = pipe.step(
                scheduler,
                latents=latents,
                progress_id=progress_id,
                noise_pred=prediction,
                generator=inputs_shared.get("generator"),
            )
            if callback is not None:
                callback(progress_id, timestep, latents)
        return {**inputs_shared, "latents": latents}, inputs_posi, inputs_nega


def accepted(function: Callable[..., Any], offered: Inputs) -> Inputs:
    """The part of `offered` that `function` has parameters for: model functions need no `**kwargs` sink.

    Raises:
        UnitError: A parameter without default is not offered.
    """
    parameters = inspect.signature(function).parameters
    absent = [
        name
        for name, parameter in parameters.items()
        if name not in offered
        and parameter.default is parameter.empty
        and parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    ]
    if absent:
        raise UnitError(
            f"the model function {getattr(function, '__name__', 'of the pipeline')} needs {', '.join(absent)}",
            hint="a unit must write each of them, or the caller give it; or give the parameter a default",
        )
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return offered
    return {key: value for key, value in offered.items() if key in parameters}
