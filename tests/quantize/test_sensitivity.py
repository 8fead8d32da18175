"""Figures of single layers: one layer alone is quantized, runs go on where they stopped, other data begin anew."""

import copy
from pathlib import Path

import pytest
import torch
from static_graphs import Case, module_case
from torch import Tensor, nn

from sdconvert.errors import UsageError
from sdconvert.metrics import sqnr_db, worst_sqnr_db
from sdconvert.quantize.sensitivity import Sensitivity, Workload
from sdconvert.quantize.settings import load_settings


@pytest.fixture
def case() -> Case:
    torch.manual_seed(0)
    return module_case(nn.Sequential(nn.Conv2d(3, 8, 3), nn.SiLU(), nn.Conv2d(8, 4, 1)), 1, 3, 6, 6)


def workload(case: Case, *, picture: bool = True) -> Workload:
    def draw() -> Tensor:
        (output,) = case.adapter.run(case.samples[0]).values()
        return output.clamp(0, 1)

    return Workload(case.adapter, case.samples, load_settings({75}), draw if picture else None)


def test_a_figure_is_one_layer_s_alone(case: Case, tmp_path: Path) -> None:
    sensitivity = Sensitivity(tmp_path / "s.json", "one")
    sensitivity.measure(workload(case), [4, 8], lambda *_: None)
    (found,) = sensitivity.content["graphs"].values()
    assert list(found["layers"]) == ["0.weight", "2.weight"]
    model = case.adapter.model
    for name, layer in found["layers"].items():
        changed = copy.deepcopy(model)
        weight = changed.get_parameter(name)
        rows = weight.detach().flatten(1)
        scale = torch.maximum(rows.amax(1) / 7, -rows.amin(1) / 8).reshape(-1, *[1] * (weight.dim() - 1))
        weight.data = (weight / scale).round().clamp(-8, 7) * scale
        reference = [case.adapter.run(one) for one in case.samples]
        with torch.no_grad():
            values = [{key: changed(one["x"]) for key in reference[0]} for one in case.samples]
        expected = min(map(worst_sqnr_db, reference, values))
        assert layer["output_db"]["4"] == pytest.approx(expected, abs=0.1)
        assert layer["output_db"]["8"] > layer["output_db"]["4"] + 15
        assert layer["picture_db"].keys() == {"4", "8"}
    curve = found["cumulative"]["4"]
    assert curve[-1]["layers"] == 2 and curve[-1]["weights"] == sum(one["weights"] for one in found["layers"].values())
    assert curve[-1]["output_db"] < min(one["output_db"]["4"] for one in found["layers"].values())


def test_a_run_that_was_stopped_goes_on(case: Case, tmp_path: Path) -> None:
    told: list[str] = []

    def stop(done: int, total: int, note: str) -> None:
        told.append(note)
        if len(told) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Sensitivity(tmp_path / "s.json", "one").measure(workload(case), [4, 8], stop)
    half = Sensitivity(tmp_path / "s.json", "one")
    first = copy.deepcopy(half.content)
    half.measure(workload(case), [4, 8], lambda done, total, note: told.append(note))
    assert [note for note in told if "at 4 bits" in note and "layers" not in note][:1] != told[3:4]
    whole = Sensitivity(tmp_path / "w.json", "one")
    whole.measure(workload(case), [4, 8], lambda *_: None)
    assert half.content == whole.content != first
    assert Sensitivity(tmp_path / "s.json", "another").content["graphs"] == {}


def test_pictures_are_optional(case: Case, tmp_path: Path) -> None:
    sensitivity = Sensitivity(tmp_path / "s.json", "one")
    sensitivity.measure(workload(case, picture=False), [8], lambda *_: None)
    (found,) = sensitivity.content["graphs"].values()
    assert all(layer["picture_db"] == {} for layer in found["layers"].values())
    assert found["cumulative"]["8"][-1]["picture_db"] is None
    sensitivity.measure(workload(case), [8], lambda *_: None)  # those asked for later are drawn
    assert all(layer["picture_db"].keys() == {"8"} for layer in found["layers"].values())
    assert all(point["picture_db"] is not None for point in found["cumulative"]["8"])
    with pytest.raises(UsageError, match="no bit-width"):
        sensitivity.measure(workload(case), [], lambda *_: None)


def test_the_picture_s_figure_is_that_of_the_picture(case: Case, tmp_path: Path) -> None:
    one = workload(case)
    sensitivity = Sensitivity(tmp_path / "s.json", "one")
    sensitivity.measure(one, [4], lambda *_: None)
    assert one.picture is not None
    reference = one.picture()
    with one.quantized({"0.weight": 4}, {"0.weight": "conv2d"}):
        value = one.picture()
    (found,) = sensitivity.content["graphs"].values()
    assert found["layers"]["0.weight"]["picture_db"]["4"] == sqnr_db(reference, value)
