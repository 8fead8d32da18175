"""How strongly noise answers to prompt and control image, on models whose answer is known."""

import math
from collections.abc import Mapping

import pytest
import torch
from torch import Tensor

from sdconvert.pipelines.backend import GraphRunner
from sdconvert.pipelines.response import compare_responses, noise_differences

TEXT, NO_TEXT = torch.tensor([[1, 5, 9]]), torch.tensor([[1, 2, 2]])


def calls(count: int = 3) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    shapes = {
        "sample": (1, 1, 4, 4),
        "t_emb": (1, 2),
        "encoder_hidden_states": (1, 3, 1),
        "controlnet_cond": (1, 1, 4, 4),
    }
    return [{name: torch.rand(shape, generator=generator) for name, shape in shapes.items()} for _ in range(count)]


def chain(text: float = 1.0, control: float = 1.0, noise: float = 0.0) -> Mapping[str, GraphRunner]:
    """Noise that is the sample, plus the text's mean and the picture, each so many times; and something random."""
    generator = torch.Generator().manual_seed(1)

    def controlnet(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        picture = control * inputs["controlnet_cond"]
        return {"down_block_res_sample_0": picture, "mid_block_res_sample": 0 * picture}

    def unet(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        sample, t_emb, embeds, down, mid = inputs.values()
        assert list(inputs)[3:] == ["down_block_additional_residuals_0", "mid_block_additional_residual"]
        random = noise * torch.randn(sample.shape, generator=generator)
        return {"out_sample": sample + t_emb.mean() + text * embeds.mean() + down + mid + random}

    return {
        "text_encoder": lambda inputs: {"last_hidden_state": inputs["input_ids"].float()[..., None]},
        "controlnet": controlnet,
        "unet": unet,
    }


def test_differences_are_those_of_prompt_and_picture() -> None:
    found = noise_differences(chain(2.0, 3.0), calls(), TEXT, NO_TEXT)
    for call, text, control in zip(calls(), found["text"], found["control"], strict=True):
        torch.testing.assert_close(text, torch.full((1, 1, 4, 4), 2.0 * (5 - 5 / 3)))
        torch.testing.assert_close(control, 3.0 * (call["controlnet_cond"] - 0.5))


def test_a_model_that_hears_a_nineteenth_of_its_prompt_is_told() -> None:
    """As a release of Stable Diffusion 2.1 did whose other figures were good."""
    fp32, weak = (noise_differences(chain(one), calls(), TEXT, NO_TEXT) for one in (1.0, 1 / 19))
    compared = compare_responses(fp32, weak)
    for text, control in zip(compared["text"], compared["control"], strict=True):
        assert text["ratio"] == pytest.approx(1 / 19, rel=1e-3)
        assert text["gain"] == pytest.approx(1 / 19, rel=1e-3)
        assert control["ratio"] == pytest.approx(1, rel=1e-5)
        assert text["cosine"] == pytest.approx(1, rel=1e-6)


def test_noise_lengthens_and_turns_but_is_no_answer() -> None:
    fp32, noisy = (noise_differences(chain(0.1, noise=one), calls(64), TEXT, NO_TEXT) for one in (0.0, 0.5))
    compared = compare_responses(fp32, noisy)["text"]
    assert min(one["ratio"] for one in compared) > 1.2
    assert max(one["cosine"] for one in compared) < 0.9
    assert sum(one["gain"] for one in compared) / 64 == pytest.approx(1, abs=0.3)


def test_an_empty_prompt_has_no_answer_and_a_deaf_fp32_none_to_compare_with() -> None:
    assert list(noise_differences(chain(), calls(), NO_TEXT, NO_TEXT)) == ["control"]
    deaf = noise_differences(chain(0.0), calls(1), TEXT, NO_TEXT)
    assert math.isnan(compare_responses(deaf, deaf)["text"][0]["ratio"])
