"""A recipe says what it means or is refused, with the place and the way out."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from sdconvert.config import RECIPES, Recipe, dump_recipe, load_recipe
from sdconvert.errors import RecipeError


def write(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.yaml")), ids=lambda path: path.stem)
def test_shipped_recipes_are_complete_and_named_as_their_file(path: Path) -> None:
    recipe = load_recipe(path.stem)
    assert recipe.name == path.stem
    assert yaml.safe_load(path.read_text()) == recipe.model_dump(mode="json")


def test_defaults_are_those_of_pasd_tiny() -> None:
    assert load_recipe("pasd_tiny") == Recipe()


def test_layers_keep_their_order(tmp_path: Path) -> None:
    """The last pattern that fits counts."""
    layers = "{'unet:z.*': {weight_bitwidth: 4, block_size: 16}, a: {weight_bitwidth: 16}, '*': {weight_bitwidth: 8}}"
    recipe = load_recipe("pasd_tiny", [f"quantize.layers={layers}"])
    again = load_recipe(write(tmp_path, dump_recipe(recipe)))
    assert again == recipe
    assert list(again.quantize.layers) == ["unet:z.*", "a", "*"]


def test_dump_and_load_are_inverse(tmp_path: Path) -> None:
    recipe = load_recipe("pasd_tiny", ["pipeline.prompt='ümläut: yes'", "qnn.socs=[SM8550, SM8750]"])
    assert recipe.qnn.socs == ("SM8550", "SM8750")
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


@pytest.mark.parametrize(("text", "limit"), [("4GiB", 4 << 30), ("1.5 MB", 1500000), ("7", 7), ("null", None)])
def test_a_memory_limit_is_a_size(text: str, limit: int | None, tmp_path: Path) -> None:
    recipe = load_recipe("pasd_tiny", [f"calibration.memory_limit={text}"])
    assert recipe.calibration.memory_limit == limit
    assert load_recipe(write(tmp_path, dump_recipe(recipe))) == recipe


@given(steps=st.integers(1, 1000), scale=st.floats(0, 100), per_channel=st.booleans())
def test_overrides_replace_exactly_what_they_name(steps: int, scale: float, per_channel: bool) -> None:
    overrides = [f"pipeline.num_inference_steps={steps}", f"pipeline.guidance_scale={scale:f}"]
    recipe = load_recipe("pasd_tiny", [*overrides, f"quantize.per_channel={str(per_channel).lower()}"])
    assert recipe.pipeline.num_inference_steps == steps
    assert recipe.pipeline.guidance_scale == pytest.approx(scale, abs=1e-6)
    assert recipe.quantize.per_channel == per_channel
    assert recipe.qnn == Recipe().qnn


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            "name: a\nquantize:\n  weight_bitwdth: 4\n",
            r"line 3: unknown key `quantize.weight_bitwdth`",
            "weight_bitwidth",
        ),
        ("weight_bitwidth: 4\n", r"line 1: unknown key", "quantize.weight_bitwidth"),
        ("quantize:\n  weight_bitwidth: 5\n", r"line 2: `quantize.weight_bitwidth`.*4, 8 or 16, found 5", "schema"),
        ("quantize:\n  per_channel: 'yes'\n", r"valid boolean, found 'yes'", "schema"),
        ("quantize:\n  weight_bitwidth: true\n", r"found True", "schema"),
        ("quantize: 4\n", r"line 1: `quantize`", "schema"),
        ("qnn:\n  socs: []\n", r"line 2: `qnn.socs`", "schema"),
        ("qnn:\n  socs: [SM8650, 7]\n", r"line 2: `qnn.socs.1`.*found 7", "schema"),
        ("mha2sha:\n  attention_form: mha\n", "line 1: `mha2sha`: .*rewrites have no effect", "schema"),
        (
            "mha2sha:\n  attention_form: mha\n  rewrites: []\n  fold_scale: true\n",
            "line 1: `mha2sha`: .*neither fold_scale nor",
            "schema",
        ),
        ("pipeline:\n  latent_tile: 16\n  latent_overlap: 16\n", "line 1: `pipeline`: latent_overlap 16", "schema"),
        ("calibration:\n  held_out: [coffee]\n", "coffee stands in both", "schema"),
        ("calibration:\n  memory_limit: much\n", r"line 2: `calibration.memory_limit`.*found 'much'", "schema"),
        ("name: a\nname: b\n", r"line 2: `name` is given twice", "line 1"),
        ("checkpoint:\n  loras:\n  - {path: a, scael: 1}\n", r"unknown key `checkpoint.loras.0.scael`", "`scale`"),
        ("checkpoint:\n  loras:\n  - {scale: 1}\n", r"line 2: `checkpoint.loras.0.path`", "schema"),
        ("checkpoint:\n  loras:\n  - {path: a, scale: 0}\n", r"a scale of 0 gives a no effect", "schema"),
        ("checkpoint:\n  loras:\n  - path: a\n    path: b\n", r"line 4: `checkpoint.loras.0.path` is given", "line 3"),
        (
            "quantize:\n  layers:\n    a.b: {weight_bitwidth: 4, bits: 4}\n",
            r"line 3: unknown key `quantize.layers.a.b.bits`",
            "weight_bi",
        ),
        ("quantize:\n  layers:\n    a.b: {weight_bitwidth: 5}\n", r"line 3: `quantize.layers.a.b.*found 5", "schema"),
        ("quantize:\n  layers:\n    a: {block_size: 8}\n", r"line 3: `quantize.layers.a.weight_bitwidth`", "schema"),
        ("schema_version: 2\n", r"line 1: `schema_version`", "schema"),
        ("name: ../escape\n", r"line 1: `name`", "schema"),
        ("- a\n", "no mapping", "config show"),
        ("", "no mapping", "config show"),
        ("a: [b\n", "no valid YAML", "indentation"),
    ],
)
def test_what_a_recipe_gets_wrong_is_named_with_its_line(tmp_path: Path, text: str, message: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe(write(tmp_path, text))
    assert hint in caught.value.hint


@pytest.mark.parametrize(
    ("override", "message", "hint"),
    [
        ("quantize.bits=4", "`--set quantize.bits=4`: unknown key", "known: weight_bitwidth"),
        ("quantise.per_channel=true", "unknown key `quantise`", "quantize"),
        ("name.first=a", "`name` is no section", "config show"),
        ("quantize.weight_bitwidth", "no assignment", "section.key=value"),
        ("=4", "no assignment", "section.key=value"),
        ("qnn.socs=[a", "no YAML", "quote"),
        ("quantize.weight_bitwidth=5", "--set quantize.weight_bitwidth=5`.*found 5", "schema"),
    ],
)
def test_what_an_override_gets_wrong_is_named(override: str, message: str, hint: str) -> None:
    with pytest.raises(RecipeError, match=message) as caught:
        load_recipe("pasd_tiny", [override])
    assert hint in caught.value.hint


def test_unknown_recipes_are_answered_with_the_nearest(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="pasd_tyni") as caught:
        load_recipe("pasd_tyni")
    assert "`pasd_tiny`" in caught.value.hint
    with pytest.raises(RecipeError, match="does not exist"):
        load_recipe(tmp_path / "none.yaml")


def test_every_field_is_described_and_a_recipe_needs_no_torch() -> None:
    schema = Recipe.model_json_schema()
    for section in [schema, *schema["$defs"].values()]:
        assert section["description"]
        for name, field in section["properties"].items():
            assert "$ref" in field or field["description"], name
    code = "import sys, sdconvert.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("overrides", "samples"),
    [
        ([], "off"),
        (["quantize.adaround=false"], "off"),
        (["quantize.adaround=true"], None),
        (["quantize.adaround={samples: 8}"], 8),
        (["quantize.adaround.samples=8"], 8),
        (["quantize.adaround=true", "quantize.adaround.samples=8"], 8),
    ],
)
def test_adaround_is_off_or_on_with_what_is_said_of_it(overrides: list[str], samples: int | str | None) -> None:
    section = load_recipe("pasd_tiny", overrides).quantize.adaround
    assert (section.samples if section else "off") == samples


def test_the_road_s_own_targets_cannot_be_left_out() -> None:
    assert load_recipe("pasd_tiny", ["export.targets=[qdq_onnx, qnn_context, dlc]"]).export.targets[-1] == "dlc"
    with pytest.raises(RecipeError, match="the road goes through qdq_onnx and qnn_context"):
        load_recipe("pasd_tiny", ["export.targets=[dlc]"])
