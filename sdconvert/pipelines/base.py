"""What every pipeline has: models by name, units around one sampling loop, and guidance in batch-1 runs."""

import difflib
import inspect
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, ClassVar, Protocol, Self

import torch
from PIL import Image
from torch import Tensor, nn

from sdconvert.errors import MissingModelError, UnitError
from sdconvert.pipelines.loop import Callback, DenoisingLoop, Each, Side, accepted
from sdconvert.pipelines.model_config import ModelConfig
from sdconvert.pipelines.residency import ModelResidency
from sdconvert.pipelines.unit import Inputs, PipelineUnit, PipelineUnitRunner, given_keys


class Observer(Protocol):
    """Sees every model call of a run, before it is made."""

    def record(self, component: str, inputs: Inputs, *, step: int, side: Side, tile: int) -> None:
        """Take note of one call.

        Args:
            component: Attribute of the pipeline that is called, for example `"unet"`.
            inputs: What the call gets, by argument name; not to be modified.
            step: Index of the sampling step; 0 for calls before the loop, the number of steps for calls after it.
            side: Side of guidance.
            tile: Index of the latent tile.
        """


class BasePipeline:
    """Units, a sampling loop whose models are attributes, and what comes after it.

    A subclass sets its models as attributes (None while not loaded) and states, for the class or for the instance,
    `units`, `post_units`, `in_iteration_models` and `model_fn`. A model may be any callable with the model's calling
    convention; that is how a backend is swapped.

    Args:
        device: Where models run and intermediate tensors live.
        torch_dtype: Type of the intermediate tensors.
    """

    unit_classes: ClassVar[tuple[Callable[[], PipelineUnit], ...]] = ()
    """Makes `units`, those before the sampling loop."""
    post_unit_classes: ClassVar[tuple[Callable[[], PipelineUnit], ...]] = ()
    """Makes `post_units`, those after it."""
    in_iteration_models: tuple[str, ...] = ()
    """Models that `model_fn` gets by name."""
    iteration_triggers: ClassVar[Mapping[str, str]] = {}
    """Of the models in the loop that not every run needs: the key that asks for it."""
    model_families: ClassVar[Mapping[str, Collection[str]]] = {}
    """Of the models that only some families can be, the names of these in `layouts.FAMILIES`."""
    output_param: ClassVar[str] = "output_image"
    """The shared key under which a run leaves its pictures, (1, 3, H, W) in [0, 1]."""
    model_fn: Callable[..., Tensor]
    residency: ModelResidency | None = None
    """Keeps in memory only what a unit calls; see `manage_models`. None: every model stays where it is."""
    each: Each = map
    """How models are called for the tiles of a picture and the sides of guidance: one after the other."""

    def __init__(self, device: str | torch.device = "cpu", torch_dtype: torch.dtype = torch.float32) -> None:
        self.device = torch.device(device)
        self.torch_dtype = torch_dtype
        self.units: Sequence[PipelineUnit] = tuple(make() for make in self.unit_classes)
        self.post_units: Sequence[PipelineUnit] = tuple(make() for make in self.post_unit_classes)
        self.unit_runner = PipelineUnitRunner()

    @classmethod
    def from_pretrained(
        cls,
        folder: str | Path | None = None,
        *,
        model_configs: Sequence[ModelConfig] = (),
        device: str | torch.device = "cpu",
        torch_dtype: torch.dtype = torch.float32,
        residency: ModelResidency | None = None,
    ) -> Self:
        """Read a pipeline's models, from the disk only, in evaluation mode and without gradients.

        Args:
            folder: A diffusers folder; short for a `ModelConfig` of it.
            model_configs: Files and folders of models, each of which the pipeline must have a use for.
            device: Where models run.
            torch_dtype: Type of weights and intermediate tensors.
            residency: Given one, weights stay on the disk until a unit calls for them.

        Raises:
            CheckpointError: Something is missing or damaged, or weights and config do not fit each other.
            MissingModelError: A model that the pipeline requires is not among them.
            UnsupportedModelError: Weights are of no known model, or of one that the pipeline has no use for.
        """
        # Only reading models takes the model classes of diffusers and transformers, which take seconds to import.
        from sdconvert.pipelines.model_pool import pool_models

        configs = [*([ModelConfig(folder)] if folder is not None else []), *model_configs]
        pool = pool_models(configs, torch_dtype, residency)
        pipe = cls(**pool.arguments_for(cls), device=device, torch_dtype=torch_dtype)
        if residency is not None:
            pipe.manage_models(residency)
        return pipe

    @classmethod
    def declared_units(cls) -> tuple[PipelineUnit, ...]:
        """The units of the class, loop included, in order: its whole road, known without any model."""
        loop = DenoisingLoop(cls.model_fn, cls.in_iteration_models, cls.iteration_triggers)
        before, after = ([make() for make in makers] for makers in (cls.unit_classes, cls.post_unit_classes))
        return (*before, loop, *after)

    @property
    def all_units(self) -> tuple[PipelineUnit, ...]:
        """Units before the sampling loop, the loop itself, and units after it, in order."""
        loop = DenoisingLoop(self.model_fn, self.in_iteration_models, self.iteration_triggers)
        return (*self.units, loop, *self.post_units)

    def inputs(self, *args: Any, **kwargs: Any) -> tuple[Inputs, Inputs, Inputs]:
        """Turn a request into the three dictionaries that the first unit gets; nothing is computed yet.

        Raises:
            UnitError: The pipeline defines none, nor a `__call__` of its own.
        """
        raise UnitError(
            f"{type(self).__name__} does not say what it takes",
            hint="define inputs(…), which returns the shared, positive and negative inputs; or __call__",
        )

    @torch.no_grad()
    def __call__(
        self, *args: Any, observer: Observer | None = None, callback: Callback | None = None, **kwargs: Any
    ) -> Tensor:
        """Make a picture; the same arguments give the same picture bit for bit.

        Args:
            *args: As for `inputs`.
            observer: Sees every model call.
            callback: Called after each step with its index, timestep and latents.
            **kwargs: As for `inputs`.

        Returns:
            Picture (3, H, W) in [0, 1].

        Raises:
            UsageError: An argument is out of range, or would have no effect.
            MissingModelError: A model that this run needs is not loaded.
        """
        shared, posi, nega = self.inputs(*args, **kwargs)
        shared |= {"observer": observer, "callback": callback}
        self.require_models_of_run(shared, posi, nega)
        shared, *_ = self.run_units(self.all_units, shared, posi, nega)
        output: Tensor = shared[self.output_param]
        return output[0]

    def require_models(self, model_names: Iterable[str]) -> None:
        """Check that every name is a loaded model.

        Raises:
            MissingModelError: A name is no attribute of the pipeline, or the model is not loaded.
        """
        for name in model_names:
            self._require_model(name, "")

    def require_models_of_run(self, *inputs: Inputs) -> None:
        """Check that every model is loaded that a run on `inputs` will call, before anything is computed.

        What is asked for decides, not what happens to be loaded: an optional unit without its input needs no model,
        and with it, a missing model is an error.

        Raises:
            MissingModelError: As `require_models`; names the input that asks for the model.
        """
        given = given_keys(*inputs)
        for unit in self.all_units:
            for name, key in unit.models_needed(given).items():
                self._require_model(name, key)
            if unit.is_triggered(given):
                given |= set(unit.writes)

    def _require_model(self, name: str, asked_by: str) -> None:
        if not hasattr(self, name):
            near = difflib.get_close_matches(name, vars(self), n=1)
            raise MissingModelError(
                f"{type(self).__name__} has no model {name!r}", hint=f"did you mean {near[0]!r}?" if near else ""
            )
        if getattr(self, name) is None:
            because = f" for the given {asked_by}" if asked_by else ""
            raise MissingModelError(
                f"{type(self).__name__} needs {name!r}, which is not loaded{because}",
                hint=f"load it and set the attribute {name!r} of the pipeline"
                + (f", or leave out {asked_by}" if asked_by else ""),
            )

    def load_models_to_device(self, model_names: Sequence[str]) -> None:
        """Bring the named models to the pipeline's device; with `residency`, take the others off it.

        Raises:
            MissingModelError: As `require_models`.
            ResidencyError: The running unit does not declare one of them.
            BudgetError: They exceed the residency's limit.
        """
        self.require_models(model_names)
        if self.residency is not None:
            self.residency.load(self._with_weights(model_names))
            return
        for name in self._with_weights(model_names):
            getattr(self, name).to(self.device)

    def require_fit(self) -> None:
        """Check before any work that the models that a unit calls fit into memory together, for every unit.

        Raises:
            BudgetError: They exceed the residency's limit; the message says which, and what would fit.
        """
        if self.residency is not None:
            self.residency.require_fit(*(self._with_weights(unit.onload_model_names) for unit in self.all_units))

    def _with_weights(self, model_names: Iterable[str]) -> list[str]:
        """Of some models those that have weights here; a backend that stands in for one has nothing to move."""
        return [name for name in model_names if isinstance(getattr(self, name), nn.Module)]

    def manage_models(self, residency: ModelResidency) -> None:
        """Give all models to `residency`: from now on a unit has in memory what it declares, and may call no more.

        Models that `residency` manages already, under the same name, are left to it.

        Raises:
            ResidencyError: As `ModelResidency.manage`.
        """
        models = {name: model for name, model in vars(self).items() if isinstance(model, nn.Module)}
        residency.manage_all({name: model for name, model in models.items() if name not in residency.states})
        self.residency = residency

    def _models_of(self, unit: PipelineUnit) -> AbstractContextManager[None]:
        return nullcontext() if self.residency is None else self.residency.only(unit.onload_model_names)

    def run_units(
        self, units: Sequence[PipelineUnit], inputs_shared: Inputs, inputs_posi: Inputs, inputs_nega: Inputs
    ) -> tuple[Inputs, Inputs, Inputs]:
        """Run `units` in order and return the three dictionaries of inputs."""
        for unit in units:
            with self._models_of(unit):
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
            offered = dict(**models, **inputs_shared, **inputs, **iteration, side=side, each=self.each)
            return self.model_fn(**accepted(self.model_fn, offered))

        scale: float = inputs_shared["cfg_scale"]
        sides: list[tuple[Side, Inputs]] = [("positive", inputs_posi), ("negative", inputs_nega)]
        positive, *guidance = self.each(lambda one: predict(*one), sides[: 1 if scale == 1.0 else 2])
        if not guidance:
            return positive
        negative = guidance[0]
        return negative + scale * (positive - negative)

    def step(
        self,
        scheduler: Any,
        *,
        latents: Tensor,
        progress_id: int,
        noise_pred: Tensor,
        generator: torch.Generator | None = None,
        **inputs: Any,
    ) -> Tensor:
        """Latents after one step of `scheduler`, diffusers' or one whose `step` returns the latents themselves.

        Args:
            scheduler: Sampler.
            latents: Latents before the step.
            progress_id: Index of the step.
            noise_pred: The guided prediction.
            generator: What a stochastic sampler draws from, so that the run's own seed decides.
            **inputs: The other shared inputs, which a subclass may want; not used here.
        """
        parameters = inspect.signature(scheduler.step).parameters
        options: Inputs = {"generator": generator} if "generator" in parameters else {}
        if "return_dict" in parameters:
            options["return_dict"] = False
        result = scheduler.step(noise_pred, scheduler.timesteps[progress_id], latents, **options)
        after: Tensor = result[0] if isinstance(result, tuple) else result
        return after

    def generate_noise(
        self,
        shape: Sequence[int],
        seed: int | None = None,
        rand_device: str | torch.device = "cpu",
        rand_torch_dtype: torch.dtype = torch.float32,
    ) -> Tensor:
        """Standard normal noise of `shape` on the pipeline's device, drawn on `rand_device`; without seed, any."""
        generator = None if seed is None else torch.Generator(rand_device).manual_seed(seed)
        noise = torch.randn(tuple(shape), generator=generator, device=rand_device, dtype=rand_torch_dtype)
        return noise.to(self.device, self.torch_dtype)

    def vae_output_to_image(self, vae_output: Tensor) -> Image.Image:
        """The first of pictures (n, 3, H, W) in [-1, 1], as an 8-bit RGB image."""
        pixels = (vae_output[0].float() / 2 + 0.5).clamp(0.0, 1.0).mul(255).round().to(torch.uint8)
        return Image.fromarray(pixels.permute(1, 2, 0).cpu().numpy())  # (3, H, W) to (H, W, 3)
