"""A range per head: inside the parent's, of the head's own values, and better at 8 bits."""

from dataclasses import dataclass
from pathlib import Path

import pytest
from mha_folder import write_folder
from static_graphs import Case, small_controlnet_case

from sdconvert.errors import UsageError
from sdconvert.mha2sha.artifact import Mha2ShaArtifact
from sdconvert.mha2sha.command import convert_folder
from sdconvert.mha2sha.recalibrate import OUTPUT, recalibrate_heads
from sdconvert.models.attention import SHAAttention
from sdconvert.quantize.artifact import load_simulation, save_simulation
from sdconvert.quantize.settings import load_settings
from sdconvert.quantize.simulation import Encodings, Simulation


@dataclass(frozen=True)
class Recalibrated:
    """W8A8: the inherited ranges, the simulation with the heads' own, and the figures of both."""

    inherited: Encodings
    sha: Simulation
    figures: dict[str, dict[str, float]]
    case: Case


@pytest.fixture(scope="module")
def recalibrated(tmp_path_factory: pytest.TempPathFactory) -> Recalibrated:
    folder = tmp_path_factory.mktemp("recalibrate")
    case = small_controlnet_case()
    model = case.adapter.model
    for layer in case.adapter.attention_layers():
        # Heads of a trained model differ; random ones hardly do.
        values = model.get_submodule(layer.path).to_v.weight.data
        values[: len(values) // layer.heads] *= 3
    settings = load_settings({75}).with_bitwidths(weight=8, activation=8, per_channel=True)
    mha = Simulation(case.adapter, case.samples[0], settings)
    mha.calibrate(case.samples)
    write_folder(folder / "mha", case, mha)
    convert_folder(folder / "mha", folder / "out" / case.adapter.graph_name)
    sha = Mha2ShaArtifact(folder / "out").simulation(case.adapter.graph_name, case.adapter, case.samples[0], settings)
    inherited = sha.encodings()
    return Recalibrated(inherited, sha, recalibrate_heads(sha, case.samples, case.samples[:1]), case)


def test_only_attention_gets_new_ranges(recalibrated: Recalibrated) -> None:
    after = recalibrated.sha.encodings()
    modules = recalibrated.case.adapter.model.named_modules()
    layers = tuple(path for path, module in modules if isinstance(module, SHAAttention))
    assert set(recalibrated.figures) == {*layers, OUTPUT}
    assert after.parameters == recalibrated.inherited.parameters
    before = recalibrated.inherited.activations
    changed = {key for key, entries in after.activations.items() if entries != before[key]}
    assert changed
    assert all(key.startswith(layers) for key in changed)


def test_a_head_s_range_lies_within_its_parent_s(recalibrated: Recalibrated) -> None:
    smaller = 0
    for key, (entry,) in recalibrated.sha.encodings().activations.items():
        (parent,) = recalibrated.inherited.activations[key]
        step = parent["scale"]
        assert parent["min"] - step <= entry["min"] <= entry["max"] <= parent["max"] + step, key
        smaller += entry["scale"] < 0.9 * step
    assert smaller >= 10


def test_the_heads_own_ranges_gain_at_8_bits(recalibrated: Recalibrated) -> None:
    figures = recalibrated.figures
    gains = [figure["recalibrate"] - figure["inherit"] for place, figure in figures.items() if place != OUTPUT]
    assert sum(gains) / len(gains) > 0.1


def test_the_ranges_come_back_from_the_file(recalibrated: Recalibrated, tmp_path: Path) -> None:
    sha, case = recalibrated.sha, recalibrated.case
    save_simulation(sha, tmp_path / "x.encodings")
    again = load_simulation(tmp_path / "x.encodings", case.adapter, case.samples[0], sha.settings)
    assert again.encodings() == sha.encodings()


def test_a_path_without_tensors_is_an_error(recalibrated: Recalibrated) -> None:
    with pytest.raises(UsageError, match=r"`mid_block.nowhere` makes no tensor of the controlnet graph"):
        recalibrated.sha.recalibrate(recalibrated.case.samples, ["mid_block.nowhere"])
