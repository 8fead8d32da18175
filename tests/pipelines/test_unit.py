"""The runner's three modes, and that it refuses what a unit did not declare (D1 to D5 of the pipelines' checks)."""

from types import SimpleNamespace
from typing import Any

import pytest

from sdconvert.errors import MissingModelError, UnitError
from sdconvert.pipelines.base import BasePipeline
from sdconvert.pipelines.unit import PipelineUnit, PipelineUnitRunner

run = PipelineUnitRunner()


class Noise(PipelineUnit):
    """Direct."""

    def __init__(self) -> None:
        super().__init__(input_params=("height", "width", "seed"), output_params=("noise",))

    def process(self, pipe: Any, height: int, width: int, seed: int = 7) -> dict[str, Any]:
        return {"noise": (height, width, seed)}


class Prompt(PipelineUnit):
    """Separate CFG, declared in DiffSynth-Studio's spelling."""

    def __init__(self) -> None:
        super().__init__(
            seperate_cfg=True,
            input_params_posi={"prompt": "prompt"},
            input_params_nega={"prompt": "negative_prompt"},
            input_params=("edit_image",),
            output_params=("prompt_emb",),
        )
        self.seen: list[str] = []

    def process(self, pipe: Any, prompt: str, edit_image: Any = None) -> dict[str, Any]:
        self.seen.append(prompt)
        return {"prompt_emb": (prompt.upper(), edit_image)}


class Entity(PipelineUnit):
    """Take-over; what it does is chosen by the test."""

    def __init__(self, work: Any) -> None:
        super().__init__(take_over=True, input_params=("entities",), output_params=("masks",))
        self.work = work

    def process(self, pipe: Any, inputs_shared: Any, inputs_posi: Any, inputs_nega: Any) -> Any:
        return self.work(inputs_shared, inputs_posi, inputs_nega)


class Returns(PipelineUnit):
    """Direct; returns what the test chooses."""

    def __init__(self, outputs: Any, output_params: tuple[str, ...] = ("a",)) -> None:
        self.outputs = outputs
        super().__init__(input_params=("trigger",), output_params=output_params)

    def process(self, pipe: Any, trigger: Any = None) -> Any:
        return self.outputs


def pipe_of(*units: PipelineUnit) -> Any:
    return SimpleNamespace(all_units=units)


def test_d1_direct_separate_and_take_over_work_together() -> None:
    def work(shared: Any, posi: Any, nega: Any) -> Any:
        posi["masks"] = shared.pop("entities")
        return shared, posi, nega

    units = Noise(), Prompt(), Entity(work)
    inputs: Any = (
        {"height": 2, "width": 3, "cfg_scale": 4.0, "entities": 9},
        {"prompt": "yes"},
        {"negative_prompt": "no"},
    )
    before = [dict(part) for part in inputs]
    result = inputs
    for unit in units:
        result = run(unit, pipe_of(*units), *result)
    assert result == (
        {"height": 2, "width": 3, "cfg_scale": 4.0, "noise": (2, 3, 7)},
        {"prompt": "yes", "prompt_emb": ("YES", None), "masks": 9},
        {"negative_prompt": "no", "prompt_emb": ("NO", None)},
    )
    assert list(inputs) == before


def test_d2_a_missing_input_takes_the_default_of_process() -> None:
    shared, *_ = run(Noise(), pipe_of(Noise()), {"height": 1, "width": 1}, {}, {})
    assert shared["noise"] == (1, 1, 7)


def test_d2_an_input_swallowed_by_kwargs_is_none_when_absent() -> None:
    class Sink(PipelineUnit):
        def __init__(self) -> None:
            super().__init__(input_params=("x",), output_params=("y",))

        def process(self, pipe: Any, **inputs: Any) -> dict[str, Any]:
            return {"y": inputs}

    shared, *_ = run(Sink(), pipe_of(Sink()), {}, {}, {})
    assert shared["y"] == {"x": None}


def test_d2_a_required_input_that_is_absent_names_the_unit_and_its_producer() -> None:
    producer = Returns({"height": 1}, ("height",))
    with pytest.raises(UnitError, match=r"Noise needs 'height'.*\n.*Returns should have produced it"):
        run(Noise(), pipe_of(Noise(), producer), {"width": 1}, {}, {})
    with pytest.raises(UnitError, match=r"Noise needs 'width'.*\n.*the caller must give it"):
        run(Noise(), pipe_of(Noise(), producer), {"height": 1}, {}, {})


@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ({"a": 1, "b": 2}, r"returned \['b'\], which it does not declare"),
        ({}, r"declares \['a'\] as outputs, but did not return"),
        (None, "must return a dictionary; it returned None"),
        ((1,), "must return a dictionary; it returned tuple"),
    ],
)
def test_d2_outputs_are_those_declared(outputs: Any, message: str) -> None:
    with pytest.raises(UnitError, match=message):
        run(Returns(outputs), pipe_of(), {"trigger": 1}, {}, {})


@pytest.mark.parametrize("shared", [{}, {"trigger": None}])
def test_d2_a_unit_that_was_not_triggered_may_add_nothing(shared: dict[str, Any]) -> None:
    assert run(Returns({}), pipe_of(), shared, {}, {}) == (shared, {}, {})
    with pytest.raises(UnitError, match=r"declares \['b'\]"):  # but not a part
        run(Returns({"a": 1}, ("a", "b")), pipe_of(), shared, {}, {})


@pytest.mark.parametrize(("cfg_scale", "sides"), [(1.0, ["yes"]), (1, ["yes"]), (2.0, ["yes", "no"])])
def test_d3_the_negative_side_runs_only_with_guidance(cfg_scale: float, sides: list[str]) -> None:
    unit = Prompt()
    _, posi, nega = run(unit, pipe_of(unit), {"cfg_scale": cfg_scale}, {"prompt": "yes"}, {"negative_prompt": "no"})
    assert unit.seen == sides
    assert "prompt_emb" in posi
    assert ("prompt_emb" in nega) == (len(sides) == 2)


def test_d3_an_absent_cfg_scale_is_an_error_at_the_first_unit() -> None:
    units = Returns({"a": 1}), Prompt()
    with pytest.raises(UnitError, match=r"Prompt runs once per side.*no 'cfg_scale'"):
        run(units[0], pipe_of(*units), {}, {"prompt": ""}, {"negative_prompt": ""})


def test_d4_a_key_that_is_shared_and_of_a_side_names_both_writers() -> None:
    unit = Returns({"prompt_emb": 1}, ("prompt_emb",))
    prompt = Prompt()
    pipe = pipe_of(prompt, unit)
    inputs = run(prompt, pipe, {"cfg_scale": 2.0}, {"prompt": "yes"}, {"negative_prompt": "no"})
    with pytest.raises(UnitError, match=r"'prompt_emb' is both.*positive.*written by Prompt and by Returns"):
        run(unit, pipe, *inputs)
    with pytest.raises(UnitError, match=r"'a' is both.*negative.*written by the caller and by Returns"):
        run(Returns({"a": 1}), pipe_of(Returns({"a": 1})), {}, {}, {"a": 2})


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda shared, posi, nega: None, "three dictionaries; it returned None"),
        (lambda shared, posi, nega: (shared, posi), "three dictionaries; it returned tuple"),
        (lambda shared, posi, nega: ({}, posi, nega), r"dropped \['height'\]"),
        (lambda shared, posi, nega: (shared, {"extra": 1}, nega), r"returned \['extra'\]"),
    ],
)
def test_d4_take_over_returns_three_dictionaries_with_the_undeclared_keys(work: Any, message: str) -> None:
    with pytest.raises(UnitError, match=message):
        run(Entity(work), pipe_of(), {"height": 1, "entities": 2}, {}, {})


def test_d4_a_take_over_unit_that_drops_keys_in_place_is_found_out() -> None:
    def work(shared: Any, posi: Any, nega: Any) -> Any:
        del shared["height"]
        return shared, posi, nega

    with pytest.raises(UnitError, match=r"dropped \['height'\]"):
        run(Entity(work), pipe_of(), {"height": 1}, {}, {})


@pytest.mark.parametrize(
    ("declaration", "message"),
    [
        ({"take_over": True, "separate_cfg": True}, "both take_over and separate_cfg"),
        ({"input_params_posi": {"trigger": "p"}}, "only a separate-CFG unit reads"),
        ({"separate_cfg": True, "input_params_posi": {"trigger": "p"}}, "on the positive side"),
        ({"input_params": ("triger",)}, r"declares \['triger'\], but its process\(\) takes"),
    ],
)
def test_a_declaration_that_contradicts_itself_is_refused(declaration: dict[str, Any], message: str) -> None:
    class Unit(PipelineUnit):
        def process(self, pipe: Any, trigger: Any = None) -> dict[str, Any]:
            return {}

    with pytest.raises(UnitError, match=message):
        Unit(**declaration)


class Optional(PipelineUnit):
    """Works only when it is asked to."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            input_params=("size", "control"),
            output_params=("features",),
            onload_model_names=("adapter",),
            trigger_params=("control",),
            **options,
        )

    def process(self, pipe: Any, size: int, control: Any) -> dict[str, Any]:
        return {"features": (size, control)}


@pytest.mark.parametrize("shared", [{}, {"control": None}, {"size": 2, "control": None}])
def test_d5_a_unit_is_skipped_while_its_trigger_has_no_value(shared: dict[str, Any]) -> None:
    unit = Optional()
    assert run(unit, pipe_of(unit), shared, {}, {}) == (shared, {}, {})
    assert unit.models_needed(shared.keys() - {"control"}) == {}


def test_d5_a_trigger_asks_for_the_unit_its_inputs_and_its_models() -> None:
    unit = Optional()
    shared, *_ = run(unit, pipe_of(unit), {"size": 2, "control": 0}, {}, {})
    assert shared["features"] == (2, 0)
    assert unit.models_needed({"control"}) == {"adapter": "control"}
    with pytest.raises(UnitError, match="Optional needs 'size'"):
        run(unit, pipe_of(unit), {"control": 1}, {}, {})


def test_d5_a_trigger_that_an_earlier_unit_writes_counts_before_the_run() -> None:
    class Makes(PipelineUnit):
        def __init__(self) -> None:
            super().__init__(input_params=("image",), output_params=("control",), trigger_params=("image",))

        def process(self, pipe: Any, image: Any) -> dict[str, Any]:
            return {"control": image}

    pipe: Any = BasePipeline()
    pipe.units, pipe.model_fn, pipe.adapter = (Makes(), Optional()), lambda latents: latents, None
    pipe.require_models_of_run({"image": None})
    with pytest.raises(MissingModelError, match="needs 'adapter', which is not loaded for the given control"):
        pipe.require_models_of_run({"image": 1})


def test_a_trigger_that_the_unit_does_not_read_is_refused() -> None:
    class Unit(PipelineUnit):
        def process(self, pipe: Any) -> dict[str, Any]:
            return {}

    with pytest.raises(UnitError, match=r"triggered by \['control'\], which it does not read"):
        Unit(trigger_params=("control",))


def test_a_pipeline_that_does_not_say_what_it_takes_is_refused() -> None:
    with pytest.raises(UnitError, match="BasePipeline does not say what it takes"):
        BasePipeline()("a cat")


@pytest.mark.parametrize("key", ["latents", "scheduler", "cfg_scale"])
def test_the_loop_says_what_it_lacks(key: str) -> None:
    pipe: Any = BasePipeline()
    pipe.model_fn = lambda latents: latents
    shared = {"latents": 0, "scheduler": 0, "cfg_scale": 1.0, key: None}
    with pytest.raises(UnitError, match=f"DenoisingLoop needs '{key}'"):
        pipe.run_units(pipe.all_units, shared, {}, {})
