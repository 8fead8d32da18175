"""A model's static graph with quantizers: what the phone will compute, simulated in torch.

The same object takes the ranges, runs as a backend of the pipeline, compares layer by layer, and is what the exporter
turns into ONNX: nothing is quantized twice in two ways.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.errors import PreconditionError, UsageError
from sdconvert.io.encodings import Encoding
from sdconvert.plugins.capture import capturing
from sdconvert.quantize import aimet, graph
from sdconvert.quantize.settings import QuantizerSettings
from sdconvert.quantize.sqnr import layer_sqnr_db


@dataclass(frozen=True)
class Encodings:
    """Ranges of one graph: parameters by name, activations and second operands by tensor key."""

    parameters: dict[str, list[Encoding]]
    activations: dict[str, list[Encoding]]


@dataclass(frozen=True)
class BoundaryTensor:
    """One tensor between blocks.

    Attributes:
        simulated: In the quantized graph.
        fp32: In the graph without quantizers.
        fp32_block: What the block before it makes in fp32 of the tensors that enter it in the quantized graph.
    """

    simulated: Tensor
    fp32: Tensor
    fp32_block: Tensor


class _Replace(nn.Module):
    """Goes on with a given value, and keeps what entered."""

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self._value, self.entered = value, value

    def forward(self, entering: Tensor) -> Tensor:
        self.entered = entering
        return self._value


class Simulation:
    """One traced graph and its quantizers.

    Args:
        adapter: Covers the model.
        example: One set of graph inputs.
        settings: Bit-widths and symmetry.
        parameters: Encodings of weights that `load` will get: their bit-widths and blocks count, not the settings'.

    Raises:
        UnsupportedModelError: The graph has ops without a quantization rule, or weights without a grid.
        UsageError: The adapter gives a range to what is no input, or blocks of a layer do not divide its channels.
        EncodingsError: Encodings do not fit a weight's shape.
    """

    def __init__(
        self,
        adapter: ModelAdapter,
        example: Tensors,
        settings: QuantizerSettings,
        parameters: Mapping[str, Sequence[Encoding]] | None = None,
    ) -> None:
        self.adapter = adapter
        self.settings = settings
        self.input_names = tuple(example)
        self.graph_module: GraphModule = graph.trace(adapter, example)
        output = next(node for node in self.graph_module.graph.nodes if node.op == "output")
        self.output_names = adapter.output_names(len(output.args[0]))
        self.quantizers = aimet.insert_quantizers(self.graph_module, settings, adapter.graph_name, parameters)
        self.quantizers.fixed_ranges |= _input_ranges(adapter, self.quantizers.activations)
        self.calibrated = False
        self._floating: dict[str, nn.Parameter] = {}
        self._rounded: dict[str, Tensor] = {}

    @property
    def rounded_weights(self) -> dict[str, Tensor]:
        """Weights, and biases that go with them, that this graph has instead of the model's, by name."""
        return dict(self._rounded)

    def layer_weights(self) -> dict[str, tuple[int, ...]]:
        """Shapes of the weights of convolutions and linear layers, by name in execution order."""
        layers = set(self.quantizers.layers)
        return {
            name: tuple(self.graph_module.get_parameter(source).shape)
            for name, source in self.quantizers.sources.items()
            if name.rpartition(".")[0] in layers
        }

    def set_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Have this graph compute with other weights; the model keeps its own, and stays what figures refer to.

        Args:
            weights: By name, in the model's shapes; of weights that have a quantizer, and of layers' biases.

        Raises:
            UsageError: One of them is no such weight.
        """
        biases = {
            parameter.name: str(parameter.node.target)
            for parameter in graph.parameters(self.graph_module)
            if parameter.is_bias and parameter.layer in self.quantizers.layers
        }
        sources = {**biases, **self.quantizers.sources}
        if odd := sorted(weights.keys() - sources.keys()):
            raise UsageError(
                f"`{odd[0]}` is no quantized weight of the {self.adapter.graph_name} graph", hint="is it in the model?"
            )
        for name, weight in weights.items():
            source = sources[name]
            self._floating.setdefault(source, self.graph_module.get_parameter(source))
            aimet.set_parameter(self.graph_module, source, nn.Parameter(weight, requires_grad=False))
            self._rounded[name] = weight

    @torch.no_grad()
    def run_with_activations_unquantized(self, samples: Iterable[Tensors]) -> list[Tensors]:
        """Run the graph with quantized weights alone.

        Raises:
            PreconditionError: It has no ranges yet.
        """
        self._require_ranges()
        module = aimet.without_quantizers(self.graph_module, self.quantizers.activations)
        outputs = [module(*(sample[name] for name in self.input_names)) for sample in samples]
        return [
            {name: tensor.as_subclass(Tensor) for name, tensor in zip(self.output_names, one, strict=True)}
            for one in outputs
        ]

    def calibrate(self, samples: Iterable[Tensors]) -> None:
        """Take all ranges from samples of graph inputs.

        Raises:
            PreconditionError: There is no sample.
        """
        batches = self._batches(samples)
        aimet.calibrate(self.graph_module, self.quantizers, batches, self.settings)
        # Files hold the range as min and max on the grid: from here on this graph computes what a file's reader will.
        self.calibrated = True
        self.load(self.encodings())

    def recalibrate(self, samples: Iterable[Tensors], paths: Collection[str] | None = None) -> list[str]:
        """Take the ranges of all tensors that some modules make anew; all other ranges stay.

        Args:
            samples: Of graph inputs.
            paths: Of the modules; what their children make counts. None: of all tensors, weights stay.

        Returns:
            Keys of these tensors.

        Raises:
            PreconditionError: There is no sample, or there are no ranges yet.
            UsageError: A module makes no tensor of the graph.
        """
        self._require_ranges()
        if paths is None:
            every = list(self.quantizers.activations)
        else:
            every = list(dict.fromkeys(key for found in self._keys_below(paths).values() for key in found))
        batches = self._batches(samples)
        aimet.calibrate_activations(self.graph_module, self.quantizers, batches, self.settings, set(every))
        self.load(self.encodings())
        return every

    @contextmanager
    def capturing_last(self, paths: Collection[str]) -> Iterator[dict[str, Tensor]]:
        """Collect, in calls inside the block, the last tensor that each of some modules stores.

        Args:
            paths: Of the modules; what their children store counts.

        Yields:
            Filled at the end of the block: the tensor of the latest call by path.

        Raises:
            UsageError: As `recalibrate`.
        """
        names = aimet.child_names(self.graph_module, self.quantizers.activations)
        order = list(names)
        last = {
            path: max((key for key in keys if not key.endswith(graph.SECOND)), key=order.index)
            for path, keys in self._keys_below(paths).items()
        }
        with capturing({path: self.graph_module.get_submodule(names[key]) for path, key in last.items()}) as outputs:
            yield outputs

    def _keys_below(self, paths: Collection[str]) -> dict[str, list[str]]:
        keys = {path: [key for key in self.quantizers.activations if _made_below(key, path)] for path in paths}
        if idle := [path for path, found in keys.items() if not found]:
            raise UsageError(
                f"`{idle[0]}` makes no tensor of the {self.adapter.graph_name} graph", hint="is it in the model?"
            )
        return keys

    def _batches(self, samples: Iterable[Tensors]) -> list[tuple[Tensor, ...]]:
        batches = [tuple(sample[name] for name in self.input_names) for sample in samples]
        if not batches:
            raise PreconditionError(
                f"no calibration samples for {self.adapter.graph_name}", hint="run the calibration stage"
            )
        return batches

    def encodings(self) -> Encodings:
        """All ranges, in AIMET's form.

        Raises:
            PreconditionError: There are none yet.
        """
        self._require_ranges()
        return Encodings(aimet.read(self.quantizers.parameters), aimet.read(self.quantizers.activations))

    def load(self, encodings: Encodings) -> None:
        """Set all ranges, or none.

        Raises:
            EncodingsError: They do not fit the graph exactly.
        """
        aimet.require_fit(self.quantizers.parameters, encodings.parameters, "parameter")
        aimet.require_fit(self.quantizers.activations, encodings.activations, "activation")
        aimet.write(self.quantizers.parameters, encodings.parameters)
        aimet.write(self.quantizers.activations, encodings.activations)
        self.calibrated = True

    @torch.no_grad()
    def __call__(self, inputs: Tensors) -> Tensors:
        """Run the quantized graph.

        Raises:
            PreconditionError: It has no ranges yet.
        """
        self._require_ranges()
        outputs = self.graph_module(*(inputs[name] for name in self.input_names))
        # AIMET returns a tensor class of its own, which carries a copy of the grid along.
        return {name: tensor.as_subclass(Tensor) for name, tensor in zip(self.output_names, outputs, strict=True)}

    @torch.no_grad()
    def boundary_tensors(self, inputs: Tensors, keys: Collection[str]) -> dict[str, "BoundaryTensor"]:
        """What some stored tensors hold for one set of inputs, by key.

        Raises:
            PreconditionError: There are no ranges yet.
            UsageError: A key is no tensor of the graph.
        """
        self._require_ranges()
        names = aimet.child_names(self.graph_module, self.quantizers.activations)
        if odd := sorted(set(keys) - names.keys()):
            raise UsageError(
                f"`{odd[0]}` is no tensor of the {self.adapter.graph_name} graph", hint="its keys are `encodings()`'s"
            )
        with capturing({key: self.graph_module.get_submodule(names[key]) for key in keys}) as simulated:
            self(inputs)
        floating, locally = self._floating_graph({}), self._floating_graph(simulated)
        probes = {key: floating.get_submodule(names[key]) for key in keys}
        with capturing(probes) as fp32:
            floating(*(inputs[name] for name in self.input_names))
        locally(*(inputs[name] for name in self.input_names))
        entered: dict[str, Any] = {key: locally.get_submodule(names[key]) for key in keys}
        return {key: BoundaryTensor(simulated[key], fp32[key], entered[key].entered) for key in keys}

    def _floating_graph(self, values: Mapping[str, Tensor]) -> GraphModule:
        """The graph in fp32, with given values in place of some tensors."""
        floating = self.with_quantizers_as(lambda key: _Replace(values[key]) if key in values else nn.Identity())
        for source, weight in self._floating.items():
            aimet.set_parameter(floating, source, weight)
        return floating

    def layer_sqnr_db(self, inputs: Tensors) -> dict[str, float]:
        """SQNR in dB of every stored tensor, by key in execution order: quantized graph against the same in fp32.

        Raises:
            PreconditionError: There are no ranges yet.
        """
        self._require_ranges()
        floating = self._floating_graph({})
        names = aimet.child_names(self.graph_module, self.quantizers.activations)
        for key in self.quantizers.masked_scores:
            # How far below all others a hidden score is does not matter.
            (entry,) = self.encodings().activations[key]
            setattr(floating, names[key], nn.Hardtanh(entry["min"], entry["max"]))
        return layer_sqnr_db(floating, self.graph_module, names, [inputs[name] for name in self.input_names])

    def with_quantizers_as(self, make: Callable[[str], nn.Module]) -> GraphModule:
        """A second module of the same graph and weights, with a module of `make(key)` in place of every quantizer."""
        return aimet.with_quantizers_as(
            self.graph_module, self.quantizers.activations | self.quantizers.parameters, make
        )

    def _require_ranges(self) -> None:
        if not self.calibrated:
            raise PreconditionError(
                f"the simulation of {self.adapter.graph_name} has no ranges", hint="calibrate() or load() first"
            )


def _made_below(key: str, path: str) -> bool:
    maker = key.partition(":")[0]
    return maker == path or maker.startswith(f"{path}.")


def _input_ranges(adapter: ModelAdapter, keys: Collection[str]) -> dict[str, tuple[float, float]]:
    ranges = {f":{name}": bounds for name, bounds in adapter.input_ranges.items()}
    if odd := sorted(ranges.keys() - keys):
        raise UsageError(
            f"{type(adapter).__name__}.input_ranges has `{odd[0][1:]}`, no float input of {adapter.graph_name}",
            hint="its names are those of io_spec",
        )
    return ranges
