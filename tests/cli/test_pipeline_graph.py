"""`sdconvert pipeline graph` (D13)."""

import json
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch

from sdconvert.cli.app import main
from sdconvert.io import tensors

Call = Callable[..., tuple[int, str, str]]


@pytest.fixture
def call(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Call:
    """Run the command line in this process: exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # `main` installs its own

    def run(*arguments: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            main([*arguments])
        streams = capsys.readouterr()
        return int(left.value.code or 0), streams.out, streams.err

    return run


def test_d13_the_graph_comes_from_the_declarations(call: Call) -> None:
    code, out, _ = call("--json", "pipeline", "graph", "--split", "unet", "--split", "controlnet")
    found = json.loads(out)
    assert code == 0
    assert found["pipeline"] == "PASDPipeline"
    assert found["models"] == ["text_encoder", "vae_encoder", "unet", "controlnet", "vae_decoder"]
    by_name = {unit["unit"]: unit for unit in found["units"]}
    assert [name for name, unit in by_name.items() if not unit["ahead"]] == ["DenoisingLoop", "Decoder", "ColorFix"]
    prompt = by_name["PromptEmbedder"]
    assert prompt["mode"] == "separate CFG"
    assert (prompt["writes"], list(prompt["models"])) == (["prompt_embeds"], ["text_encoder"])
    assert by_name["DenoisingLoop"]["reads"]["latents"] == "LatentsInitializer"
    assert by_name["DenoisingLoop"]["reads"]["observer"] == ""
    assert by_name["Decoder"]["reads"]["latents"] == "DenoisingLoop"


def test_d13_the_table_shows_units_reads_writes_and_models(call: Call) -> None:
    code, out, _ = call("pipeline", "graph", "StableDiffusionPipeline")
    words = " ".join(out.split())
    assert code == 0
    assert "StableDiffusionPipeline: 6 units" in words
    for text in ("SizeChecker", "separate CFG", "sampling_shape", "text_encoder", "latents ← InitialNoise", "unet"):
        assert text in words


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["PASDPipelin"], "no pipeline is called `PASDPipelin`", "did you mean `PASDPipeline`"),
        (["--split", "unett"], "no unit calls the model 'unett'", "did you mean `unet`"),
    ],
)
def test_d13_an_unknown_name_is_refused(call: Call, arguments: list[str], message: str, hint: str) -> None:
    code, _, err = call("pipeline", "graph", *arguments)
    assert code == 2
    assert message in err
    assert hint in err


@pytest.mark.parametrize(
    ("name", "models"),
    [
        ("StableDiffusionXLPipeline", ["text_encoder", "text_encoder_2", "unet", "controlnet", "vae_decoder"]),
        ("StableDiffusionControlNetPipeline", ["text_encoder", "unet", "controlnet", "vae_decoder"]),
        ("PixArtAlphaPipeline", ["text_encoder", "transformer", "vae_decoder"]),
    ],
)
def test_d13_no_model_is_made_and_no_weights_are_read(
    call: Call, monkeypatch: pytest.MonkeyPatch, name: str, models: list[str]
) -> None:

    def refuse(*args: Any, **keywords: Any) -> None:
        raise AssertionError("a model is made, or weights are read")

    for door in ("load_file", "safe_open"):
        monkeypatch.setattr(tensors, door, refuse)
    monkeypatch.setattr(torch, "load", refuse)
    monkeypatch.setattr(torch.nn.Module, "__init__", refuse)
    code, out, _ = call("--json", "pipeline", "graph", name)
    assert code == 0
    assert json.loads(out)["models"] == models
