"""What a bundle carries so that its graphs can sample; all of it stays on this computer.

loop/model/…                        a diffusers folder without weights: configurations, scheduler, tokenizer
loop/pictures/<name>.safetensors    low_resolution, and what fp32 and the simulator made of it, each (3, H, W)
loop/steps/<name>.safetensors       for every call of the ControlNet by fp32: its inputs, and the noise that fp32
                                    and the simulator predict there
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdconvert.android.manifest import LOOP, LoopRecord, Manifest
from sdconvert.errors import UsageError
from sdconvert.io.tensors import flatten, load_tensors, save_tensors, unflatten
from sdconvert.pipelines.weightless import copy_without_weights

_TOLD = ("step", "fp32", "simulator")


@dataclass(frozen=True)
class LoopStep:
    """One call that fp32 made in a run of its own."""

    step: int
    """Index of the sampling step."""
    inputs: Mapping[str, Tensor]
    """Of the ControlNet's graph."""
    fp32: Tensor
    """The noise (1, C, h, w) that fp32 predicts there."""
    simulator: Tensor
    """The noise that ControlNet and UNet predict there in the simulator."""


@dataclass(frozen=True)
class Loop:
    """What `write_loop` writes."""

    model: Path
    """The diffusers folder of the checkpoint."""
    arguments: Mapping[str, Any]
    """JSON-able keyword arguments of a call of the pipeline."""
    simulated_soc: str
    """The SoC whose contexts were simulated."""
    pictures: Mapping[str, Mapping[str, Tensor]]
    """By name: `low_resolution`, `fp32` and `simulator`, each (3, H, W) in [0, 1]."""
    steps: Mapping[str, Sequence[LoopStep]]
    """By the same names; of some of them."""


def write_loop(loop: Loop, folder: Path) -> LoopRecord:
    """Write the files of a loop below `folder`, the bundle's."""
    copy_without_weights(loop.model, folder / LOOP / "model")
    for kind in ("pictures", "steps"):
        (folder / LOOP / kind).mkdir()
    for name, pictures in loop.pictures.items():
        save_tensors(pictures, folder / LOOP / f"pictures/{name}.safetensors")
    for name, steps in loop.steps.items():
        calls = [
            {**step.inputs, "step": torch.tensor(step.step), "fp32": step.fp32, "simulator": step.simulator}
            for step in steps
        ]
        # A run's text and control image are the same in all of its steps.
        first = calls[0]
        others = [{key: one for key, one in call.items() if not torch.equal(one, first[key])} for call in calls[1:]]
        save_tensors(flatten([first, *others]), folder / LOOP / f"steps/{name}.safetensors")
    return LoopRecord(
        arguments=dict(loop.arguments),
        simulated_soc=loop.simulated_soc,
        pictures=tuple(loop.pictures),
        steps=tuple(loop.steps),
    )


def loop_of(manifest: Manifest) -> LoopRecord:
    """Return the record of a bundle's loop.

    Raises:
        UsageError: The bundle has none.
    """
    if manifest.loop is None:
        raise UsageError(
            f"the bundle of `{manifest.model}` holds nothing to sample with: no test pictures, scheduler and tokenizer",
            hint="package it again with this sdconvert, or leave out --loop",
        )
    return manifest.loop


def read_pictures(bundle: Path, record: LoopRecord) -> dict[str, dict[str, Tensor]]:
    """Return the test pictures by name; see `Loop`."""
    return {name: load_tensors(bundle / LOOP / f"pictures/{name}.safetensors") for name in record.pictures}


def read_steps(bundle: Path, record: LoopRecord) -> Iterator[tuple[str, LoopStep]]:
    """Return every call of the runs whose single steps are there, with the picture's name."""
    for name in record.steps:
        first, *others = unflatten(load_tensors(bundle / LOOP / f"steps/{name}.safetensors"))
        for call in ({**first, **other} for other in ({}, *others)):
            inputs = {key: tensor for key, tensor in call.items() if key not in _TOLD}
            yield name, LoopStep(int(call["step"]), inputs, call["fp32"], call["simulator"])
