"""AIMET itself reads what we write, and we read what AIMET writes: the same model, the same grids.

AIMET wraps a ControlNet in a module that flattens its outputs, so its names begin with `model.`, and it
has to be told to leave diffusers' sinusoids alone.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from aimet_torch.common import quantsim
from aimet_torch.common.quantsim_config.utils import get_path_for_per_channel_config
from aimet_torch.nn import BaseQuantizationMixin, QuantizationMixin
from aimet_torch.quantsim import QuantizationSimModel
from diffusers.models.embeddings import Timesteps
from static_graphs import Case, shared_case, shared_simulation, simulate, small_controlnet_case, vae_case
from torch import Tensor, nn

from sdconvert.errors import EncodingsError
from sdconvert.io.encodings import read_encodings, write_encodings, write_params
from sdconvert.quantize.files import from_sections, to_sections
from sdconvert.quantize.simulation import Encodings, Simulation

PREFIX = "model."

pytestmark = pytest.mark.filterwarnings("ignore")


class Flat(nn.Module):
    """A ControlNet that returns a tuple of tensors: AIMET's tracer takes nothing else."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor, cond: Tensor) -> tuple[Tensor, ...]:
        _, down, mid = self.model(sample, timestep, encoder_hidden_states=text, controlnet_cond=cond, return_dict=False)
        return (*down, mid)


def aimet_simulation(case: Case) -> tuple[QuantizationSimModel, tuple[Tensor, ...]]:
    QuantizationMixin.ignore(Timesteps)
    inputs = tuple(case.call.values())
    config = get_path_for_per_channel_config()
    sim = QuantizationSimModel(
        Flat(case.adapter.model), inputs, default_output_bw=16, default_param_bw=8, config_file=config, in_place=True
    )
    sim.compute_encodings(lambda model: model(*inputs))
    return sim, inputs


@pytest.fixture(scope="module")
def sim() -> QuantizationSimModel:
    """AIMET's own simulation, with its own ranges; what a test loads into it, the next one overwrites."""
    return aimet_simulation(small_controlnet_case())[0]


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A folder with AIMET's exports, and by parameter what its quantizer does to the weight."""
    folder = tmp_path_factory.mktemp("aimet")
    sim, inputs = aimet_simulation(small_controlnet_case())
    version, quantsim.encoding_version = quantsim.encoding_version, "0.6.1"
    try:
        sim.export(str(folder), "sim", inputs)
        sim.save_encodings_to_json(str(folder), "saved")
    finally:
        quantsim.encoding_version = version
    with torch.no_grad():
        return folder, {name: quantizer(weight) for name, quantizer, weight in quantized_parameters(sim)}


@pytest.fixture(scope="module")
def ours() -> Simulation:
    """Of the same model; what a test loads into it, the next one overwrites."""
    return simulate(small_controlnet_case())


def modules(sim: QuantizationSimModel) -> dict[str, Any]:
    named = sim.model.named_modules()
    return {path.removeprefix(PREFIX): m for path, m in named if isinstance(m, BaseQuantizationMixin)}


def quantized_parameters(sim: QuantizationSimModel) -> list[tuple[str, Any, Tensor]]:
    return [
        (f"{path}.{name}", quantizer, getattr(module, name))
        for path, module in modules(sim).items()
        for name, quantizer in module.param_quantizers.items()
        if quantizer is not None
    ]


def prefixed(sections: dict[str, Any]) -> dict[str, Any]:
    return {name: {PREFIX + key: value for key, value in section.items()} for name, section in sections.items()}


def without_prefix(params: dict[str, Any]) -> dict[str, Any]:
    return {key.removeprefix(PREFIX): value for key, value in params.items()}


def assert_grid(quantizer: Any, entries: list[dict[str, Any]]) -> None:
    assert quantizer.bitwidth == entries[0]["bitwidth"]
    assert quantizer.symmetric == (entries[0]["is_symmetric"] == "True")
    scale = torch.tensor([entry["scale"] for entry in entries])
    torch.testing.assert_close(quantizer.get_scale().detach().flatten(), scale, rtol=1e-6, atol=0)
    if not quantizer.symmetric:
        offset = torch.tensor([float(entry["offset"]) for entry in entries])
        assert torch.equal(quantizer.get_offset().detach().flatten(), offset)


def test_aimet_loads_our_parameter_file(sim: QuantizationSimModel, tmp_path: Path) -> None:
    ours = to_sections(shared_simulation("small_controlnet"))["param_encodings"]
    write_params(tmp_path / "parameters_mha.encodings", prefixed({"": ours})[""])
    sim.load_encodings(tmp_path / "parameters_mha.encodings", strict=True)
    found = {name: quantizer for name, quantizer, _ in quantized_parameters(sim)}
    for name, entries in ours.items():
        assert_grid(found[name], entries)


def test_aimet_loads_our_graph_file(sim: QuantizationSimModel, tmp_path: Path) -> None:
    sections = to_sections(shared_simulation("small_controlnet"))
    write_encodings(tmp_path / "controlnet.encodings", prefixed(sections))
    sim.load_encodings(tmp_path / "controlnet.encodings", strict=True)
    found = modules(sim)
    assert len(sections["activation_encodings"]) > 50
    for path, places in sections["activation_encodings"].items():
        assert_grid(found[path].output_quantizers[0], [places["output"]["0"]])
    for name, entries in sections["param_encodings"].items():
        path, _, parameter = name.rpartition(".")
        assert_grid(found[path].param_quantizers[parameter], entries)


def test_aimet_quantizes_weights_as_we_do_with_our_file(sim: QuantizationSimModel, tmp_path: Path) -> None:
    ours = shared_simulation("small_controlnet")
    write_params(tmp_path / "p.encodings", prefixed({"": ours.encodings().parameters})[""])
    sim.load_encodings(tmp_path / "p.encodings", strict=True)
    with torch.no_grad():
        for name, quantizer, weight in quantized_parameters(sim):
            if name in ours.quantizers.parameters:
                assert torch.equal(quantizer(weight), ours.quantizers.parameters[name](weight)), name


def test_aimet_refuses_our_file_for_another_model(sim: QuantizationSimModel, tmp_path: Path) -> None:
    write_encodings(tmp_path / "x.encodings", prefixed(to_sections(simulate(vae_case()))))
    with pytest.raises(RuntimeError, match="up_blocks"):
        sim.load_encodings(tmp_path / "x.encodings", strict=True)


@pytest.mark.parametrize("name", ["sim_torch.encodings", "saved.json", "sim.encodings"])
def test_we_load_the_parameters_of_every_file_that_aimet_writes(exported: Any, ours: Simulation, name: str) -> None:
    folder, quantized = exported
    params = without_prefix(read_encodings(folder / name)["param_encodings"])
    # AIMET counts the heads that feed nothing, too; biases it leaves alone.
    params = {key: entries for key, entries in params.items() if ".to_rgbs." not in key}
    before = ours.encodings()
    ours.load(Encodings(params, before.activations))
    assert ours.encodings().parameters.keys() == before.parameters.keys()
    state = shared_case("small_controlnet").adapter.model.state_dict()
    with torch.no_grad():
        for key, quantizer in ours.quantizers.parameters.items():
            assert torch.equal(quantizer(state[key]), quantized[key]), key


def test_we_read_the_activations_that_aimet_writes_by_module(exported: Any) -> None:
    folder, _ = exported
    ours = shared_simulation("small_controlnet")
    theirs = without_prefix(read_encodings(folder / "sim_torch.encodings")["activation_encodings"])
    outputs = {path: {"output": places["output"]} for path, places in theirs.items() if "output" in places}
    sections = to_sections(ours) | {"activation_encodings": outputs}
    loaded = from_sections(sections, ours)
    covered = set(to_sections(ours)["activation_encodings"])
    assert outputs.keys() == covered
    assert loaded.activations["conv_in:conv2d.0"] == [theirs["conv_in"]["output"]["0"]]


def test_a_file_of_a_newer_version_says_what_to_do(sim: QuantizationSimModel, tmp_path: Path) -> None:
    inputs = tuple(small_controlnet_case().call.values())
    assert quantsim.encoding_version == "1.0.0"
    sim.export(str(tmp_path), "sim", inputs)
    with pytest.raises(EncodingsError, match="has encoding version 1.0.0") as error:
        read_encodings(tmp_path / "sim.encodings")
    assert "encodings convert" in error.value.hint
