"""What `mha2sha` takes: a folder with weights and encodings, a diffusers model folder, or one weights file."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdconvert.errors import CheckpointError
from sdconvert.io.weights_index import INDEX_SUFFIX, WEIGHTS_SUFFIXES

_STEM = {"mha": "state_dict_mha", "sha": "state_dict_sha"}
_PARAMETERS = {"mha": "parameters_mha.encodings", "sha": "parameters_sha.encodings"}
_DIFFUSERS = ("diffusion_pytorch_model", "model", "pytorch_model")


@dataclass(frozen=True)
class Source:
    """The files of one model in one form.

    Attributes:
        folder: Where they lie.
        weights: A weights file, or the index of several.
        config: `config.json`, if there is one and it belongs to the weights.
        encodings: Encodings files, parameters first.
    """

    folder: Path
    weights: Path
    config: Path | None
    encodings: tuple[Path, ...]

    def read_config(self) -> dict[str, Any] | None:
        """The content of `config.json`, or None.

        Raises:
            CheckpointError: It is no JSON object.
        """
        if self.config is None:
            return None
        try:
            content: Any = json.loads(self.config.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            hint = "copy it again from the checkpoint"
            raise CheckpointError(f"`{self.config}` is no JSON: {error}", hint=hint) from error
        if not isinstance(content, dict):
            raise CheckpointError(f"`{self.config}` holds a {type(content).__name__}, not an object", hint="copy again")
        return content


def find_source(path: Path, form: str = "mha") -> Source:
    """Find the files of a model.

    Args:
        path: A folder with `state_dict_<form>.safetensors` or `.pth`, a diffusers model folder, or one weights file.
            What a folder holds beside weights, `config.json` and `*.encodings`, belongs to it; a file stands alone.
        form: `mha` or `sha`.

    Raises:
        CheckpointError: There are no weights, or more than one choice.
    """
    if path.is_file():
        if path.suffix not in WEIGHTS_SUFFIXES and not path.name.endswith(INDEX_SUFFIX):
            known = ", ".join((*WEIGHTS_SUFFIXES, INDEX_SUFFIX))
            raise CheckpointError(f"`{path}` is no weights file", hint=f"known suffixes: {known}")
        return Source(path.parent, path, None, ())
    if (path / "model_index.json").is_file():
        models = sorted(folder.parent.name for folder in path.glob("*/config.json"))
        raise CheckpointError(
            f"`{path}` is a pipeline, not one model", hint=f"name one of its models: {', '.join(models) or 'none'}"
        )
    weights = _weights(path, form)
    config = path / "config.json"
    parameters = path / _PARAMETERS[form]
    others = sorted(file for file in path.glob("*.encodings") if file != parameters)
    encodings = [parameters, *others] if parameters.is_file() else others
    return Source(path, weights, config if config.is_file() else None, tuple(encodings))


def renamed(name: str, form: str) -> str:
    """The name of a source's file in the other form: names that carry the form change, all others stay.

    Args:
        name: Of the file.
        form: That it gets: `mha` or `sha`.
    """
    other = "sha" if form == "mha" else "mha"
    if name == _PARAMETERS[other]:
        return _PARAMETERS[form]
    return name.replace(_STEM[other], _STEM[form], 1) if name.startswith(_STEM[other]) else name


def stem(weights: Path) -> str:
    """The name of a weights file or index without its suffixes: `state_dict_mha`, `diffusion_pytorch_model.fp16`."""
    name = weights.name.removesuffix(INDEX_SUFFIX)
    return name.removesuffix(next((suffix for suffix in WEIGHTS_SUFFIXES if name.endswith(suffix)), ""))


def _weights(folder: Path, form: str) -> Path:
    stems = (_STEM[form], *_DIFFUSERS)
    found = [file for stem in stems for file in _of_stem(folder, stem)]
    if len(found) == 1:
        return found[0]
    if found:
        names = " and ".join(file.name for file in found)
        raise CheckpointError(f"`{folder}` holds both {names}", hint="keep one of them, or name the file itself")
    there = "no folder"
    if folder.is_dir():
        there = ", ".join(sorted(file.name for file in folder.iterdir())[:10]) or "nothing"
    raise CheckpointError(
        f"`{folder}` holds no {_STEM[form]}.safetensors or {_STEM[form]}.pth, and no diffusers model; found: {there}",
        hint="name a folder that the quantize stage or AIMET wrote, a model of a diffusers checkpoint, or a file",
    )


def _of_stem(folder: Path, stem: str) -> list[Path]:
    """Files `<stem>[.variant].<suffix>`, and indexes in place of the shards that they name."""
    found = [file for suffix in WEIGHTS_SUFFIXES for file in sorted(folder.glob(f"{stem}*{suffix}"))]
    whole = [file for file in found if file.name.split(".")[0] == stem]
    return whole or sorted(folder.glob(f"{stem}*{INDEX_SUFFIX}"))
