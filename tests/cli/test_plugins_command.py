"""H3: `sdconvert plugins resolve` shows every selector of a conversion with what it finds, or what finds nothing."""

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from sdconvert.cli.app import main
from sdconvert.io.tensors import save_tensors

TO_Q = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
PLUGINS = r"""
plugin_unet:
  patch:
    _target_: sdconvert.plugins.PatchPluginBlock
    layers: ['re:mid_block\.attentions\.0$']
  lora1:
    _target_: sdconvert.plugins.LoraBlock
    layers: ['cls(Attention):re:mid_block.*attn1']
"""


def resolve(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, *arguments: str
) -> tuple[int, dict[str, Any]]:
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    with pytest.raises(SystemExit) as left:
        main(["--json", "plugins", "resolve", *arguments])
    return int(str(left.value.code)), json.loads(capsys.readouterr().out)


def test_h3_plugins_resolve_prints_every_match(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    lora, plugins = tmp_path / "style.safetensors", tmp_path / "plugins.yaml"
    plugins.write_text(PLUGINS)
    code, plain = resolve(capsys, monkeypatch, "pasd_tiny", "--config", str(plugins))
    assert code == 0
    found: dict[tuple[str, str, str], list[str]] = {}
    for match in plain["matches"]:
        found.setdefault((match["model"], match["plugin"], match["role"]), []).append(match["layer"])
    for graph in ("unet", "controlnet"):
        assert found[graph, "t_emb_input (TimeProjectionInput)", "patch"] == ["time_proj"]
    pixel = found["unet", "pasd (PixelAttentionPlugin)", "to"]
    assert pixel[0].startswith("up_blocks.0.")
    assert found["unet", "pasd (PixelAttentionPlugin)", "from"] == [""]
    heads = found["unet", "sha (SHAAttentionPatch)", "patch"]
    assert sum(".pixel_attentions." in path for path in heads) == 2 * len(pixel)
    assert found["unet", "patch (PatchPluginBlock)", "layers"] == ["mid_block.attentions.0"]
    attention = TO_Q.removesuffix(".to_q")
    assert found["unet", "lora1 (LoraBlock)", "layers"] == [
        f"{attention}.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")
    ]
    weights = {"lora_down": torch.zeros(2, 64), "lora_up": torch.zeros(64, 2)}
    name = f"lora_unet_{TO_Q.replace('.', '_')}"
    save_tensors({f"{name}.{part}.weight": tensor for part, tensor in weights.items()}, lora)
    code, answer = resolve(capsys, monkeypatch, "--set", f"checkpoint.loras=[{{path: {lora}, scale: 0.5}}]")
    assert code == 0
    (fused,) = [match for match in answer["matches"] if match["role"] == "fused"]
    assert (fused["plugin"], fused["layer"]) == ("style.safetensors x 0.5", TO_Q)


def test_h3_a_selector_that_finds_nothing_is_answered_with_the_nearest(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    plugins = tmp_path / "plugins.yaml"
    plugins.write_text(PLUGINS.replace(r"re:mid_block\.attentions\.0$", "mid_blok"))
    code, answer = resolve(capsys, monkeypatch, "pasd_tiny", "--config", str(plugins))
    assert code == 2
    assert "`mid_blok` matches no layer" in answer["error"]["message"]
    assert "`mid_block`" in answer["error"]["hint"]
