"""Pictures from a bundle alone: the loop is the pipeline's, its calls are few, and no answer passes unseen."""

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from small_loop import NAMES, SMALL
from torch import Tensor

from sdconvert.adapters import ModelAdapter
from sdconvert.android.bench import bench
from sdconvert.android.closed_loop import draw_pictures, force_steps
from sdconvert.android.executors import Answered, Executor
from sdconvert.android.loop_files import Loop, LoopStep, loop_of, write_loop
from sdconvert.android.loop_scores import closed_loop, loop_page, teacher_forced
from sdconvert.android.manifest import GraphRecord, Manifest
from sdconvert.android.measure import Job
from sdconvert.android.runners import SimulatorRunner
from sdconvert.android.timing import Plan
from sdconvert.assets import asset_path
from sdconvert.cli.app import main
from sdconvert.errors import DeviceError, DeviceLostError, UsageError
from sdconvert.io.images import read_image
from sdconvert.pipelines.backend import GRAPHS, graph_adapters, swap_backends
from sdconvert.pipelines.pasd import PASDPipeline
from sdconvert.pipelines.response import predicted_noise
from sdconvert.qnn.simulator import Simulator

# Two tiles a picture and two sides: eight calls of the ControlNet in one go.
ARGUMENTS = SMALL | {"negative_prompt": "blurry", "num_inference_steps": 3, "guidance_scale": 2.0}
FIRST = ("sample", "t_emb", "encoder_hidden_states", "controlnet_cond")


class Fp32:
    """Answers with the fp32 models, and remembers what it was asked."""

    def __init__(self, adapters: Mapping[str, ModelAdapter]) -> None:
        self.adapters, self.calls = adapters, list[tuple[str, int, bool]]()

    def execute(self, graph: str, calls: Sequence[Mapping[str, Tensor]], *, keep: bool) -> Answered:
        self.calls.append((graph, len(calls), keep))
        # The models take inputs by their place, and a file does not keep the order of names.
        named = [{name: call[name] for name in (*FIRST, *call) if name in call} for call in calls]
        return Answered([self.adapters[graph].run(call) for call in named], [1.5] * len(calls))


@pytest.fixture(scope="module")
def pipe() -> PASDPipeline:
    return PASDPipeline.from_pretrained(asset_path("pasd_tiny"))


@pytest.fixture(scope="module")
def adapters(pipe: PASDPipeline) -> dict[str, ModelAdapter]:
    return graph_adapters(pipe, 1.0)


@pytest.fixture(scope="module")
def calls() -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {"sample": (1, 8, 8, 8), "t_emb": (1, 32), "encoder_hidden_states": (1, 77, 64)}
    return [
        {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
        | {"controlnet_cond": torch.rand(1, 3, 32, 32, generator=generator)}
        for _ in range(2)
    ]


@pytest.fixture(scope="module")
def drawn(
    bundle: Path,
    adapters: dict[str, ModelAdapter],
    calls: list[dict[str, Tensor]],
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[tuple[Path, Manifest]]:
    """The loop's part of a bundle, whose expected pictures were drawn by the pipeline itself."""
    pipe = PASDPipeline.from_pretrained(asset_path("pasd_tiny"))
    swap_backends(pipe, adapters, {name: adapter.run for name, adapter in adapters.items()})
    low = {name: torch.rand(3, 8, 12, generator=torch.Generator().manual_seed(i)) for i, name in enumerate(NAMES)}
    pictures = {name: pipe(picture, **ARGUMENTS) for name, picture in low.items()}
    runners = {name: adapters[name].run for name in ("controlnet", "unet")}
    with torch.no_grad():
        noise = [predicted_noise(runners, call) for call in calls]
    steps = [LoopStep(step, call, one, one + 0.5) for step, (call, one) in enumerate(zip(calls, noise, strict=True))]
    folder = tmp_path_factory.mktemp("loop")
    record = write_loop(
        Loop(
            model=asset_path("pasd_tiny"),
            arguments=ARGUMENTS,
            simulated_soc="SM8650",
            pictures={
                name: {"low_resolution": low[name], "fp32": picture, "simulator": (picture + 0.01).clamp(0, 1)}
                for name, picture in pictures.items()
            },
            steps=dict.fromkeys(NAMES, steps),
        ),
        folder,
    )
    manifest = Manifest.model_validate_json((bundle / "manifest.json").read_bytes())
    graphs = [GraphRecord(name=name, soc="SM8650", context="", epcontext="", inputs=(), outputs=()) for name in GRAPHS]
    yield folder, manifest.model_copy(update={"loop": record, "graphs": tuple(graphs)})


def test_pictures_from_the_bundle_are_the_pipelines_bit_for_bit(
    drawn: tuple[Path, Manifest], adapters: dict[str, ModelAdapter]
) -> None:
    executor = Fp32(adapters)
    found, shown = closed_loop(*drawn, executor, "SM8650")
    assert Counter(graph for graph, *_ in executor.calls) == found["invocations"]
    # A prompt is read side by side; all else of all pictures at once, and the residuals alone stay where they are.
    assert executor.calls == [
        *[("text_encoder", 2, False)] * 2,
        ("vae_encoder", 4, False),
        *[("controlnet", 8, True), ("unet", 8, False)] * 3,
        ("vae_decoder", 4, False),
    ]
    for name, figures in found["pictures"].items():
        assert figures["vs_fp32"]["bit_equal"]
        assert figures["vs_fp32"]["psnr_db"] == math.inf
        assert figures["vs_simulator"]["psnr_db"] == pytest.approx(40, abs=1)
        kinds = [f"{name}.{kind}.png" for kind in ("bench", "fp32", "simulator")]
        assert [shown[kind].shape for kind in kinds] == [(3, 32, 48)] * 3
        assert figures["png"] == f"pictures/{kinds[0]}"
        assert found["image_ms"][name] == pytest.approx(1.5 * (2 + 2 + 3 * 8 + 2))
    assert [step["unet"]["n"] for step in found["steps"]] == [8, 8, 8]
    page = "\n".join(loop_page({"closed_loop": found}, " (no device)"))
    assert "| chelsea-tile | fp32 | inf | inf | 1.0000 | 1.0000 | equal | 45.0 |" in page
    assert "ms (no device)" in page


def test_a_simulator_of_another_soc_is_no_yardstick(
    drawn: tuple[Path, Manifest], adapters: dict[str, ModelAdapter]
) -> None:
    [first, _] = teacher_forced(*drawn, Fp32(adapters), "SM8550")["steps"]
    assert "vs_simulator" not in first


def test_steps_are_measured_from_where_fp32_was(
    drawn: tuple[Path, Manifest], adapters: dict[str, ModelAdapter]
) -> None:
    executor = Fp32(adapters)
    found = teacher_forced(*drawn, executor, "SM8650")
    assert executor.calls == [("controlnet", 2, True), ("unet", 2, False)] * 2
    for index, step in enumerate(found["steps"]):
        assert (step["step"], step["calls"], step["vs_fp32"]["bit_equal"]) == (index, 2, True)
        assert not step["vs_simulator"]["bit_equal"]
        assert step["latency"]["unet"]["samples_ms"] == [1.5, 1.5]
    assert "| 0 | inf |" in "\n".join(loop_page({"teacher_forced": found}, ""))


def test_an_answer_that_is_no_number_stops_the_loop(
    drawn: tuple[Path, Manifest], adapters: dict[str, ModelAdapter]
) -> None:
    class Broken(Fp32):
        def execute(self, graph: str, calls: Sequence[Mapping[str, Tensor]], *, keep: bool) -> Answered:
            answered = super().execute(graph, calls, keep=keep)
            if graph == "unet":
                answered.outputs[1]["out_sample"][0, 0] = math.nan
            return answered

    for work in (draw_pictures, force_steps):
        with pytest.raises(DeviceError, match=r"graph `unet` answered NaN or infinity in `out_sample` for picture"):
            partial(work, *drawn, Broken(adapters))()


class Cut(Fp32):
    """Loses its phone when fp32's steps are asked for, so many times."""

    def __init__(self, adapters: Mapping[str, ModelAdapter], times: int) -> None:
        super().__init__(adapters)
        self._drawn, self._times = False, times

    def execute(self, graph: str, calls: Sequence[Mapping[str, Tensor]], *, keep: bool) -> Answered:
        if self._drawn and graph == "controlnet" and self._times:
            self._drawn, self._times = False, self._times - 1
            raise DeviceLostError("the connection broke", hint="again")
        self._drawn = graph == "vae_decoder"
        return super().execute(graph, calls, keep=keep)


def test_a_result_is_written_when_all_of_it_is_there(
    drawn: tuple[Path, Manifest], adapters: dict[str, ModelAdapter], bundle: Path, tmp_path: Path
) -> None:
    executor, out = Cut(adapters, times=1), tmp_path / "out"

    class Runner(SimulatorRunner):
        def executor(self, bundle: Path, manifest: Manifest) -> Executor:
            return executor

    plain = Manifest.model_validate_json((bundle / "manifest.json").read_bytes())
    record = loop_of(drawn[1])
    arguments = record.arguments | {"num_inference_steps": 1}
    once = record.model_copy(update={"arguments": arguments, "pictures": NAMES[:1], "steps": NAMES[:1]})
    # Beside the graph that is timed, those of another SoC are there in name, so that pictures can be drawn.
    named = [graph.model_copy(update={"soc": "SM8550"}) for graph in drawn[1].graphs]
    manifest = plain.model_copy(update={"graphs": (*plain.graphs, *named), "loop": once})
    folder = shutil.copytree(bundle, tmp_path / "bundle")
    shutil.copytree(drawn[0] / "loop", folder / "loop")
    job = Job(folder, manifest, Runner("SM8650", Simulator))
    older = out / "pictures/older.bench.png"
    older.parent.mkdir(parents=True)
    older.write_text("older")
    with pytest.raises(DeviceLostError):
        bench([job], [out], Plan(inferences=1))
    assert [path for path in out.rglob("*") if path.is_file()] == [older]
    [result] = bench([job], [out], Plan(inferences=1))
    told = [figures["png"] for figures in result["closed_loop"]["pictures"].values()]
    assert [read_image(out / name).shape for name in told] == [(3, 32, 48)]
    assert sorted(path.name for path in out.iterdir()) == ["bench.json", "bench.md", "pictures"]
    assert not older.exists()


def test_a_bundle_that_cannot_sample_says_so(
    drawn: tuple[Path, Manifest],
    adapters: dict[str, ModelAdapter],
    bundle: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    folder, manifest = drawn
    part = manifest.model_copy(update={"graphs": manifest.graphs[1:]})
    with pytest.raises(UsageError, match="lacks text_encoder"):
        draw_pictures(folder, part, Fp32(adapters))
    plain = Manifest.model_validate_json((bundle / "manifest.json").read_bytes())
    with pytest.raises(UsageError, match="bundle of `gate-test` holds nothing to sample with") as caught:
        bench([Job(bundle, plain, SimulatorRunner("SM8650", Simulator))], [tmp_path], Plan(loops=("closed",)))
    assert "package it again" in caught.value.hint
    with pytest.raises(SystemExit) as left:
        main(["--json", "bench", str(bundle), "--runner", "sim", "--loop", "both", "-o", str(tmp_path / "out")])
    assert left.value.code == 2
    assert "holds nothing to sample with" in json.loads(capsys.readouterr().out)["error"]["message"]
    assert not (tmp_path / "out").exists()


def test_a_manifest_whose_loop_refers_to_what_is_not_there_is_refused(
    drawn: tuple[Path, Manifest], bundle: Path
) -> None:
    plain = json.loads((bundle / "manifest.json").read_text())
    assert drawn[1].loop
    record = drawn[1].loop.model_dump() | {"simulated_soc": "SM8750"}
    with pytest.raises(ValueError, match=r"file loop/pictures/chelsea-tile\.safetensors.*soc SM8750"):
        Manifest.model_validate(plain | {"loop": record})
