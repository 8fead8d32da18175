"""The worked example of docs/writing_a_unit.md, run from the page."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_diffusers import sd15

from sdconvert.errors import MissingModelError, UsageError

PAGE = Path(__file__).parents[2] / "docs" / "writing_a_unit.md"
PYTHON = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def program() -> dict[str, Any]:
    """The names that the page's program leaves behind."""
    parts = sd15().components
    models = {name: parts[name] for name in ("unet", "vae", "text_encoder", "tokenizer", "scheduler")}
    names: dict[str, Any] = {"models": models, "__name__": "page"}
    blocks = PYTHON.findall(PAGE.read_text(encoding="utf-8"))
    assert len(blocks) == 6
    for block in blocks:
        with torch.no_grad():
            exec(compile(block, str(PAGE), "exec"), names)
    return names


def test_the_page_runs_and_its_assertions_hold(program: dict[str, Any]) -> None:
    assert (program["posi"], program["nega"])[0]["words"] == 5


def test_d5_the_unit_of_the_page_is_triggered_by_its_input(program: dict[str, Any]) -> None:
    pipe = program["BrightPipeline"](**program["models"])
    pipe.vae = None
    assert pipe("a cat", num_inference_steps=1).shape == (3, 16, 16)
    with pytest.raises(MissingModelError, match="'vae', which is not loaded for the given brightness"):
        pipe("a cat", num_inference_steps=1, brightness=0.3)


def test_the_unit_of_the_page_refuses_what_it_cannot_do(program: dict[str, Any]) -> None:
    pipe = program["BrightPipeline"](**program["models"])
    with pytest.raises(UsageError, match="brightness=2.0 is out of range"):
        pipe("a cat", num_inference_steps=1, brightness=2.0)
