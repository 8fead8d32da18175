"""Pipeline units: steps that declare what they read and write, so that a run can be checked, split and drawn.

All data of a run lives in three dictionaries: `shared`, and one per side of classifier-free guidance, `posi` and
`nega`. A key is shared or belongs to the sides, never both. A unit sees what it declares and adds what it declares;
the runner refuses everything else, because an undeclared read or write is an edge missing from the graph.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Collection, Mapping, Sequence
from typing import Any, Protocol

from sdconvert.errors import UnitError

Inputs = dict[str, Any]


class PipelineUnit(ABC):
    """One step of a pipeline, in one of three modes.

    *Direct* (default): `process(pipe, **inputs)` gets `input_params` from the shared inputs and returns
    `output_params` for them. *Separate CFG*: the same once per side, with `input_params_posi` and
    `input_params_nega` mapping arguments to keys of that side, and outputs written to that side; an argument `side` is
    told which one. *Take-over*:
    `process(pipe, inputs_shared, inputs_posi, inputs_nega)` gets and returns all three.

    An argument of `process` without a default is required; one that is absent takes its default.

    Args:
        separate_cfg: Run once per side of guidance.
        take_over: Hand over all three dictionaries.
        input_params: Keys read from the shared inputs.
        output_params: Keys written.
        input_params_posi: `{argument: key}` read from the positive side.
        input_params_nega: `{argument: key}` read from the negative side.
        onload_model_names: Attributes of the pipeline that `process` calls, for `load_models_to_device`.
        seperate_cfg: DiffSynth-Studio's spelling of `separate_cfg`.
        trigger_params: Keys that ask for an optional unit. While none of them has a value, the unit is skipped and
            needs no model; as soon as one has, the unit's models must be there.

    Raises:
        UnitError: The declaration contradicts itself or the signature of `process`.
    """

    def __init__(
        self,
        separate_cfg: bool = False,
        take_over: bool = False,
        input_params: Sequence[str] = (),
        output_params: Sequence[str] = (),
        input_params_posi: Mapping[str, str] | None = None,
        input_params_nega: Mapping[str, str] | None = None,
        onload_model_names: Sequence[str] = (),
        *,
        seperate_cfg: bool = False,
        trigger_params: Sequence[str] = (),
    ) -> None:
        self.separate_cfg = separate_cfg or seperate_cfg
        self.take_over = take_over
        self.input_params = tuple(input_params)
        self.output_params = tuple(output_params)
        self.input_params_posi = dict(input_params_posi or {})
        self.input_params_nega = dict(input_params_nega or {})
        self.onload_model_names = tuple(onload_model_names)
        self.trigger_params = tuple(trigger_params)
        self._check_declaration()

    @abstractmethod
    def process(self, *args: Any, **kwargs: Any) -> Any:
        """Compute the outputs: a dictionary, or three of them in take-over mode."""

    @property
    def name(self) -> str:
        """The class name, as messages show it."""
        return type(self).__name__

    @property
    def mode(self) -> str:
        """`direct`, `separate CFG` or `take-over`."""
        return "take-over" if self.take_over else "separate CFG" if self.separate_cfg else "direct"

    @property
    def reads(self) -> tuple[str, ...]:
        """Keys that the unit reads, of all three dictionaries."""
        sides = (*self.input_params_posi.values(), *self.input_params_nega.values())
        return tuple(dict.fromkeys((*self.input_params, *sides)))

    @property
    def writes(self) -> tuple[str, ...]:
        """Keys that the unit writes, of all three dictionaries."""
        return self.output_params

    def is_triggered(self, given: Collection[str]) -> bool:
        """Whether the unit has something to do when exactly the keys of `given` have a value."""
        return not self.trigger_params or any(key in given for key in self.trigger_params)

    def models_needed(self, given: Collection[str]) -> dict[str, str]:
        """Models that the unit calls when exactly the keys of `given` have a value, each with the key that asks for it.

        The key is empty for a model that is needed in any case.
        """
        if not self.is_triggered(given):
            return {}
        asking = next((key for key in self.trigger_params if key in given), "")
        return dict.fromkeys(self.onload_model_names, asking)

    def _check_declaration(self) -> None:
        if self.take_over and self.separate_cfg:
            raise UnitError(f"{self.name} declares both take_over and separate_cfg", hint="choose one mode")
        if not self.separate_cfg and (self.input_params_posi or self.input_params_nega):
            raise UnitError(
                f"{self.name} maps inputs of the two sides, which only a separate-CFG unit reads",
                hint="pass separate_cfg=True",
            )
        if self.input_params_posi.keys() != self.input_params_nega.keys():
            raise UnitError(
                f"{self.name} maps {sorted(self.input_params_posi)} on the positive side "
                f"but {sorted(self.input_params_nega)} on the negative one"
            )
        unread = {*self.trigger_params} - {
            *self.input_params,
            *self.input_params_posi.values(),
            *self.input_params_nega.values(),
        }
        if unread:
            raise UnitError(
                f"{self.name} is triggered by {sorted(unread)}, which it does not read",
                hint="name them in input_params too",
            )
        if not self.take_over:
            self._check_signature()

    def _check_signature(self) -> None:
        parameters = inspect.signature(self.process).parameters
        if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
            return
        unknown = {*self.input_params, *self.input_params_posi} - parameters.keys()
        if unknown:
            raise UnitError(f"{self.name} declares {sorted(unknown)}, but its process() takes {list(parameters)}")


class HasUnits(Protocol):
    """What the runner needs of a pipeline: its units in order of execution."""

    @property
    def all_units(self) -> Sequence[PipelineUnit]:
        """Units of the whole road, the sampling loop among them."""


class PipelineUnitRunner:
    """Runs one unit on the three dictionaries and checks that it did what it declared."""

    def __call__(
        self, unit: PipelineUnit, pipe: HasUnits, inputs_shared: Inputs, inputs_posi: Inputs, inputs_nega: Inputs
    ) -> tuple[Inputs, Inputs, Inputs]:
        """Return the three dictionaries after `unit`; those passed in are left as they are.

        Raises:
            UnitError: An input is absent, an output is undeclared or missing, `cfg_scale` is absent although a
                unit depends on it, or a key is both shared and of one side.
        """
        separate = [other.name for other in pipe.all_units if other.separate_cfg]
        if separate and "cfg_scale" not in inputs_shared:
            raise UnitError(
                f"{', '.join(separate)} runs once per side of guidance, but the shared inputs hold no 'cfg_scale'",
                hint="put cfg_scale into inputs_shared before the first unit (1.0: no guidance)",
            )
        if not unit.is_triggered(given_keys(inputs_shared, inputs_posi, inputs_nega)):
            return inputs_shared, inputs_posi, inputs_nega
        if unit.take_over:
            inputs = _take_over(unit, pipe, inputs_shared, inputs_posi, inputs_nega)
        elif unit.separate_cfg:
            inputs = _separate(unit, pipe, inputs_shared, inputs_posi, inputs_nega)
        else:
            outputs = _process(unit, pipe, inputs_shared, {}, {})
            inputs = {**inputs_shared, **outputs}, inputs_posi, inputs_nega
        _check_exclusive(pipe, *inputs)
        return inputs


def given_keys(*inputs: Inputs) -> set[str]:
    """Keys that have a value in one of the dictionaries; None is no value."""
    return {key for part in inputs for key, value in part.items() if value is not None}


def _separate(
    unit: PipelineUnit, pipe: HasUnits, shared: Inputs, posi: Inputs, nega: Inputs
) -> tuple[Inputs, Inputs, Inputs]:
    positive = _process(unit, pipe, shared, unit.input_params_posi, posi, side="positive")
    # Without guidance nothing reads the negative side; computing or copying it would only hide a wrong read.
    guided = shared["cfg_scale"] != 1.0
    negative = _process(unit, pipe, shared, unit.input_params_nega, nega, side="negative") if guided else {}
    return shared, {**posi, **positive}, {**nega, **negative}


def _take_over(
    unit: PipelineUnit, pipe: HasUnits, shared: Inputs, posi: Inputs, nega: Inputs
) -> tuple[Inputs, Inputs, Inputs]:
    result = unit.process(pipe, dict(shared), dict(posi), dict(nega))
    if not (isinstance(result, tuple) and len(result) == 3 and all(isinstance(part, dict) for part in result)):
        raise UnitError(f"{unit.name} takes over, so it must return three dictionaries; it returned {_kind(result)}")
    before, after = shared.keys() | posi.keys() | nega.keys(), set().union(*result)
    lost = before - after - {*unit.input_params, *unit.output_params}
    if lost:
        raise UnitError(f"{unit.name} dropped {sorted(lost)}, which it declares neither as input nor as output")
    _check_undeclared(unit, after - before)
    return result


def _process(
    unit: PipelineUnit, pipe: HasUnits, shared: Inputs, side_keys: Mapping[str, str], inputs: Inputs, **told: str
) -> Inputs:
    arguments = _arguments(unit, pipe, shared, side_keys, inputs)
    arguments |= {name: value for name, value in told.items() if name in inspect.signature(unit.process).parameters}
    outputs = unit.process(pipe, **arguments)
    if not isinstance(outputs, dict):
        raise UnitError(f"{unit.name}.process() must return a dictionary; it returned {_kind(outputs)}")
    _check_undeclared(unit, outputs.keys())
    absent = set(unit.output_params) - outputs.keys()
    # A unit whose optional input was not given has nothing to add; then, and only then, it may add nothing.
    untriggered = not outputs and any(arguments.get(key) is None for key in (*unit.input_params, *side_keys))
    if absent and not untriggered:
        raise UnitError(f"{unit.name} declares {sorted(absent)} as outputs, but did not return them")
    return outputs


def _arguments(
    unit: PipelineUnit, pipe: HasUnits, shared: Inputs, side_keys: Mapping[str, str], side: Inputs
) -> Inputs:
    parameters = inspect.signature(unit.process).parameters
    sources = [(key, key, shared) for key in unit.input_params]
    sources += [(argument, key, side) for argument, key in side_keys.items()]
    arguments: Inputs = {}
    for argument, key, source in sources:
        if key in source:
            arguments[argument] = source[key]
        elif argument not in parameters:  # swallowed by **kwargs: no default to fall back on, none required
            arguments[argument] = None
        elif parameters[argument].default is inspect.Parameter.empty:
            writers = _writers(pipe, key)
            raise UnitError(
                f"{unit.name} needs {key!r}, which is absent",
                hint=f"{' or '.join(writers)} should have produced it: is it before {unit.name}?"
                if writers
                else f"no unit produces {key!r}: the caller must give it",
            )
    return arguments


def _check_undeclared(unit: PipelineUnit, keys: set[str] | Any) -> None:
    undeclared = set(keys) - set(unit.output_params)
    if undeclared:
        raise UnitError(
            f"{unit.name} returned {sorted(undeclared)}, which it does not declare",
            hint=f"add them to output_params, now {list(unit.output_params)}",
        )


def _check_exclusive(pipe: HasUnits, shared: Inputs, posi: Inputs, nega: Inputs) -> None:
    for side, inputs in (("positive", posi), ("negative", nega)):
        for key in sorted(shared.keys() & inputs.keys()):
            writers = _writers(pipe, key)
            if len(writers) < 2:
                writers = ["the caller", *writers]
            raise UnitError(
                f"{key!r} is both a shared input and one of the {side} side; written by {' and by '.join(writers)}",
                hint="rename one of them: a model call takes the shared inputs and those of one side together",
            )


def _writers(pipe: HasUnits, key: str) -> list[str]:
    return [unit.name for unit in pipe.all_units if key in unit.output_params]


def _kind(value: object) -> str:
    return "None" if value is None else type(value).__name__
