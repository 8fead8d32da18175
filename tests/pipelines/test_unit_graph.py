"""What the declarations say about a pipeline: who hands what to whom, and what can run ahead of which model (D8)."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from sdconvert.errors import UnitError
from sdconvert.pipelines.graph import Edge, PipelineUnitGraph
from sdconvert.pipelines.pasd import PASDPipeline
from sdconvert.pipelines.unit import PipelineUnit, PipelineUnitRunner

PICTURE = ["ShapeChecker", "ImagePreprocessor"]
NOISE = ["ControlImageEncoder", "NoiseInitializer"]


def names(units: tuple[PipelineUnit, ...]) -> list[str]:
    return [unit.name for unit in units]


@pytest.mark.parametrize(
    ("models", "ahead", "with_the_models"),
    [
        (
            ["unet"],
            [*PICTURE, "PromptEmbedder", *NOISE, "LatentsInitializer"],
            ["DenoisingLoop", "Decoder", "ColorFix"],
        ),
        (
            ["unet", "controlnet"],
            [*PICTURE, "PromptEmbedder", *NOISE, "LatentsInitializer"],
            ["DenoisingLoop", "Decoder", "ColorFix"],
        ),
        (
            ["text_encoder"],
            [*PICTURE, *NOISE, "LatentsInitializer"],
            ["PromptEmbedder", "DenoisingLoop", "Decoder", "ColorFix"],
        ),
        (
            ["vae_encoder"],
            [*PICTURE, "PromptEmbedder", *NOISE],
            ["LatentsInitializer", "DenoisingLoop", "Decoder", "ColorFix"],
        ),
        (
            ["text_encoder", "vae_encoder"],
            [*PICTURE, *NOISE],
            ["PromptEmbedder", "LatentsInitializer", "DenoisingLoop", "Decoder", "ColorFix"],
        ),
        (
            ["vae_decoder"],
            [*PICTURE, "PromptEmbedder", *NOISE, "LatentsInitializer", "DenoisingLoop"],
            ["Decoder", "ColorFix"],
        ),
    ],
)
def test_d8_the_units_of_pasd_are_split_as_this_table_says(
    models: list[str], ahead: list[str], with_the_models: list[str]
) -> None:
    first, second = PipelineUnitGraph(PASDPipeline.declared_units()).split_pipeline_units(models)
    assert (names(first), names(second)) == (ahead, with_the_models)


def test_d8_what_runs_ahead_leaves_the_unet_its_inputs_bit_for_bit(
    pipe: PASDPipeline, image: Tensor, no_grad: None
) -> None:
    seen: list[list[tuple[Any, ...]]] = [[], []]

    class Recorder:
        def __init__(self, run: int) -> None:
            self.run = run

        def record(self, component: str, inputs: dict[str, Any], **place: Any) -> None:
            seen[self.run].append((component, inputs, place))

    settings: dict[str, Any] = {"prompt": "a cat", "num_inference_steps": 2, "guidance_scale": 2.0, "latent_tile": 8}
    picture = pipe(image, **settings, observer=Recorder(0))
    first, second = PipelineUnitGraph(pipe.all_units).split_pipeline_units(("unet", "controlnet"))
    unet, controlnet, vae_decoder = pipe.unet, pipe.controlnet, pipe.vae_decoder
    pipe.unet = pipe.controlnet = pipe.vae_decoder = None
    shared, posi, nega = pipe.inputs(image, **settings)
    prepared = pipe.run_units(first, {**shared, "observer": Recorder(1)}, posi, nega)
    pipe.unet, pipe.controlnet, pipe.vae_decoder = unet, controlnet, vae_decoder
    pipe.text_encoder = pipe.tokenizer = pipe.vae_encoder = None
    shared, *_ = pipe.run_units(second, *prepared)
    assert torch.equal(shared["output_image"][0], picture)
    # Both sides of the text, steps x sides x tiles x models, and the tiles of encoder and decoder.
    assert len(seen[0]) == len(seen[1]) == 2 + 2 * 2 * 2 * 2 + 2 + 2
    for (component, inputs, place), (other, others, elsewhere) in zip(*seen, strict=True):
        assert (component, place, list(inputs)) == (other, elsewhere, list(others))
        for value, twin in zip(flat(inputs), flat(others), strict=True):
            assert torch.equal(value, twin)


def flat(inputs: dict[str, Any]) -> list[Tensor]:
    values = [*inputs.values()]
    return [
        torch.as_tensor(one) for value in values for one in (value if isinstance(value, (list, tuple)) else [value])
    ]


def test_d8_a_model_that_no_unit_calls_is_refused() -> None:
    with pytest.raises(UnitError, match=r"no unit calls the model 'unett'.*\n.*`unet`"):
        PipelineUnitGraph(PASDPipeline.declared_units()).split_pipeline_units(["unett"])


class Numbers(PipelineUnit):
    """Adds up what it reads, with a number of its own, and writes that under several keys."""

    def __init__(self, number: int, reads: set[str], writes: set[str], model: str) -> None:
        self.number = number
        super().__init__(
            input_params=sorted(reads), output_params=sorted(writes), onload_model_names=(model,) if model else ()
        )

    def process(self, pipe: Any, **inputs: int) -> dict[str, int]:
        total = self.number + sum((index + 2) * (value or 0) for index, value in enumerate(inputs.values()))
        return {key: total * (index + 1) for index, key in enumerate(self.output_params)}


keys = st.sets(st.sampled_from("abcde"), max_size=3)
random_units = st.lists(st.tuples(keys, keys.filter(bool), st.sampled_from(["", "", "x", "y"])), min_size=1, max_size=7)


@given(random_units)
def test_d8_any_units_give_the_same_when_split(drawn: list[tuple[set[str], set[str], str]]) -> None:
    units = [Numbers(3**index, *one) for index, one in enumerate(drawn)]
    graph = PipelineUnitGraph(units)

    class Pipe:
        all_units = units

    def run(order: list[PipelineUnit]) -> dict[str, Any]:
        shared: dict[str, Any] = {"a": 1}
        for unit in order:
            shared, *_ = PipelineUnitRunner()(unit, Pipe(), shared, {}, {})
        return shared

    for models in ([], *([name] for name in graph.model_names), list(graph.model_names)):
        ahead, later = graph.split_pipeline_units(models)
        assert not any(set(unit.onload_model_names) & set(models) for unit in ahead)
        assert run([*ahead, *later]) == run(units)
    assert [unit for phase in graph.phases() for unit in phase] == units
    assert all(len({unit.onload_model_names for unit in phase} - {()}) <= 1 for phase in graph.phases())


def test_d8_a_unit_is_held_back_for_each_of_three_reasons() -> None:
    def split(*units: PipelineUnit) -> list[int]:
        _, later = PipelineUnitGraph(units).split_pipeline_units(["m"])
        return [unit.number for unit in later if isinstance(unit, Numbers)]

    uses = Numbers(0, {"a"}, {"b"}, "m")
    assert split(uses, Numbers(1, {"c"}, {"d"}, "")) == [0]
    assert split(uses, Numbers(1, {"b"}, {"d"}, "")) == [0, 1]  # reads what it writes
    assert split(uses, Numbers(1, {"c"}, {"a"}, "")) == [0, 1]  # writes what it reads
    assert split(uses, Numbers(1, {"c"}, {"b"}, "")) == [0, 1]  # writes what it writes
    assert split(uses, Numbers(1, {"b"}, {"d"}, ""), Numbers(2, {"d"}, {"e"}, "")) == [0, 1, 2]


def test_edges_name_the_last_writer_and_the_caller() -> None:
    edges = PipelineUnitGraph(PASDPipeline.declared_units()).edges
    assert Edge("", "image", "ShapeChecker") in edges
    assert Edge("LatentsInitializer", "latents", "DenoisingLoop") in edges
    assert Edge("DenoisingLoop", "latents", "Decoder") in edges
    assert Edge("PromptEmbedder", "prompt_embeds", "DenoisingLoop") in edges


def test_phases_of_pasd_load_every_model_once() -> None:
    graph = PipelineUnitGraph(PASDPipeline.declared_units())
    assert [names(phase) for phase in graph.phases()] == [
        [*PICTURE, "PromptEmbedder", *NOISE],
        ["LatentsInitializer"],
        ["DenoisingLoop"],
        ["Decoder", "ColorFix"],
    ]


def test_the_graph_of_an_instance_is_that_of_its_class(pipe: PASDPipeline) -> None:
    described: Callable[[Any], list[Any]] = lambda units: [  # noqa: E731
        (unit.name, unit.reads, unit.writes, unit.onload_model_names) for unit in units
    ]
    assert described(pipe.all_units) == described(PASDPipeline.declared_units())
