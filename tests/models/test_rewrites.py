"""All rewrites together, on every family: the same function, the weights of the rename map, and no plugin lost."""

import copy
import subprocess
import sys

import pytest
import torch
from rewrite_cases import CASES, SMALL_CASES, RewriteCase

from sdconvert.errors import UnsupportedModelError, UsageError
from sdconvert.mha2sha.rewrites import rewrite_splits
from sdconvert.mha2sha.state_dict import split_state_dict
from sdconvert.models.pixel_attention import PixelPlugin
from sdconvert.models.rewrite_names import REWRITES, require_rewrites
from sdconvert.models.rewrites import apply_rewrites
from sdconvert.plugins import require_fused

LEAVES = ["linear_to_conv2d", "gated_conv2d", "channel_layer_norm"]
# Layers of each kind: projections, gated feed-forwards, norms, transformers, attentions to pixels.
COUNTS = {
    "sd15": (12, 4, 12, 4, 0),
    "sdxl": (29, 7, 21, 4, 0),
    "controlnet": (6, 2, 6, 2, 0),
    "small_pasd": (24, 8, 24, 8, 4),
    "pasd": (54, 18, 54, 18, 8),
    "pasd_controlnet": (12, 4, 12, 4, 0),
    "pasd_light": (36, 10, 36, 10, 6),
}


@pytest.fixture(params=CASES)
def name(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


def test_rewritten_models_compute_the_same(name: str) -> None:
    case = CASES[name]().to(torch.float64)
    reference = case.run()
    counts = apply_rewrites(case.per_head().model)
    assert counts == dict(zip(REWRITES, COUNTS[name], strict=True))
    require_fused(case.model)
    assert case.relative_error(reference) <= 1e-10


@pytest.mark.parametrize("count", range(1, len(REWRITES) + 1))
def test_each_prefix_of_the_rewrites_computes_the_same_in_float32(count: int) -> None:
    for name in ("sdxl", "small_pasd"):
        case = CASES[name]()
        reference = case.run()
        apply_rewrites(case.per_head().model, REWRITES[:count])
        assert case.relative_error(reference) <= 1e-5


@pytest.mark.parametrize("name", [*SMALL_CASES, "pasd_light"])
def test_names_and_shapes_follow_from_the_keys_alone(name: str) -> None:
    model = CASES[name]().per_head().model
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    for rewrites in ([], LEAVES[:1], LEAVES[1:2], REWRITES):
        rewritten = copy.deepcopy(model)
        apply_rewrites(rewritten, rewrites)
        shapes = {key: tuple(tensor.shape) for key, tensor in before.items()}
        expected = split_state_dict(before, rewrite_splits(shapes, rewrites))
        found = rewritten.state_dict()
        assert found.keys() == expected.keys()
        assert all(torch.equal(found[key], expected[key]) for key in found)
        rewritten.load_state_dict(expected, strict=True)


def test_weights_take_no_memory() -> None:
    case = CASES["sd15"]().per_head()
    before = {parameter.untyped_storage().data_ptr() for parameter in case.model.parameters()}
    apply_rewrites(case.model)
    assert {parameter.untyped_storage().data_ptr() for parameter in case.model.parameters()} <= before


def test_pixels_are_taken_as_images_only_by_attention_that_can() -> None:
    case = CASES["small_pasd"]()
    with pytest.raises(UnsupportedModelError, match="4 of 4 layers that attend to pixels take tokens only"):
        apply_rewrites(case.model, ["image_context"])
    (plugin,) = [module for module in case.model.modules() if isinstance(module, PixelPlugin)]
    assert not plugin.image_context
    reference = case.run()
    assert apply_rewrites(case.per_head().model, ["image_context"]) == {"image_context": 4}
    as_images = case.run()
    plugin.image_context = False
    as_tokens = case.run()
    for x, tokens, expected in zip(as_images, as_tokens, reference, strict=True):
        assert (x - expected).abs().max() <= 1e-5 * expected.abs().max()
        assert (tokens - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_the_plugin_s_order_and_residuals_still_count() -> None:
    case = CASES["small_pasd"]().per_head()
    apply_rewrites(case.model)
    reference = case.run()
    down = case.call["down_block_additional_residuals"]
    other = RewriteCase(case.model, case.call | {"down_block_additional_residuals": [*down[:-1], 2 * down[-1]]})
    assert other.relative_error(reference) > 1e-3


def test_names_are_checked() -> None:
    assert require_rewrites(reversed(REWRITES)) == list(REWRITES)
    with pytest.raises(UsageError, match="no rewrite is called `geglu`") as error:
        require_rewrites(["geglu"])
    assert "gated_conv2d" in error.value.hint or "nearest" in error.value.hint
    with pytest.raises(UsageError, match="`image_transformer` needs gated_conv2d, channel_layer_norm"):
        require_rewrites(["image_transformer", "linear_to_conv2d"])


def test_rewriting_twice_is_refused() -> None:
    case = CASES["sd15"]().per_head()
    apply_rewrites(case.model)
    reference, keys = case.run(), list(case.model.state_dict())
    with pytest.raises(UnsupportedModelError, match="it is rewritten already"):
        apply_rewrites(case.model)
    assert list(case.model.state_dict()) == keys
    assert case.relative_error(reference) == 0


def test_names_need_no_torch() -> None:
    code = "import sys, sdconvert.mha2sha.rewrites; print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    finished = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert finished.stdout.strip() == "[]"
