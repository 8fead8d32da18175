"""Quantized graphs of the families that read text: tables, masks, and what their tensors are called."""

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
from model_families import CLIP, Family, clip, pixart, samples, shared_family
from static_graphs import Case, simulate
from torch.fx import GraphModule
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from sdconvert.adapters import adapter_for
from sdconvert.adapters.loading import load_model
from sdconvert.assets import asset_path
from sdconvert.errors import UsageError
from sdconvert.metrics import worst_sqnr_db
from sdconvert.models.attention import SHAAttentionPatch
from sdconvert.pipelines.prompt_units import tokenize
from sdconvert.quantize import graph
from sdconvert.quantize.files import from_sections, to_sections
from sdconvert.quantize.grid import fake_quantized
from sdconvert.quantize.simulation import Simulation

NAMES = ("clip", "sdxl_clip_with_projection", "pixart")
MASKED = {"clip": "encoder.layers.0.self_attn", "pixart": "transformer_blocks.1.attn2"}


@cache
def shared_family_simulation(name: str) -> Simulation:
    """The simulation of a shared family; whoever changes it makes another."""
    made = shared_family(name)
    return simulate(Case(made.adapter, made.call, samples(made)))


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    given: str = request.param
    return given


@cache
def shared_family_trace(name: str) -> GraphModule:
    """The traced graph of a shared family, for who only reads it."""
    made = shared_family(name)
    return graph.trace(made.adapter, made.adapter.pack(made.call))


def made_by(path: str, traced: GraphModule) -> list[str]:
    """Positions of the tensors that a module makes in the traced graph, second operands left out."""
    keys = [value.key.partition(":") for value in graph.values(traced)]
    return [position for module, _, position in keys if module == path]


def test_a_range_for_every_tensor_and_every_parameter_of_the_graph(name: str) -> None:
    encodings, model = shared_family_simulation(name).encodings(), shared_family(name).adapter.model
    assert encodings.parameters.keys() == {key for key, _ in model.named_parameters() if not key.endswith("bias")}
    tables = {key for key in encodings.parameters if "embedding.weight" in key or key.endswith("scale_shift_table")}
    assert len(tables) == (4 if name == "pixart" else 2)
    for (entry,) in map(encodings.parameters.__getitem__, tables):
        assert (entry["bitwidth"], entry["is_symmetric"]) == (16, "False")


def test_files_hold_all_ranges(name: str) -> None:
    simulation = shared_family_simulation(name)
    assert from_sections(to_sections(simulation), simulation) == simulation.encodings()


def test_the_file_s_weights_are_those_of_the_simulation(name: str) -> None:
    made, simulation = shared_family(name), shared_family_simulation(name)
    inputs = made.adapter.pack(made.call)
    with fake_quantized(made.adapter.model, simulation.encodings().parameters):
        weights_only = made.adapter.run(inputs)
    assert worst_sqnr_db(weights_only, simulation(inputs)) >= 38
    assert worst_sqnr_db(made.adapter.run(inputs), weights_only) < 60


@pytest.mark.parametrize("family", MASKED)
def test_a_mask_makes_one_more_tensor_between_product_and_softmax(family: str) -> None:
    positions = made_by(MASKED[family], shared_family_trace(family))
    mask = ["constant.0"] if family == "clip" else []
    assert positions == ["mul.0", "matmul.0", *mask, "add.0", "softmax.0", "matmul.1"]


def test_masked_sums_are_those_behind_a_product_and_before_a_softmax() -> None:
    found = graph.masked_scores(shared_family_trace("pixart"))
    layers = [f"transformer_blocks.{k}.attn2" for k in range(3)]
    assert found == {f"{layer}:add.0": f"{layer}:matmul.0" for layer in layers}


@pytest.mark.parametrize(
    ("make", "path", "heads", "masked"),
    [
        (lambda: pixart(num_layers=1), "transformer_blocks.0.attn2", 4, True),
        (lambda: pixart(num_layers=1), "transformer_blocks.0.attn1", 4, False),
        (clip, "encoder.layers.0.self_attn", 3, True),
    ],
)
def test_masked_attention_per_head_has_one_sum_per_head(
    make: Callable[[], Family], path: str, heads: int, masked: bool
) -> None:
    made = make()
    SHAAttentionPatch.wrap_model("sha", made.adapter.model).fuse()
    positions = made_by(path, graph.trace(made.adapter, made.adapter.pack(made.call)))
    if make is clip:
        # All heads of all layers share the causal mask.
        positions.remove("constant.0")
    expected = []
    for head in range(heads):
        mask = [f"add.{head}"] if masked else []
        expected += [f"mul.{head}", f"matmul.{2 * head}", *mask, f"softmax.{head}", f"matmul.{2 * head + 1}"]
    assert positions == [*expected, "cat.0"]


@pytest.mark.parametrize("family", MASKED)
def test_a_masked_sum_has_a_range_for_scores_and_not_for_the_mask(family: str) -> None:
    found = shared_family_simulation(family).encodings().activations
    (masked,), (scores,) = (found[f"{MASKED[family]}:{position}"] for position in ("add.0", "matmul.0"))
    assert masked["min"] < scores["min"] - 20
    assert masked["max"] - masked["min"] < scores["max"] - scores["min"] + 20 * 1.25 + 0.1


def test_a_mask_that_calibration_never_showed_hides_all_the_same() -> None:
    made = pixart(num_layers=2)
    hiding = made.adapter.pack(made.call)
    showing = [one | {"encoder_attention_mask": torch.zeros(1, 1, 9)} for one in samples(made)]
    simulation = simulate(Case(made.adapter, made.call, showing))
    (entry,) = simulation.encodings().activations[":encoder_attention_mask"]
    assert entry["min"] == pytest.approx(-100, rel=1e-3)
    expected = made.adapter.run(hiding)
    assert worst_sqnr_db(expected, simulation(hiding)) >= 35
    assert worst_sqnr_db(expected, simulation(showing[0])) < 35
    other = hiding | {"encoder_hidden_states": hiding["encoder_hidden_states"].clone()}
    other["encoder_hidden_states"][:, 6:] += 1
    assert torch.equal(simulation(other)["sample"], simulation(hiding)["sample"])


@pytest.mark.parametrize("family", MASKED)
def test_layer_figures_of_masked_sums_are_those_of_what_can_be_seen(family: str) -> None:
    figures = shared_family_simulation(family).layer_sqnr_db(samples(shared_family(family))[0])
    assert all(figure > 25 for figure in figures.values())


def test_a_trained_text_encoder_keeps_prompts_that_calibration_never_saw() -> None:
    folder = asset_path("pasd_tiny")
    adapter = adapter_for(load_model(folder / "text_encoder"))
    tokenizer = CLIPTokenizer.from_pretrained(folder / "tokenizer")

    def inputs(*prompts: str) -> list[dict[str, torch.Tensor]]:
        return [adapter.pack({"input_ids": tokenize(tokenizer, prompt, 77).input_ids}) for prompt in prompts]

    simulation = simulate(
        Case(adapter, {}, inputs("a photo of a cat", "clean, high-resolution, 8k", "", "blurry, noise"))
    )
    for held_out in inputs("a street with trees", "dirty, unclear", "good photo of a house"):
        assert worst_sqnr_db(adapter.run(held_out), simulation(held_out)) >= 45


def test_a_causal_text_does_not_look_ahead() -> None:
    simulation, inputs = shared_family_simulation("clip"), samples(shared_family("clip"))[0]
    other = {"input_ids": inputs["input_ids"].clone()}
    other["input_ids"][:, 40:] = 7
    before, after = simulation(inputs)["last_hidden_state"], simulation(other)["last_hidden_state"]
    assert torch.equal(before[:, :40], after[:, :40])
    assert not torch.equal(before[:, 40:], after[:, 40:])


def test_a_shorter_text_takes_the_first_positions() -> None:
    made = clip(num_hidden_layers=1)
    inputs = {"input_ids": made.call["input_ids"][:, :20].to(torch.int32)}
    traced = graph.trace(made.adapter, inputs)
    assert torch.allclose(traced(*inputs.values())[0], made.adapter.run(inputs)["last_hidden_state"], atol=1e-5)
    (table,) = (one for one in graph.parameters(traced) if "position" in one.name)
    assert (table.name, table.op) == ("embeddings.position_embedding.weight", "add")


def test_pixart_on_another_size_than_its_own_has_constant_positions() -> None:
    made = pixart(num_layers=1)
    inputs = made.adapter.pack(made.call) | {"hidden_states": torch.randn(1, 4, 8, 16)}
    traced = graph.trace(made.adapter, inputs)
    assert torch.allclose(traced(*inputs.values())[0], made.adapter.run(inputs)["sample"], atol=1e-5)
    assert [value.key for value in graph.values(traced) if value.op == "constant"] == ["pos_embed:constant.0"]


@pytest.mark.parametrize("eos", [2, 999])
def test_the_end_of_a_text_is_found_as_transformers_finds_it(eos: int) -> None:
    """Old configs have 2 for whatever it is; padding with the end token repeats it."""
    made = shared_family("sdxl_clip_with_projection")
    model: Any = made.adapter.model
    adapter = adapter_for(type(model)(CLIPTextConfig(**CLIP | {"eos_token_id": eos})).eval())
    for end in (1, 30, 76):
        ids = torch.randint(3, 900, (1, 77))
        ids[0, end:] = 999
        call = {"input_ids": ids, "output_hidden_states": True}
        with torch.no_grad():
            expected = adapter.model(**call)
        packed = adapter.pack(call)
        assert packed["eos_position"].tolist() == [end]
        answer = adapter.unpack(adapter.run(packed))
        torch.testing.assert_close(answer.text_embeds, expected.text_embeds, rtol=0, atol=1e-5)
        torch.testing.assert_close(answer.hidden_states[-2], expected.hidden_states[-2], rtol=0, atol=1e-5)


def test_a_text_without_an_end_is_refused() -> None:
    adapter = shared_family("sdxl_clip_with_projection").adapter
    with pytest.raises(UsageError, match="no token is the end of the text, 999"):
        adapter.pack({"input_ids": torch.ones(1, 77, dtype=torch.int64), "output_hidden_states": True})


@pytest.mark.parametrize(("family", "asked"), [("clip", True), ("sdxl_clip", False), ("sdxl_clip", None)])
def test_an_output_that_the_graph_lacks_is_refused(family: str, asked: bool | None) -> None:
    call = shared_family(family).call | {"output_hidden_states": asked}
    with pytest.raises(UsageError, match="output_hidden_states=.* asked of a graph whose output is"):
        shared_family(family).adapter.pack(call)


def test_the_last_layer_is_no_part_of_the_graph_of_the_last_but_one() -> None:
    adapter = shared_family("sdxl_clip").adapter
    assert [layer.path for layer in adapter.attention_layers()] == [f"encoder.layers.{k}.self_attn" for k in (0, 1)]
    assert isinstance(adapter.model, CLIPTextModel)
    traced = graph.trace(adapter, adapter.pack(shared_family("sdxl_clip").call))
    assert not any("layers.2" in one.name or "final" in one.name for one in graph.parameters(traced))


@pytest.mark.parametrize("hidden", [-10000.0, -100.0])
def test_a_bias_of_diffusers_hides_as_the_graph_s_own(hidden: float) -> None:
    made = shared_family("pixart")
    bias = (1 - made.call["encoder_attention_mask"][:, None].float()) * hidden
    packed = made.adapter.pack(made.call | {"encoder_attention_mask": bias})["encoder_attention_mask"]
    assert torch.equal(packed, made.adapter.pack(made.call)["encoder_attention_mask"])
    assert sorted(set(packed.flatten().tolist())) == [-100, 0]
