"""The graph that the units' declarations span: what needs which model, and what can be computed ahead of it."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from sdconvert.config import did_you_mean
from sdconvert.errors import UnitError
from sdconvert.pipelines.unit import PipelineUnit


@dataclass(frozen=True)
class Edge:
    """`target` reads `key` as `source` wrote it last; an empty `source` is the caller."""

    source: str
    key: str
    target: str


class PipelineUnitGraph:
    """Units in their order of execution, seen as a graph of the keys that they read and write.

    Args:
        units: All units of a pipeline, the sampling loop among them: `pipe.all_units`.
    """

    def __init__(self, units: Sequence[PipelineUnit]) -> None:
        self.units = tuple(units)

    @property
    def edges(self) -> tuple[Edge, ...]:
        """Who hands what to whom, in the order of the readers."""
        writer: dict[str, str] = {}
        edges = []
        for unit in self.units:
            edges += [Edge(writer.get(key, ""), key, unit.name) for key in unit.reads]
            writer |= dict.fromkeys(unit.writes, unit.name)
        return tuple(edges)

    @property
    def model_names(self) -> tuple[str, ...]:
        """Models that some unit calls, in the order of their first use."""
        return tuple(dict.fromkeys(name for unit in self.units for name in unit.onload_model_names))

    def split_pipeline_units(
        self, model_names: Collection[str]
    ) -> tuple[tuple[PipelineUnit, ...], tuple[PipelineUnit, ...]]:
        """Divide the units into those that can run before the named models are there, and the others.

        Running all units of the first part and then all of the second gives exactly what running them in order gives:
        a unit is held back if it uses a named model, or if, behind a unit that is held back, it reads what that one
        writes, writes what that one reads, or writes what that one writes.

        Args:
            model_names: Attributes of the pipeline.

        Returns:
            Units to compute ahead, and units to compute with the models; both in order.

        Raises:
            UnitError: No unit calls one of the models.
        """
        for name in model_names:
            if name not in self.model_names:
                raise UnitError(f"no unit calls the model {name!r}", hint=did_you_mean(name, list(self.model_names)))
        ahead, held_back = list[PipelineUnit](), list[PipelineUnit]()
        for unit in self.units:
            uses = not set(model_names).isdisjoint(unit.onload_model_names)
            late = uses or any(_must_follow(unit, other) for other in held_back)
            (held_back if late else ahead).append(unit)
        return tuple(ahead), tuple(held_back)

    def phases(self) -> tuple[tuple[PipelineUnit, ...], ...]:
        """The units in order, cut wherever other models are called than so far.

        Many samples that go through phase after phase load every model once, not once per sample.
        """
        phases: list[list[PipelineUnit]] = [[]]
        models: tuple[str, ...] = ()
        for unit in self.units:
            called = unit.onload_model_names
            if called and models and set(called) != set(models):
                phases.append([])
            models = called or models
            phases[-1].append(unit)
        return tuple(tuple(phase) for phase in phases if phase)


def _must_follow(unit: PipelineUnit, earlier: PipelineUnit) -> bool:
    """Whether exchanging two units, of which `earlier` comes first, could change a result."""
    written, touched = set(earlier.writes), {*earlier.reads, *earlier.writes}
    return not (written.isdisjoint(unit.reads) and touched.isdisjoint(unit.writes))
