"""An adapter's two forms of a model agree, and the model comes out of the graph form as it went in."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import Attention, AttnProcessor2_0
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from static_graphs import SMALL_UNET, Case, golden_case, shared_case, small_case, vae_case
from torch import Tensor, nn

from sdconvert.adapters import adapter_for, specs
from sdconvert.adapters.controlnet import ControlNetModelAdapter
from sdconvert.errors import UnsupportedModelError, UsageError
from sdconvert.models.attention import ExplicitAttnProcessor

CASES: dict[str, Callable[[], Case]] = {
    "unet": lambda: golden_case("unet"),
    "light_unet": lambda: golden_case("unet", "pasd_light"),
    "controlnet": lambda: golden_case("controlnet"),
    "rrdb_controlnet": lambda: golden_case("controlnet", "pasd_rrdb"),
    "vae_decoder": vae_case,
}


@pytest.fixture(scope="module", params=CASES)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]()


def tensors(answer: Any) -> list[Tensor]:
    """The tensors of a model's answer that the graph gives: a ControlNet's `to_rgbs` are no part of it."""
    if isinstance(answer, Tensor):
        return [answer]
    *_, down, mid = answer if len(answer) == 3 else (None, [], answer[0])
    return [*down, mid]


def test_graph_form_answers_as_the_model(case: Case) -> None:
    outputs = case.adapter.run(case.adapter.pack(case.call))
    expected, found = tensors(case.call_model()), tensors(case.adapter.unpack(outputs))
    assert len(outputs) == len(found)
    for reference, tensor in zip(expected, found, strict=True):
        torch.testing.assert_close(tensor, reference, rtol=0, atol=2e-6 * float(reference.abs().max().clamp(min=1)))


def test_outputs_have_distinct_names_and_float32(case: Case) -> None:
    outputs = specs(case.adapter.run(case.samples[0]))
    assert len({spec.name for spec in outputs}) == len(outputs)
    assert {spec.dtype for spec in outputs} == {"float32"}


def snapshot(model: nn.Module) -> dict[str, Any]:
    """Everything of a model that attaching something to it could change."""
    return {
        "state_dict": {name: (tensor.data_ptr(), tensor.shape) for name, tensor in model.state_dict().items()},
        "modules": [(name, type(module), id(module)) for name, module in model.named_modules()],
        "processors": [id(module.processor) for module in model.modules() if isinstance(module, Attention)],
        "hooks": [(len(m._forward_hooks), len(m._forward_pre_hooks)) for m in model.modules()],
        "attributes": [sorted(vars(module)) for module in model.modules()],
        "training": [module.training for module in model.modules()],
    }


def test_x7_model_is_left_as_it_was(case: Case) -> None:
    before, answer = snapshot(case.adapter.model), tensors(case.call_model())
    with case.adapter.as_graph():
        assert snapshot(case.adapter.model) != before
    assert snapshot(case.adapter.model) == before
    assert all(map(torch.equal, tensors(case.call_model()), answer))


def test_x7_model_is_left_as_it_was_by_a_failure_inside(case: Case) -> None:
    before = snapshot(case.adapter.model)
    with pytest.raises(ZeroDivisionError), case.adapter.as_graph():
        raise ZeroDivisionError
    with pytest.raises(RuntimeError), case.adapter.as_graph() as graph:
        graph(*(tensor[:, 1:] for tensor in case.samples[0].values()))
    assert snapshot(case.adapter.model) == before


def explicit(module: nn.Module) -> bool:
    return isinstance(module, Attention) and isinstance(module.processor, ExplicitAttnProcessor)


def test_attention_is_explicit_inside(case: Case) -> None:
    with case.adapter.as_graph() as graph:
        found = {path for path, module in graph.model.named_modules() if explicit(module)}
    assert found == {layer.path for layer in case.adapter.attention_layers()} != set()


@pytest.mark.parametrize(("variant", "pixel"), [("pasd", "pixel_attentions"), ("pasd_light", "attn2_plus")])
def test_attention_layers_say_heads_and_kind(variant: str, pixel: str) -> None:
    layers = golden_case("unet", variant).adapter.attention_layers()
    assert {layer.heads for layer in layers} == {4}
    for layer in layers:
        name = layer.path.rpartition(".")[2]
        kind = "pixel" if pixel in layer.path and name != "attn1" else {"attn1": "self", "attn2": "cross"}[name]
        assert layer.kind == kind, layer.path
    assert {layer.kind for layer in layers} == {"self", "cross", "pixel"}


def test_attention_layers_have_the_heads_of_their_block() -> None:
    layers = small_case(SMALL_UNET | {"attention_head_dim": [2, 4]}).adapter.attention_layers()
    by_block = {layer.path.split(".pixel")[0].split(".attentions")[0]: layer.heads for layer in layers}
    assert by_block == {"down_blocks.0": 2, "mid_block": 4, "up_blocks.0": 4, "up_blocks.1": 2}


def test_a_decoder_has_its_own_attention_layers_only() -> None:
    case = vae_case()
    assert [layer.path for layer in case.adapter.attention_layers()] == ["decoder.mid_block.attentions.0"]


def test_a_unet_without_a_controlnet_has_three_inputs() -> None:
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(**SMALL_UNET).eval()
    adapter = adapter_for(unet)
    call = {
        "sample": torch.randn(1, 4, 8, 8),
        "timestep": torch.tensor(7),
        "encoder_hidden_states": torch.randn(1, 5, 12),
    }
    inputs = adapter.pack(call)
    assert [(spec.name, spec.shape) for spec in specs(inputs)] == [
        ("sample", (1, 4, 8, 8)),
        ("t_emb", (1, 8)),
        ("encoder_hidden_states", (1, 5, 12)),
    ]
    with torch.no_grad():
        expected = unet(**call, return_dict=False)[0]
    torch.testing.assert_close(adapter.run(inputs)["out_sample"], expected, rtol=0, atol=1e-6)


def test_the_timestep_enters_as_sinusoids() -> None:
    case = golden_case("unet")
    inputs = [case.adapter.pack(case.call | {"timestep": torch.tensor(t)})["t_emb"] for t in (1, 999)]
    model: Any = case.adapter.model
    assert all(torch.equal(inputs[k], model.time_proj(torch.tensor([t]))) for k, t in enumerate((1, 999)))
    answers = [case.adapter.run(case.samples[0] | {"t_emb": t_emb})["out_sample"] for t_emb in inputs]
    assert float((answers[0] - answers[1]).abs().max()) > 1e-3


def test_conditioning_scale_is_a_constant_of_the_graph() -> None:
    case = golden_case("controlnet")
    adapter = ControlNetModelAdapter(case.adapter.model, conditioning_scale=0.5)
    full, half = case.adapter.run(case.samples[0]), adapter.run(case.samples[0])
    for name, tensor in full.items():
        torch.testing.assert_close(half[name], tensor / 2, rtol=1e-5, atol=1e-6)
    adapter.pack(case.call | {"conditioning_scale": 0.5})
    with pytest.raises(UsageError, match="conditioning_scale 1.0 asked of a ControlNet graph made for 0.5"):
        adapter.pack(case.call | {"conditioning_scale": 1.0})


def test_x3_a_model_of_no_family_is_refused() -> None:
    with pytest.raises(UnsupportedModelError, match="no adapter covers Linear; known: AutoencoderKL"):
        adapter_for(nn.Linear(1, 1))


def test_an_argument_that_the_graph_has_no_place_for_is_refused() -> None:
    adapter = shared_case("unet").adapter
    with pytest.raises(UsageError, match="cross_attention_kwargs"):
        adapter.pack({"sample": torch.zeros(1), "cross_attention_kwargs": {"scale": 0.5}})


def test_x4_a_foreign_attention_processor_is_refused_by_name() -> None:
    class DoublingProcessor(AttnProcessor2_0):
        """Inherits from a known one, and so might pass for it."""

        def __call__(self, *args: Any, **kwargs: Any) -> Tensor:
            return 2 * super().__call__(*args, **kwargs)

    model = copy.deepcopy(shared_case("unet").adapter.model)
    model.set_attn_processor(DoublingProcessor())
    with pytest.raises(UnsupportedModelError, match="DoublingProcessor"), adapter_for(model).as_graph():
        pass
