"""What a plan says of memory before anything runs, for models of the sizes that were measured."""

import json
from collections.abc import Mapping

import pytest

from sdconvert.assets import asset_path
from sdconvert.checkpoint.source import count_parameters
from sdconvert.cli.app import main
from sdconvert.cli.road import load_road
from sdconvert.config import load_recipe
from sdconvert.stages import Estimating, Need

MIB = 1 << 20
COUNTS = {"unet": 1_107_755_524, "controlnet": 361_289_497, "vae": 84_000_000, "text_encoder": 123_000_000}


def needs(*changes: str, counts: Mapping[str, int] = COUNTS) -> dict[str, Need]:
    recipe = load_recipe("pasd_tiny", list(changes))
    return {stage.name: stage.need(recipe, counts) for stage in load_road() if isinstance(stage, Estimating)}


def test_parameters_are_counted_in_the_model_that_ships() -> None:
    counts = count_parameters(asset_path("pasd_tiny"))
    assert counts["unet"] == 2_768_200
    assert set(counts) == {"unet", "controlnet", "vae", "text_encoder"}


@pytest.mark.parametrize(
    ("latent", "largest", "exporting", "compiling"),
    [(64, "unet", 9967, 7831), (96, "unet", 10490, 17081), (64, "controlnet", 4063, 2424)],
)
def test_a_full_size_model_needs_what_was_measured_and_not_much_more(
    latent: int, largest: str, exporting: int, compiling: int
) -> None:
    """Peaks in MiB of `benchmarks/compile_fullsize.py`."""
    counts = COUNTS if largest == "unet" else {"controlnet": COUNTS["controlnet"]}
    found = needs(f"pipeline.latent_tile={latent}", counts=counts)
    assert list(found) == ["50-export", "60-qnn"]
    assert exporting < found["50-export"].bytes / MIB < 1.2 * exporting
    assert compiling < found["60-qnn"].bytes / MIB < 1.3 * compiling
    assert found["50-export"].of == found["60-qnn"].of == f"{largest}, {COUNTS[largest]:,} parameters"


def test_parts_and_bits_are_counted() -> None:
    whole = needs()["60-qnn"].bytes
    parts = needs('export.split={"unet": ["mid_block", "up_blocks.2"]}')["60-qnn"]
    assert parts.bytes < whole / 2
    assert parts.of.startswith("unet in 3 parts")
    # Cut small enough, the largest is another model.
    many = json.dumps([f"down_blocks.{index}" for index in range(1, 4)])
    assert needs(f'export.split={{"unet": {many}}}')["60-qnn"].of.startswith("controlnet, ")
    assert needs("quantize.weight_bitwidth=4")["60-qnn"].bytes < whole


@pytest.mark.parametrize(("limit", "code"), [("1GiB", 5), ("8 GiB", 0), ("much", 2)])
def test_a_plan_that_does_not_fit_is_refused(
    limit: str, code: int, tmp_path_factory: pytest.TempPathFactory, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path_factory.mktemp("plan") / "build"
    with pytest.raises(SystemExit) as left:
        main(["plan", "--build", str(folder), "--max-memory", limit])
    assert (left.value.code or 0) == code
    output = capsys.readouterr()
    assert ("hint:" in output.err) == bool(code)
    if code != 2:
        assert "memory needed, about" in " ".join(output.out.split())
    if code == 5:
        assert "`50-export` needs about 1.8 GiB for unet, 2,768,200 parameters; the limit is 1.0 GiB" in output.err
    assert not folder.exists()
