"""Only what a unit declares is in memory, and calling anything else is an error; the pictures stay the same."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdconvert.errors import BudgetError, CheckpointError, MissingModelError, ResidencyError
from sdconvert.io.tensors import load_tensors, save_tensors
from sdconvert.pipelines.pasd import PASDPipeline
from sdconvert.pipelines.residency import ModelResidency
from sdconvert.pipelines.unit import Inputs, PipelineUnit

REQUEST: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2, "guidance_scale": 2.0}


class Layer(nn.Module):
    """64 KiB of weights and a buffer that is not saved."""

    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        self.inner = nn.Linear(128, 128, bias=False)
        with torch.no_grad():
            self.inner.weight.copy_(torch.randn(128, 128, generator=torch.Generator().manual_seed(seed)))
        self.register_buffer("offset", torch.full((128,), 0.5), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.inner(x) + self.offset
        return result


BYTES = 128 * 128 * 4
X = torch.linspace(-1, 1, 128)


@pytest.fixture
def layers() -> dict[str, Layer]:
    return {name: Layer(seed) for seed, name in enumerate(("vae", "text_encoder", "unet"))}


@pytest.fixture
def residency(layers: dict[str, Layer], tmp_path: Path) -> ModelResidency:
    made = ModelResidency(folder=tmp_path / "offload")
    made.manage_all(layers)
    return made


@pytest.fixture
def managed(pipe: PASDPipeline, tmp_path: Path) -> Iterator[PASDPipeline]:
    with ModelResidency(folder=tmp_path / "offload") as residency:
        pipe.manage_models(residency)
        yield pipe


def in_memory(**modules: nn.Module) -> set[str]:
    return {name for name, module in modules.items() if not any(one.is_meta for one in module.parameters())}


class Spy:
    """Notes at every call of a component's first layer which components have weights."""

    def __init__(self, pipe: PASDPipeline) -> None:
        self.seen: dict[str, set[frozenset[str]]] = {}
        self._parts = {name: getattr(pipe, name) for name in ("unet", "controlnet", "vae", "text_encoder")}
        self._handles = []
        for name, module in self._parts.items():
            first = next(part for part in module.modules() if any(True for _ in part.parameters(recurse=False)))
            self._handles.append(first.register_forward_hook(lambda *_, name=name: self._note(name)))
        self._handles.append(pipe.vae.post_quant_conv.register_forward_hook(lambda *_: self._note("vae_decoder")))

    def _note(self, name: str) -> None:
        self.seen.setdefault(name, set()).add(frozenset(in_memory(**self._parts)))

    def remove(self) -> None:
        for handle in self._handles:
            handle.remove()


def test_d6_exactly_the_declared_components_are_in_memory(
    pipe: PASDPipeline, managed: PASDPipeline, image: Tensor, tmp_path: Path
) -> None:
    spy = Spy(managed)
    found = managed(image, **REQUEST)
    spy.remove()
    assert spy.seen == {
        "text_encoder": {frozenset({"text_encoder"})},
        "vae": {frozenset({"vae"})},
        "controlnet": {frozenset({"unet", "controlnet"})},
        "unet": {frozenset({"unet", "controlnet"})},
        "vae_decoder": {frozenset({"vae"})},  # the decoder is a part of it: they move together
    }
    assert managed.residency is not None
    managed.residency.restore()
    pipe.residency = None
    assert torch.equal(found, pipe(image, **REQUEST))
    assert not list((tmp_path / "offload").iterdir()), "what was written for offloading is removed"


def test_d6_states_follow_the_loads(residency: ModelResidency, layers: dict[str, Layer]) -> None:
    assert residency.states == dict.fromkeys(layers, "onload")
    residency.load(["vae"])
    assert residency.states == {"vae": "computation", "text_encoder": "offload", "unet": "offload"}
    assert residency.resident == ("vae",)
    assert residency.memory_bytes == BYTES
    residency.load(["unet", "text_encoder"])
    assert residency.states == {"vae": "offload", "text_encoder": "computation", "unet": "computation"}
    assert in_memory(**layers) == {"text_encoder", "unet"}


def test_d6_weights_come_back_bit_for_bit(residency: ModelResidency, layers: dict[str, Layer]) -> None:
    before = copy.deepcopy({name: layer.state_dict() for name, layer in layers.items()})
    trainable = {name: layer.inner.weight.requires_grad for name, layer in layers.items()}
    for names in (["vae"], ["unet"], ["text_encoder"], ["vae", "unet"], []):
        residency.load(names)
    assert in_memory(**layers) == set()
    residency.restore()
    for name, layer in layers.items():
        assert list(layer.state_dict()) == list(before[name])
        assert torch.equal(layer.inner.weight, before[name]["inner.weight"])
        assert layer.inner.weight.requires_grad == trainable[name]
        assert torch.equal(layer(X), nn.functional.linear(X, before[name]["inner.weight"]) + 0.5)


def test_d6_changed_weights_are_kept(residency: ModelResidency, layers: dict[str, Layer]) -> None:
    residency.load(["vae"])
    residency.load([])
    for value in (2.0, 3.0):
        residency.load(["vae"])
        with torch.no_grad():
            layers["vae"].inner.weight.fill_(value)
        residency.load([])
    residency.load(["vae"])
    assert torch.equal(layers["vae"].inner.weight, torch.full((128, 128), 3.0))
    layers["vae"].inner.weight = nn.Parameter(torch.full((128, 128), 4.0))
    residency.load([])
    residency.load(["vae"])
    assert torch.equal(layers["vae"].inner.weight, torch.full((128, 128), 4.0))


@pytest.mark.parametrize("loaded_before", [[], ["vae"], ["text_encoder", "vae"]])
def test_d6_calling_what_is_not_loaded_is_an_error(
    residency: ModelResidency, layers: dict[str, Layer], loaded_before: list[str]
) -> None:
    residency.load(loaded_before)
    with pytest.raises(ResidencyError, match="'unet' is called while it is offloaded") as error:
        layers["unet"](X)
    assert ", ".join(layer for layer in layers if layer in loaded_before) in str(error.value)
    assert "add 'unet' to onload_model_names" in error.value.hint


def test_d6_no_call_before_the_first_load(residency: ModelResidency, layers: dict[str, Layer]) -> None:
    with pytest.raises(ResidencyError, match="'vae' is called while it is onloaded"):
        layers["vae"](X)


class Prying(PipelineUnit):
    """Calls the text encoder, of which its declaration says nothing."""

    def __init__(self, load: bool) -> None:
        super().__init__(input_params=("image",), output_params=("pried",))
        self.load = load

    def process(self, pipe: PASDPipeline, image: Tensor) -> Inputs:
        if self.load:
            pipe.load_models_to_device(("text_encoder",))
        return {"pried": pipe.text_encoder(torch.zeros(1, 4, dtype=torch.long))}


@pytest.mark.parametrize(
    ("load", "message"), [(False, "'text_encoder' is called"), (True, "text_encoder is to be loaded by a unit")]
)
def test_d6_a_unit_that_touches_another_model_is_an_error(
    managed: PASDPipeline, image: Tensor, load: bool, message: str
) -> None:
    """Also directly after the unit that had it loaded."""
    units = list(managed.units)
    after = next(index for index, unit in enumerate(units) if "text_encoder" in unit.onload_model_names) + 1
    managed.units = (*units[:after], Prying(load), *units[after:])
    with pytest.raises(ResidencyError, match=message):
        managed(image, **REQUEST)


def test_d6_a_method_other_than_forward_is_guarded_too(managed: PASDPipeline, no_grad: None) -> None:
    managed.load_models_to_device(("text_encoder",))
    with pytest.raises(ResidencyError, match="'vae'"):
        managed.vae.encode(torch.zeros(1, 3, 32, 32))


def test_d6_an_unknown_name_is_an_error(residency: ModelResidency, managed: PASDPipeline) -> None:
    with pytest.raises(
        ResidencyError, match="no component 'vea' is managed; managed: vae, text_encoder, unet"
    ) as error:
        residency.load(["vea"])
    assert error.value.hint == "did you mean 'vae'?"
    with pytest.raises(MissingModelError, match="no model 'vae_encode'"):
        managed.load_models_to_device(("vae_encode",))


def test_a_failed_load_moves_nothing(residency: ModelResidency, layers: dict[str, Layer]) -> None:
    residency.load(["vae"])
    with pytest.raises(ResidencyError):
        residency.load(["unet", "vea"])
    assert residency.resident == ("vae",)
    assert in_memory(**layers) == {"vae"}
    layers["vae"](X)


def test_a_backend_in_place_of_a_model_moves_nothing(managed: PASDPipeline) -> None:
    managed.unet = lambda *args, **kwargs: None
    managed.load_models_to_device(("unet", "controlnet"))
    assert managed.residency is not None
    assert managed.residency.resident == ("controlnet",)


def test_memory_limit_keeps_what_was_called_last(layers: dict[str, Layer], tmp_path: Path) -> None:
    residency = ModelResidency(folder=tmp_path, memory_limit=2 * BYTES)
    residency.manage_all(layers)
    for name in ("vae", "text_encoder", "unet"):
        residency.load([name])
        assert residency.memory_bytes <= 2 * BYTES
    assert residency.states == {"vae": "offload", "text_encoder": "onload", "unet": "computation"}
    with pytest.raises(ResidencyError, match="'text_encoder' is called while it is onloaded"):
        layers["text_encoder"](X)


def test_a_limit_below_what_is_called_together_is_refused_before_any_work(
    layers: dict[str, Layer], tmp_path: Path
) -> None:
    residency = ModelResidency(folder=tmp_path, memory_limit=2 * BYTES - 1)
    residency.manage_all(layers)
    with pytest.raises(BudgetError, match=f"need {2 * BYTES} bytes .unet {BYTES}, vae {BYTES}.; the limit is") as error:
        residency.require_fit(["unet", "vae"])
    assert f"at least {2 * BYTES}" in error.value.hint
    residency.load(["unet"])
    with pytest.raises(BudgetError):
        residency.load(["unet", "vae"])
    assert residency.resident == ("unet",)


def test_a_model_on_meta_is_read_from_its_file_when_needed(tmp_path: Path) -> None:
    file = tmp_path / "model.safetensors"
    save_tensors({"inner.weight": torch.full((128, 128), 0.25)}, file)
    content = file.read_bytes()
    model = Layer()
    model.inner.to("meta")
    residency = ModelResidency(folder=tmp_path / "offload")
    residency.manage("unet", model, weights=file)
    assert residency.states == {"unet": "offload"}
    residency.load(["unet"])
    assert torch.equal(model(X), nn.functional.linear(X, torch.full((128, 128), 0.25)) + 0.5)
    with torch.no_grad():
        model.inner.weight.fill_(1.0)
    residency.load([])
    residency.load(["unet"])
    assert torch.equal(model.inner.weight, torch.ones(128, 128)), "a change is kept, in a file of its own"
    assert file.read_bytes() == content, "the user's file is never written"
    residency.restore()
    assert file.is_file()


def test_tied_weights_stay_tied(tmp_path: Path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(8, 8), "b": nn.Linear(8, 8)})
    model["b"].weight = model["a"].weight
    residency = ModelResidency(folder=tmp_path)
    residency.manage("tied", model)
    residency.load([])
    assert load_tensors(tmp_path / "tied.safetensors").keys() == {"a.weight", "a.bias", "b.bias"}
    residency.load(["tied"])
    assert model["a"].weight is model["b"].weight


def test_what_contains_one_another_moves_together(tmp_path: Path) -> None:
    inner = Layer()
    outer = nn.Sequential(inner)
    for order in (("inner", "outer"), ("outer", "inner")):
        residency = ModelResidency(folder=tmp_path)
        for name in order:
            residency.manage(name, {"inner": inner, "outer": outer}[name])
        residency.load(["inner"])
        assert residency.states == dict.fromkeys(order, "computation")
        residency.load([])
        with pytest.raises(ResidencyError, match="is called while it is offloaded"):
            outer(X)
        residency.restore()
        outer(X)


def test_what_shares_only_a_part_is_refused(tmp_path: Path) -> None:
    shared = nn.Linear(4, 4)
    residency = ModelResidency(folder=tmp_path)
    residency.manage("one", nn.Sequential(shared, nn.Linear(4, 4)))
    with pytest.raises(ResidencyError, match="'one' and 'two' share some of their weights"):
        residency.manage("two", nn.Sequential(shared, nn.Linear(4, 4)))


def test_a_file_of_another_model_is_refused(tmp_path: Path) -> None:
    save_tensors({"inner.weight": torch.zeros(64, 128), "more": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ResidencyError, match="does not fit 'unet': they differ in inner.weight, more"):
        ModelResidency(folder=tmp_path).manage("unet", Layer(), weights=tmp_path / "other.safetensors")


def test_a_model_without_data_and_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ResidencyError, match="'unet' has no data and no file"):
        ModelResidency(folder=tmp_path).manage("unet", Layer().to("meta"))


def test_a_name_is_managed_once(residency: ModelResidency) -> None:
    with pytest.raises(ResidencyError, match="'vae' is managed already"):
        residency.manage("vae", Layer())


def test_an_offload_file_that_is_gone_is_an_error_that_names_it(
    residency: ModelResidency, layers: dict[str, Layer], tmp_path: Path
) -> None:
    residency.load([])
    (tmp_path / "offload" / "vae.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"vae\.safetensors` does not exist"):
        residency.load(["vae"])


@pytest.mark.parametrize(
    ("options", "message"),
    [({"offload": "cpu"}, "cannot be offloaded to cpu, where they compute"), ({}, "to disk needs a folder")],
)
def test_an_offload_without_effect_or_place_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ResidencyError, match=message):
        ModelResidency("cpu", **options)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to offload from")
def test_beside_a_gpu_models_wait_in_host_memory(layers: dict[str, Layer]) -> None:
    residency = ModelResidency("cuda")
    residency.manage_all(layers)
    residency.load(["vae"])
    assert layers["vae"].inner.weight.is_cuda
    residency.load(["unet"])
    assert layers["vae"].inner.weight.device.type == "cpu"
    assert residency.states == {"vae": "offload", "text_encoder": "offload", "unet": "computation"}
