"""What a model loses when one layer's weights get fewer bits: at the graph's output, and in the final picture.

Everything else stays in fp32, so that a figure is one layer's alone. Noises of layers add up nearly (they are small and
unrelated), which is what `mixed_precision.py` builds on; the cumulative figures show how nearly.
"""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, get_args

from torch import Tensor

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.artifacts import RunFolder
from sdconvert.calibration.artifact import TILE, CalibrationArtifact
from sdconvert.checkpoint.artifact import CheckpointArtifact
from sdconvert.config import Recipe, did_you_mean
from sdconvert.errors import UsageError
from sdconvert.io.encodings import Encoding
from sdconvert.io.files import read_json, write_json_atomic
from sdconvert.metrics import sqnr_db, worst_sqnr_db
from sdconvert.pipelines.backend import graph_adapters
from sdconvert.pipelines.sampling import sampling_arguments
from sdconvert.quantize import graph
from sdconvert.quantize.aimet import weight_encodings
from sdconvert.quantize.grid import fake_quantized
from sdconvert.quantize.settings import Grid, QuantizerSettings, quantizer_settings
from sdconvert.quantize.weight_grids import LAYER_OPS

BITWIDTHS = (4, 8)
_STEPS = 10  # of the cumulative curve
Weights = Mapping[str, int]
"""Bits by the name of a weight."""
Report = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Workload:
    """One graph, and what it is judged on.

    Attributes:
        adapter: Covers the fp32 model.
        samples: Held-out inputs.
        settings: Give the grids' form.
        picture: Draws the final picture with the model as it is now; None: only outputs are judged.
    """

    adapter: ModelAdapter
    samples: Sequence[Tensors]
    settings: QuantizerSettings
    picture: Callable[[], Tensor] | None = None

    def weights(self) -> dict[str, tuple[str, int]]:
        """The op that every weight enters, and its number of elements, by name in execution order."""
        found = graph.parameters(graph.trace(self.adapter, self.samples[0]))
        return {
            one.name: (one.op, int(one.node.meta["val"].numel()))
            for one in found
            if one.op in LAYER_OPS and not one.is_bias
        }

    @contextmanager
    def quantized(self, bits: Weights, ops: Mapping[str, str]) -> Iterator[None]:
        """Have the model compute with some weights rounded to nearest, everything else in fp32.

        Args:
            bits: Of these weights.
            ops: That they enter.
        """
        model, entries = self.adapter.model, dict[str, list[Encoding]]()
        for name, bitwidth in bits.items():
            grid = self.settings.parameters[ops[name]].model_copy(update={"bitwidth": bitwidth})
            entries[name] = weight_encodings(model.get_parameter(name), grid)
        with fake_quantized(model, entries):
            yield

    def outputs(self) -> Tensors:
        """The graph's outputs of all samples, by sample and name."""
        every = {}
        for index, sample in enumerate(self.samples):
            every.update({f"{index}/{name}": tensor for name, tensor in self.adapter.run(sample).items()})
        return every


class Sensitivity:
    """Figures on disk, one file per run folder, written after every layer: a run that was stopped goes on from there.

    Args:
        path: Of the file.
        identity: Of all that decides the figures; a file of another identity is begun anew.
    """

    def __init__(self, path: Path, identity: str) -> None:
        self.path = path
        self.content: dict[str, Any] = {"schema_version": 1, "identity": identity, "graphs": {}}
        if path.is_file() and (found := read_json(path)).get("identity") == identity:
            self.content = found

    def measure(self, workload: Workload, bitwidths: Sequence[int], report: Report) -> None:
        """Measure every layer of a graph at every bit-width, then layers together, the least sensitive first.

        Args:
            workload: The graph.
            bitwidths: Of weights.
            report: Is told of every layer.

        Raises:
            UsageError: There is no bit-width.
        """
        if not bitwidths:
            raise UsageError("no bit-width is asked for", hint="--bits 4 --bits 8")
        name = workload.adapter.graph_name
        weights = workload.weights()
        ops = {weight: op for weight, (op, _) in weights.items()}
        found = self.content["graphs"].setdefault(name, {"layers": {}, "cumulative": {}})
        reference = _Reference.of(workload)
        for done, (weight, (_, count)) in enumerate(weights.items()):
            entry = found["layers"].setdefault(weight, {"weights": count, "output_db": {}, "picture_db": {}})
            for bits in bitwidths:
                if str(bits) in entry["output_db"] and (not workload.picture or str(bits) in entry["picture_db"]):
                    continue
                report(done, len(weights), f"{name}: {weight} at {bits} bits")
                with workload.quantized({weight: bits}, ops):
                    reference.judge(workload, entry, str(bits))
                self._save()
        for bits in bitwidths:
            curve = found["cumulative"].get(str(bits))
            if curve is None or (workload.picture and any(point["picture_db"] is None for point in curve)):
                found["cumulative"][str(bits)] = _cumulate(workload, found["layers"], ops, bits, reference, report)
                self._save()

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_json_atomic(self.content, self.path)


def measure_run(
    run: RunFolder,
    recipe: Recipe,
    path: Path,
    bitwidths: Sequence[int],
    graphs: Collection[str],
    *,
    samples: int,
    picture: bool,
    report: Report,
) -> dict[str, Any]:
    """Measure the graphs of a run whose calibration has finished.

    Args:
        run: Holds `10-checkpoint` and `20-calibration`.
        recipe: Of the run.
        path: Of the file of figures.
        bitwidths: Of weights; none: `BITWIDTHS`.
        graphs: Of these; none: of all.
        samples: Held-out inputs per graph, or as many as there are.
        picture: Draw the first held-out tile for every layer, too.
        report: Is told of every layer.

    Returns:
        Figures by graph.

    Raises:
        UsageError: No graph or grid is called so.
    """
    chosen = sorted(set(bitwidths or BITWIDTHS))
    if odd := [bits for bits in chosen if bits not in get_args(Grid.model_fields["bitwidth"].annotation)]:
        raise UsageError(f"weights of {odd[0]} bits are not to be had", hint="--bits 4, --bits 8 or --bits 16")
    pipe = CheckpointArtifact(run.stage_folder("10-checkpoint")).pipeline()
    data = CalibrationArtifact(run.stage_folder("20-calibration"))
    adapters = graph_adapters(pipe, recipe.pipeline.conditioning_scale)
    if unknown := sorted(set(graphs) - adapters.keys()):
        raise UsageError(f"no graph is called `{unknown[0]}`", hint=did_you_mean(unknown[0], list(adapters)))
    tile = next(name for name in data.pictures() if name.endswith(TILE))
    low = data.pictures()[tile]["low_resolution"]

    def draw() -> Tensor:
        drawn: Tensor = pipe(low, **sampling_arguments(recipe))
        return drawn

    manifest = run.manifest("20-calibration")
    settings = quantizer_settings(recipe)
    grids = {op: grid.model_dump() for op, grid in settings.parameters.items() if op in LAYER_OPS}
    identity = f"{manifest.fingerprint if manifest else ''} {samples} {tile} {grids}"
    sensitivity = Sensitivity(path, identity)
    for name, adapter in adapters.items():
        if not graphs or name in graphs:
            # A VAE runs once per picture, a UNet at every step of it.
            held_out = list(data.evaluation(name, min(samples, len(data.evaluation(name)))))
            sensitivity.measure(Workload(adapter, held_out, settings, draw if picture else None), chosen, report)
    found: dict[str, Any] = sensitivity.content["graphs"]
    return found


@dataclass(frozen=True)
class _Reference:
    """What fp32 gives."""

    outputs: Tensors
    picture: Tensor | None

    @classmethod
    def of(cls, workload: Workload) -> "_Reference":
        return cls(workload.outputs(), workload.picture() if workload.picture else None)

    def judge(self, workload: Workload, entry: dict[str, Any], key: str) -> None:
        """Put the figures of the model as it is now into an entry."""
        entry["output_db"][key] = worst_sqnr_db(self.outputs, workload.outputs())
        if workload.picture and self.picture is not None:
            entry["picture_db"][key] = sqnr_db(self.picture, workload.picture())


def _cumulate(
    workload: Workload,
    layers: Mapping[str, Any],
    ops: Mapping[str, str],
    bits: int,
    reference: _Reference,
    report: Report,
) -> list[dict[str, Any]]:
    """Lower layers together, the least sensitive first, in steps of a tenth of the weights."""
    order = sorted(layers, key=lambda name: layers[name]["output_db"][str(bits)], reverse=True)
    total = sum(layer["weights"] for layer in layers.values())
    curve: list[dict[str, Any]] = []
    lowered: dict[str, int] = {}
    weights = 0
    with ExitStack() as stack:
        for name in order:
            stack.enter_context(workload.quantized({name: bits}, ops))
            lowered[name] = bits
            weights += layers[name]["weights"]
            if weights * _STEPS >= total * (len(curve) + 1):
                report(len(lowered), len(order), f"{workload.adapter.graph_name}: {len(lowered)} layers at {bits} bits")
                point: dict[str, Any] = {"output_db": {}, "picture_db": {}}
                reference.judge(workload, point, "all")
                curve.append(
                    {
                        "layers": len(lowered),
                        "weights": weights,
                        "output_db": point["output_db"]["all"],
                        "picture_db": point["picture_db"].get("all"),
                    }
                )
    return curve
