"""What a plan says of memory before anything runs, for models of the sizes that were measured."""

import json

import pytest

from sdconvert.assets import asset_path
from sdconvert.checkpoint.source import count_parameters
from sdconvert.cli.app import main
from sdconvert.cli.road import load_road
from sdconvert.config import load_recipe
from sdconvert.stages import Estimating, Need

MIB = 1 << 20
COUNTS = {"unet": 1_107_755_524, "controlnet": 361_289_497, "vae": 84_000_000, "text_encoder": 123_000_000}


def needs(*changes: str) -> dict[str, Need]:
    recipe = load_recipe("pasd_tiny", list(changes))
    return {stage.name: stage.need(recipe, COUNTS) for stage in load_road() if isinstance(stage, Estimating)}


def test_parameters_are_counted_in_the_model_that_ships() -> None:
    counts = count_parameters(asset_path("pasd_tiny"))
    assert counts["unet"] == 2_768_200
    assert set(counts) == {"unet", "controlnet", "vae", "text_encoder"}


def test_a_full_size_model_needs_what_was_measured_and_not_much_more() -> None:
    """Measured: 9,967 MiB to export, 7,831 MiB to compile (`benchmarks/compile_fullsize.py`)."""
    found = needs()
    assert list(found) == ["50-export", "60-qnn"]
    assert 9967 < found["50-export"].bytes / MIB < 1.2 * 9967
    assert 7831 < found["60-qnn"].bytes / MIB < 1.2 * 7831
    assert found["50-export"].of == found["60-qnn"].of == "unet, 1,107,755,524 parameters"


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
