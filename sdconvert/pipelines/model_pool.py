"""Models by the name that pipelines call them, read from files, shards, component folders or diffusers folders."""

import inspect
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sdconvert.config import did_you_mean
from sdconvert.errors import CheckpointError, MissingModelError, UnsupportedModelError, UsageError
from sdconvert.models.config_json import read_config
from sdconvert.pipelines.base import BasePipeline
from sdconvert.pipelines.layouts import FAMILIES, build_on_meta, differences, find_family, layout, recognized
from sdconvert.pipelines.loading import load_scheduler, load_tokenizer
from sdconvert.pipelines.model_config import ModelConfig, WeightFiles, find_weights
from sdconvert.pipelines.residency import ModelResidency

# Of a diffusers folder, what no pipeline here calls: it filters results or prepares its input.
_UNUSED = frozenset({"safety_checker", "feature_extractor", "image_encoder"})
# Files by which the folder of a component is known.
_MARKS = ("config.json", "scheduler_config.json", "tokenizer_config.json", "*.safetensors", "*.bin")
# Names that a Stable Diffusion VAE's attention had before diffusers 0.14.
_OLD_ATTENTION = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}


@dataclass(frozen=True)
class PooledModel:
    """One model and where it came from."""

    name: str
    model: Any
    source: Path
    asked: bool
    """It was asked for alone, not found in a folder of several."""
    family: str = ""
    """Its name in `FAMILIES`; empty for tokenizers and schedulers."""


class ModelPool:
    """Loads models strictly, from the disk only, in evaluation mode and without gradients.

    Args:
        torch_dtype: Type of all weights.
        residency: Given one, models are left on the disk until it loads them, where their files allow it.
    """

    def __init__(self, torch_dtype: torch.dtype = torch.float32, residency: ModelResidency | None = None) -> None:
        self.torch_dtype = torch_dtype
        self.residency = residency
        self._models: list[PooledModel] = []

    def auto_load_model(self, config: ModelConfig) -> tuple[str, ...]:
        """Load what `config` points to, and return the names of what came in.

        Raises:
            CheckpointError: A file is missing or damaged, or weights and config do not fit each other.
            UnsupportedModelError: It is no known model; the message names the nearest and what differs.
            UsageError: A name is given for a folder of several models.
        """
        path = Path(config.path)
        parts = _parts(path)
        if not parts:
            pooled = self._load_model(path, config.name, asked=True)
            self._models.append(pooled)
            return (pooled.name,)
        if config.name:
            raise UsageError(
                f"`{path}` holds {', '.join(parts)}, which cannot all be called {config.name!r}",
                hint=f"give the folder of one of them, or leave out name={config.name!r}",
            )
        for name, folder in parts.items():
            self._models.append(self._load_part(name, folder))
        return tuple(parts)

    def fetch_model(self, name: str, index: int | None = None) -> Any:
        """The model called `name`; with several of them, the `index`-th that was loaded.

        Raises:
            MissingModelError: There is none, not so many, or more than one and no index.
        """
        return self._fetch(name, index).model

    def _fetch(self, name: str, index: int | None = None) -> PooledModel:
        found = [pooled for pooled in self._models if pooled.name == name]
        if not found:
            names = list(dict.fromkeys(pooled.name for pooled in self._models))
            raise MissingModelError(
                f"no model is called {name!r}; loaded: {', '.join(names) or 'none'}", hint=did_you_mean(name, names)
            )
        if index is None and len(found) > 1:
            places = ", ".join(f"`{pooled.source}`" for pooled in found)
            raise MissingModelError(f"{len(found)} models are called {name!r}: {places}", hint="give index=…")
        if not 0 <= (index or 0) < len(found):
            raise MissingModelError(f"{len(found)} models are called {name!r}; there is no number {index}")
        return found[index or 0]

    def arguments_for(self, cls: type[BasePipeline]) -> dict[str, Any]:
        """The models that a pipeline class takes, by the names of its arguments.

        Raises:
            MissingModelError: One that it requires is not there.
            UnsupportedModelError: One is of another family than the class demands.
            UsageError: A model that was asked for by itself is none that it takes.
        """
        named = {name: required for name, required in _arguments(cls).items() if name not in ("device", "torch_dtype")}
        if stray := [pooled for pooled in self._models if pooled.asked and pooled.name not in named]:
            raise UsageError(
                f"{cls.__name__} has no use for {stray[0].name!r} from `{stray[0].source}`",
                hint=f"it takes {', '.join(sorted(named))}; ModelConfig(path, name=…) says which it is",
            )
        there = {pooled.name for pooled in self._models}
        if missing := [name for name, required in named.items() if required and name not in there]:
            raise MissingModelError(
                f"{cls.__name__} needs {', '.join(missing)}; loaded: {', '.join(sorted(there)) or 'nothing'}",
                hint="add a ModelConfig for each, or for a diffusers folder that holds them",
            )
        found = {name: self._fetch(name) for name in named if name in there}
        for name, families in cls.model_families.items():
            if name in found and found[name].family not in families:
                raise UnsupportedModelError(
                    f"`{found[name].source}` is a {found[name].family}, the {name} of {cls.__name__} is a "
                    f"{' or '.join(families)}",
                    hint="give the weights of such a model, or choose the pipeline of this one",
                )
        return {name: pooled.model for name, pooled in found.items()}

    def _load_part(self, name: str, folder: Path) -> PooledModel:
        if name == "scheduler":
            return PooledModel(name, load_scheduler(folder.parent), folder, asked=False)
        if name.startswith("tokenizer"):
            return PooledModel(name, load_tokenizer(folder), folder, asked=False)
        return self._load_model(folder, name, asked=False)

    def _load_model(self, path: Path, name: str, *, asked: bool) -> PooledModel:
        weights = find_weights(path)
        renamed = _modern_names(weights.shapes)
        shapes = {new: weights.shapes[key] for key, new in renamed.items()}
        family = find_family(shapes, weights.config)
        model = build_on_meta(family, weights.config or recognized(family, shapes))
        if what := differences(layout(model), shapes):
            raise CheckpointError(
                f"the weights in `{path}` do not fit its config.json, a {family}: {what}",
                hint="config.json and weights must come from the same model",
            )
        # torch's own `to`: that of diffusers warns of modules to keep in float32 where there are none.
        nn.Module.to(model.eval().requires_grad_(False), self.torch_dtype)
        name = name or FAMILIES[family].role
        as_it_is = all(renamed.get(key) == key for key in weights.shapes)
        if self.residency is not None and weights.single is not None and as_it_is:
            self.residency.manage(name, model, weights=weights.single)
            return PooledModel(name, model, path, asked, family)
        _fill(model, weights, renamed, self.torch_dtype)
        if self.residency is not None:
            self.residency.manage(name, model)
            self.residency.load(())  # written to the disk now, before the next model comes in
        return PooledModel(name, model, path, asked, family)


def pool_models(
    configs: Iterable[ModelConfig],
    torch_dtype: torch.dtype = torch.float32,
    residency: ModelResidency | None = None,
) -> ModelPool:
    """Load everything that `configs` point to.

    Raises:
        CheckpointError: As `ModelPool.auto_load_model`.
        UnsupportedModelError: As `ModelPool.auto_load_model`.
    """
    pool = ModelPool(torch_dtype, residency)
    for config in configs:
        pool.auto_load_model(config)
    return pool


def _arguments(cls: type) -> dict[str, bool]:
    """Arguments of a class and whether it requires them, with those that its constructor hands on to its bases."""
    found: dict[str, bool] = {}
    for base in cls.__mro__:
        if "__init__" not in vars(base):
            continue
        _, *parameters = inspect.signature(vars(base)["__init__"]).parameters.values()
        for one in parameters:
            if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY):
                found.setdefault(one.name, one.default is one.empty)
        if not any(one.kind is one.VAR_KEYWORD for one in parameters):
            break
    return found


def _parts(path: Path) -> dict[str, Path]:
    """Component folders of a diffusers folder by name, as its index lists them; none for anything else.

    Raises:
        CheckpointError: The index names a folder that is not there.
    """
    if not path.is_dir():
        return {}
    index = path / "model_index.json"
    if index.is_file():
        listed = {name for name, origin in read_config(index).items() if isinstance(origin, list) and origin[1]}
        parts = {name: path / name for name in sorted(listed - _UNUSED)}
        if missing := [name for name, folder in parts.items() if not folder.is_dir()]:
            raise CheckpointError(
                f"`{path}` lacks {', '.join(missing)}, which its model_index.json names", hint="copy the whole folder"
            )
        return parts
    children = sorted(child for child in path.iterdir() if child.is_dir() and child.name not in _UNUSED)
    return {child.name: child for child in children if any(any(child.glob(mark)) for mark in _MARKS)}


def _modern_names(keys: Collection[str]) -> dict[str, str]:
    """Today's names of the keys of a released file, without those of what is no weight any more."""
    # transformers 5 left the prefix out, but for the encoder with a projection.
    prefix = "" if any(key.startswith("text_projection.") for key in keys) else "text_model."
    names = {key: key.removeprefix(prefix) for key in keys if not key.endswith("embeddings.position_ids")}
    for key in names:
        if key.startswith(("encoder.mid_block.attentions.", "decoder.mid_block.attentions.")):
            for old, new in _OLD_ATTENTION.items():
                names[key] = names[key].replace(old, new)
    return names


def _fill(model: nn.Module, weights: WeightFiles, renamed: Mapping[str, str], dtype: torch.dtype) -> None:
    state: dict[str, Tensor] = {
        renamed[key]: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for key, tensor in weights.tensors()
        if key in renamed
    }
    model.load_state_dict(state, assign=True)
    model.requires_grad_(False)
