"""AdaRound of a simulation: what the recipe says of it, and what it leaves in the stage's folder."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from sdconvert.config import AdaRoundSection
from sdconvert.errors import BudgetError
from sdconvert.io.files import write_json_atomic
from sdconvert.quantize.adaround.code_grid import CodeGrid
from sdconvert.quantize.adaround.plan import Plan
from sdconvert.quantize.adaround.reconstruct import Reconstruction
from sdconvert.quantize.adaround.run import (
    AdaRoundResult,
    AdaRoundSettings,
    Label,
    Report,
    Samples,
    adaround,
    plan_adaround,
)
from sdconvert.quantize.adaround.solve import SolverSettings
from sdconvert.quantize.simulation import Encodings, Simulation


def settings_of(section: AdaRoundSection) -> AdaRoundSettings:
    """AdaRound's settings as the recipe has them."""
    return AdaRoundSettings(
        solver=SolverSettings(method=section.solver, refit_scale=section.refit_scale),
        inputs=section.inputs,
        correct_bias=section.correct_bias,
        reconstruct=Reconstruction(kind=section.reconstruct) if section.reconstruct else None,
        quantizers=section.quantized_activations,
        held_out=section.held_out,
        budget_bytes=int(section.memory_limit),
    )


def plan_rounding(simulation: Simulation, section: AdaRoundSection, samples: int) -> Plan:
    """What AdaRound of a simulation will take.

    Raises:
        BudgetError: A layer or a sample does not fit; the message names the graph.
    """
    try:
        return plan_adaround(simulation.graph_module, rounded_grids(simulation), settings_of(section), samples)
    except BudgetError as error:
        graph = simulation.adapter.graph_name
        raise BudgetError(
            f"AdaRound of {graph}: {error.args[0]}", hint=f"{error.hint} (quantize.adaround.memory_limit)"
        ) from error


def round_weights(
    simulation: Simulation,
    samples: Samples,
    section: AdaRoundSection,
    scratch: Path,
    report: Report,
    label: Label = "calibration sample {}".format,
) -> AdaRoundResult:
    """Round the weights of a simulation's convolutions and linear layers; norms and tables keep theirs.

    Args:
        simulation: With ranges. It gets the rounded weights, refitted scales if they are asked for, and activation
            ranges taken anew.
        samples: Calibration data of the graph.
        section: Of the recipe.
        scratch: For finished groups of layers; a run that was killed goes on from there.
        report: Is told of every group.
        label: What a message calls a sample.

    Raises:
        BudgetError: A layer or a sample does not fit the memory limit.
        UsageError: Samples are none of this graph's, or not finite.
        EnvironmentProblem: The disk is full; finished groups stay.
    """
    grids, settings = rounded_grids(simulation), settings_of(section)
    result = adaround(simulation.graph_module, samples, grids, settings, scratch, label=label, report=report)
    simulation.set_weights({**dict(result.weights()), **result.biases()})
    ranges = simulation.encodings()
    simulation.load(Encodings({**ranges.parameters, **result.encodings()}, ranges.activations))
    simulation.recalibrate(samples)
    return result


def rounded_grids(simulation: Simulation) -> dict[str, CodeGrid]:
    """The grids of all weights that AdaRound rounds, by name."""
    entries = simulation.encodings().parameters
    return {name: CodeGrid.from_encodings(entries[name], shape) for name, shape in simulation.layer_weights().items()}


def write_figures(result: AdaRoundResult, path: Path) -> Mapping[str, Any]:
    """Write plan, effort and every layer's figures as JSON; return them."""
    content = {
        "plan": result.plan.describe(),
        "predicted_peak_bytes": result.plan.peak_bytes,
        "forwards": result.forwards,
        "layers": {
            name: {**asdict(figures), "nearest_sqnr_db": figures.nearest_sqnr_db, "sqnr_db": figures.sqnr_db}
            for name, figures in result.figures.items()
        },
    }
    write_json_atomic(content, path)
    return content
