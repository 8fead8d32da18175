"""That a converted model computes what the original does, layer by layer; and ranges per head, if they are asked for.

The road and the command share it: they differ in where model, ranges and inputs come from.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from sdconvert.adapters import ModelAdapter, Tensors
from sdconvert.errors import QualityGateError
from sdconvert.io.files import write_json_atomic
from sdconvert.mha2sha.artifact import AGREEMENT, HEAD_RANGES
from sdconvert.mha2sha.forms import rewrite_to_sha
from sdconvert.mha2sha.layers import agreements_db, relative_errors, run_fp32, run_quantized
from sdconvert.mha2sha.recalibrate import OUTPUT, recalibrate_heads
from sdconvert.quantize.artifact import Simulation, load_simulation, save_simulation

_LARGEST_FP32_ERROR = 1e-5
# A layer also inherits what the sums before it rounded otherwise: how threads share a sum moved one from 0 to 9e-6.
_LARGEST_LAYER_ERROR = 1e-4


@dataclass(frozen=True)
class Proof:
    """What is run to compare the two forms of a model; a call turns the model into its SHA form.

    Attributes:
        adapter: Covers the model in MHA form.
        mha: Its quantized graph; None: fp32 alone is compared.
        inputs: Of the graph, to compare the forms on.
        compare: Whether to; otherwise only ranges are taken.
        samples: Of the graph's inputs, to take a range per head from; None: heads have their parent's.
        held_out: To judge these ranges on.
    """

    adapter: ModelAdapter
    mha: Simulation | None
    inputs: Sequence[Tensors]
    compare: bool = True
    samples: Iterable[Tensors] | None = None
    held_out: Sequence[Tensors] = ()

    def __call__(self, folder: Path) -> dict[str, float]:
        """Compare a conversion with the model, and take ranges for its heads.

        Args:
            folder: Holds the SHA form. Gets `sha_vs_mha.json`, and with `samples` other ranges in `<graph>.encodings`
                and `head_ranges.json`.

        Returns:
            The worst figures.

        Raises:
            QualityGateError: The forms differ in fp32.
            CheckpointError: The weights of the SHA form do not fit the rewritten model.
            EncodingsError: Its ranges do not.
        """
        graph = self.adapter.graph_name
        layers = [layer.path for layer in self.adapter.attention_layers()]
        if self.compare:
            fp32 = run_fp32(self.adapter, layers, self.inputs)
            quantized = run_quantized(self.mha, layers, self.inputs) if self.mha else None
        rewrite_to_sha(self.adapter, folder)
        encodings = folder / f"{graph}.encodings"
        sha = load_simulation(encodings, self.adapter, self.inputs[0], self.mha.settings) if self.mha else None
        found: dict[str, float] = {}
        if self.compare:
            errors = relative_errors(fp32, run_fp32(self.adapter, layers, self.inputs))
            require_small(graph, errors, _LARGEST_LAYER_ERROR)
            require_small(graph, {name: errors[name] for name in fp32.graph[0]})
            figures = {name: {"fp32_relative_error": error} for name, error in errors.items()}
            found["fp32_relative_error"] = max(errors[name] for name in fp32.graph[0])
            found["worst_layer_fp32_relative_error"] = max(errors.values())
            if sha is not None and quantized is not None:
                agreements = agreements_db(quantized, run_quantized(sha, layers, self.inputs))
                for name, agreement in agreements.items():
                    figures[name]["quantized_db"] = agreement
                found["quantized_sha_vs_mha_db"] = min(agreements[name] for name in fp32.graph[0])
                found["worst_layer_sha_vs_mha_db"] = min(agreements.values())
            write_json_atomic(figures, folder / AGREEMENT)
        if sha is not None and self.samples is not None:
            gains = recalibrate_heads(sha, self.samples, self.held_out)
            save_simulation(sha, encodings)
            write_json_atomic(gains, folder / HEAD_RANGES)
            found |= {f"{ranges}_vs_fp32_db": value for ranges, value in gains[OUTPUT].items()}
        return found


def require_small(what: str, errors: Mapping[str, float], allowed: float = _LARGEST_FP32_ERROR) -> None:
    """Refuse a rewrite that changed what the model computes.

    Args:
        what: Was rewritten, for the message.
        errors: Relative, in fp32, by place.
        allowed: The largest that is rounding.

    Raises:
        QualityGateError: One of them is more than rounding.
    """
    # NaN is no small error.
    if large := {place: error for place, error in errors.items() if not error <= allowed}:
        place, error = max(large.items(), key=lambda one: (one[1] != one[1], one[1]))
        raise QualityGateError(
            f"{what}: SHA differs from MHA by {error:.1e} relative in fp32 (allowed {allowed:.0e}), "
            f"at `{place}`; {len(large)} of {len(errors)} places differ",
            hint="the rewrite is wrong for this model; please report it with its config.json",
        )
