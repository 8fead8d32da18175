"""Forms of attention at the size of Stable Diffusion: the same function, and the product's compiles in a fraction.

docs/mha2sha.md, "The form per head", has the figures of all of them.
"""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "attention_forms.py"


@pytest.fixture(scope="module")
def forms() -> ModuleType:
    spec = importlib.util.spec_from_file_location(BENCHMARK.stem, BENCHMARK)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("cross", [False, True])
def test_every_form_computes_the_same(forms: ModuleType, cross: bool) -> None:
    answers = {}
    for form in forms.FORMS:
        case = forms.Case(form, cross, 256)
        answers[form] = case.adapter().run(case.samples()[0])["y"]
    for answer in answers.values():
        torch.testing.assert_close(answer, answers["mha"], rtol=0, atol=1e-5)


@pytest.mark.slow
def test_at_4096_tokens_it_takes_half_of_the_naive_form_at_most(forms: ModuleType, tmp_path: Path) -> None:
    """320 channels, 8 heads, 64x64: the peak of the compiling process, and the context beyond its weights."""
    naive, ours = (
        forms.measure(forms.Case(form, False, 4096), "SM8650", tmp_path, simulate=False) for form in ("naive", "sha")
    )
    assert ours.peak_bytes <= naive.peak_bytes / 2
    assert ours.context_bytes <= naive.context_bytes / 2
