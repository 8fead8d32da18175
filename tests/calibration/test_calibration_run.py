"""The calibration stage on the embedded model: phase after phase, resumable, and the same as one call per picture."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from sdconvert.artifacts import RunFolder
from sdconvert.assets import asset_path
from sdconvert.calibration.artifact import CalibrationArtifact
from sdconvert.calibration.crops import calibration_crops
from sdconvert.calibration.run import record_sizes
from sdconvert.calibration.stage import CalibrationStage
from sdconvert.checkpoint.artifact import CheckpointArtifact
from sdconvert.config import Recipe
from sdconvert.errors import BudgetError
from sdconvert.io.degradation import degrade
from sdconvert.io.files import sha256_folder
from sdconvert.pipelines.backend import graph_adapters
from sdconvert.pipelines.pasd import PASDPipeline
from sdconvert.pipelines.residency import ModelResidency
from sdconvert.pipelines.sampling import sampling_arguments
from sdconvert.stages import StageContext

RECIPE = Recipe.model_validate(
    {
        "name": "tiny",
        "pipeline": {"num_inference_steps": 1, "guidance_scale": 2.0, "latent_tile": 8, "latent_overlap": 2},
        "calibration": {"photographs": ("coffee", "rocket"), "crops_per_photograph": 1, "held_out": ("china",)},
    }
)
SAMPLES = 4  # two crops that calibrate; one held out, and its tile


class Silent:
    def step(self, done: int, total: int, note: str = "") -> None:
        assert 0 <= done < total


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    """A run whose first stage is done."""
    run = RunFolder(tmp_path_factory.mktemp("run"))
    run.stage_folder("10-checkpoint").mkdir()
    (run.stage_folder("10-checkpoint") / "model").symlink_to(asset_path("pasd_tiny"))
    return run


Calibrate = Callable[..., tuple[Path, dict[str, Any]]]


def calibrate_in(root: Path, run_folder: RunFolder) -> Calibrate:
    """What runs the stage, and gives the folder that it wrote and its metrics."""
    (root / "10-checkpoint").symlink_to(run_folder.stage_folder("10-checkpoint"))

    def run(name: str = "out", fingerprint: str = "0", **calibration: Any) -> tuple[Path, dict[str, Any]]:
        (root / name).mkdir()
        recipe = RECIPE.model_copy(update={"calibration": RECIPE.calibration.model_copy(update=calibration)})
        context = StageContext(recipe, root / name, RunFolder(root), Silent(), fingerprint)
        return root / name, CalibrationStage().run(context)

    return run


@pytest.fixture
def calibrate(run_folder: RunFolder, tmp_path: Path) -> Calibrate:
    return calibrate_in(tmp_path, run_folder)


@pytest.fixture(scope="module")
def whole(run_folder: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The result of a run that nothing interrupted; a test only reads it."""
    return calibrate_in(tmp_path_factory.mktemp("whole"), run_folder)()


class Calls:
    """Counts the calls of a pipeline's models, and notes which components have data while each is called."""

    def __init__(self, patch: pytest.MonkeyPatch, dies_after: int | None = None) -> None:
        self.counts: dict[str, int] = {}
        self.in_memory: dict[str, set[frozenset[str]]] = {}
        original = CheckpointArtifact.pipeline

        def pipeline(artifact: CheckpointArtifact, residency: ModelResidency) -> PASDPipeline:
            pipe = original(artifact, residency)
            self.residency = residency
            parts = {
                "text_encoder": pipe.text_encoder,
                "vae.encoder": pipe.vae.encoder,
                "vae.decoder": pipe.vae.decoder,
                "unet": pipe.unet,
                "controlnet": pipe.controlnet,
            }

            def note(name: str) -> Callable[..., None]:
                def hook(module: nn.Module, args: Any) -> None:
                    self.counts[name] = self.counts.get(name, 0) + 1
                    if name == "unet" and self.counts[name] == dies_after:
                        raise KeyboardInterrupt
                    present = (
                        part.partition(".")[0] for part, model in parts.items() if not next(model.parameters()).is_meta
                    )
                    self.in_memory.setdefault(name, set()).add(frozenset(present))

                return hook

            for name, part in parts.items():
                part.register_forward_pre_hook(note(name))
            return pipe

        patch.setattr(CheckpointArtifact, "pipeline", pipeline)


def test_d8_d9_calibration_keeps_what_one_call_per_picture_gives(
    whole: tuple[Path, dict[str, Any]], run_folder: RunFolder
) -> None:
    out, metrics = whole
    found = CalibrationArtifact(out)
    pipe = CheckpointArtifact(run_folder.stage_folder("10-checkpoint")).pipeline()
    adapters = graph_adapters(pipe, RECIPE.pipeline.conditioning_scale)
    seen: dict[str, list[dict[str, Any]]] = {graph: [] for graph in adapters}

    class Recorder:
        def record(self, component: str, inputs: dict[str, Any], **place: Any) -> None:
            packed = {name: tensor.clone() for name, tensor in adapters[component].pack(inputs).items()}
            seen[component].append({"place": place, "inputs": packed})

    crops = calibration_crops(RECIPE, RECIPE.pipeline.latent_tile * pipe.vae_scale_factor)
    for crop, prompt in zip(crops.values(), RECIPE.calibration.prompts, strict=False):
        request = sampling_arguments(RECIPE) | {"prompt": prompt}
        pipe(degrade(crop, RECIPE.pipeline.seed), **request, observer=Recorder())
    for graph, expected in seen.items():
        samples = list(found.calibration(graph).samples())
        assert len(samples) == len(expected) == (2 if graph.startswith("vae_") else 2 * 2)
        for (info, inputs), call in zip(samples, expected, strict=True):
            assert {"step": info.step, "side": info.side, "tile": info.tile} == call["place"]
            assert list(inputs) == list(call["inputs"])
            assert all(torch.equal(inputs[name], call["inputs"][name]) for name in inputs)
    for name, pictures in found.pictures().items():
        fp32 = pipe(pictures["low_resolution"], **sampling_arguments(RECIPE))
        assert torch.equal(pictures["fp32"], fp32), name
    assert [info.picture for info in found.evaluation("unet").infos] == ["china-tile"] * 2
    assert metrics["calibration_samples"] == 2


def test_d8_text_encoder_and_vae_run_once_per_sample_and_are_dropped_before_the_loop(
    calibrate: Calibrate, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    calibrate()
    assert calls.counts["text_encoder"] == 2 * SAMPLES  # both sides of guidance
    assert calls.counts["vae.encoder"] == SAMPLES - 1 + 4  # the held-out crop has four tiles
    assert calls.in_memory == {
        "text_encoder": {frozenset({"text_encoder"})},
        "vae.encoder": {frozenset({"vae"})},
        "controlnet": {frozenset({"unet", "controlnet"})},
        "unet": {frozenset({"unet", "controlnet"})},
        "vae.decoder": {frozenset({"vae"})},
    }


@pytest.fixture(scope="module")
def needed(run_folder: RunFolder) -> dict[str, int]:
    """Bytes of the weights that are called together, by the first of them."""
    pipe = CheckpointArtifact(run_folder.stage_folder("10-checkpoint")).pipeline()
    together = (("text_encoder",), ("vae",), ("unet", "controlnet"))
    return {
        names[0]: sum(tensor.nbytes for name in names for tensor in getattr(pipe, name).state_dict().values())
        for names in together
    }


def test_d8_a_limit_that_the_largest_models_fit_gives_the_same_and_is_kept(
    calibrate: Calibrate,
    whole: tuple[Path, dict[str, Any]],
    needed: dict[str, int],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    calls = Calls(monkeypatch)
    limit = max(needed.values())
    assert needed["unet"] == limit < sum(needed.values())
    out, metrics = calibrate(memory_limit=limit)
    assert (sha256_folder(out), metrics) == (sha256_folder(whole[0]), whole[1])
    assert calls.in_memory["unet"] == {frozenset({"unet", "controlnet"})}
    assert calls.in_memory["vae.encoder"] == {frozenset({"text_encoder", "vae"})}, "what fits stays"
    assert calls.residency.memory_bytes <= limit, "nothing is brought back when all is done"


def test_d8_a_limit_below_the_largest_models_is_refused_with_what_would_fit(
    calibrate: Calibrate, needed: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = Calls(monkeypatch)
    with pytest.raises(BudgetError, match=rf"need {needed['unet']} bytes \(unet \d+, controlnet \d+\)") as caught:
        calibrate(memory_limit=needed["unet"] - 1)
    assert f"memory_limit to at least {needed['unet']}" in caught.value.hint
    assert calls.counts == {}, "before anything is computed"


@pytest.mark.parametrize("dies_after", [1, 7])
def test_d9_an_interrupted_calibration_goes_on_behind_the_last_finished_sample(
    calibrate: Calibrate, whole: tuple[Path, dict[str, Any]], dies_after: int
) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        first = Calls(patch, dies_after)
        calibrate("killed", fingerprint="2")
    with pytest.MonkeyPatch.context() as patch:
        second = Calls(patch)
        resumed, again = calibrate("resumed", fingerprint="2")
    per_sample = [2, 2, 8, 2]  # one step with guidance makes two calls per tile; the third picture has four tiles
    finished = max(done for done in range(5) if sum(per_sample[:done]) < dies_after)
    assert first.counts["unet"] == dies_after
    assert second.counts["unet"] == sum(per_sample[finished:])
    assert sha256_folder(resumed) == sha256_folder(whole[0])
    assert again == whole[1]


def test_d9_what_another_recipe_left_is_not_taken_up(calibrate: Calibrate) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        Calls(patch, dies_after=4)
        calibrate("killed", fingerprint="2")
    with pytest.MonkeyPatch.context() as patch:
        calls = Calls(patch)
        calibrate("other", fingerprint="3")
    assert calls.counts["unet"] == 2 + 2 + 8 + 2


def test_d12_sizes_asked_for_and_processed_are_recorded(whole: tuple[Path, dict[str, Any]]) -> None:
    _, metrics = whole
    assert metrics["sizes"] == {
        "china": {"requested_px": [56, 56], "processed_px": [56, 56], "tiles": 4},
        "china-tile": {"requested_px": [32, 32], "processed_px": [32, 32], "tiles": 1},
    }
    assert metrics["warnings"] == []


def test_d12_a_short_side_below_768_is_recorded_for_a_model_of_stable_diffusions_size(run_folder: RunFolder) -> None:
    pipe = CheckpointArtifact(run_folder.stage_folder("10-checkpoint")).pipeline()
    pictures = {"small": torch.zeros(3, 191, 300), "large": torch.zeros(3, 193, 192)}
    assert record_sizes(pipe, RECIPE, pictures)["warnings"] == []
    pipe.stable_diffusion_size = True
    recorded = record_sizes(pipe, RECIPE, pictures)
    assert recorded["warnings"] == [
        "small: a short side of 764 pixels gives poor results with this model; use at least 768"
    ]
    assert recorded["sizes"]["small"]["requested_px"] == [764, 1200]
