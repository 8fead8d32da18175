"""A model in either form: built from the files of one, and rewritten to take the weights of the other."""

from pathlib import Path

from sdconvert.adapters import ModelAdapter, adapter_for
from sdconvert.adapters.loading import load_weights, make_model
from sdconvert.errors import UsageError
from sdconvert.io.tensors import load_every_tensor
from sdconvert.mha2sha.name_map import NameMap
from sdconvert.mha2sha.source import Source, find_source
from sdconvert.models.attention import SHAAttentionPatch
from sdconvert.models.rewrites import apply_rewrites


def build_mha(files: Source) -> ModelAdapter:
    """Build the model of a source, in float32.

    Raises:
        UsageError: The source has no `config.json`.
        UnsupportedModelError: No family covers its class.
        CheckpointError: Config and weights do not fit each other.
    """
    config = files.read_config()
    if config is None:
        raise UsageError(
            f"`{files.weights}` has no config.json beside it that belongs to it, so the model cannot be built",
            hint="put the model's config.json into the folder, or leave --samples out",
        )
    return adapter_for(make_model(config, load_every_tensor(files.weights), files.weights))


def rewrite_to_sha(adapter: ModelAdapter, folder: Path) -> None:
    """Turn a model's attention into SHA in place, do the other rewrites of a folder, and load its weights, strictly.

    Args:
        adapter: Covers the model in MHA form.
        folder: That `convert_folder` wrote.

    Raises:
        CheckpointError: The weights do not fit the rewritten model.
    """
    name_map = NameMap.load(folder)
    SHAAttentionPatch.wrap_model("sha", adapter.model, fold_scale=bool(name_map.folded)).fuse()
    apply_rewrites(adapter.model, name_map.rewrites)
    path = find_source(folder, "sha").weights
    load_weights(adapter.model, load_every_tensor(path), path)
