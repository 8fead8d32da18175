"""A graph in a model's place answers the model's calls."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from static_graphs import Case, golden_case, shared_case, shared_simulation, vae_case
from torch import Tensor
from transformers import CLIPTextConfig, CLIPTextModel

from sdconvert.adapters.autoencoder_kl import AutoencoderKLAdapter, AutoencoderKLEncoderAdapter
from sdconvert.adapters.controlnet import ControlNetModelAdapter
from sdconvert.adapters.modeling_clip import CLIPTextModelAdapter
from sdconvert.adapters.unet_2d_condition import UNet2DConditionModelAdapter
from sdconvert.errors import UsageError
from sdconvert.pipelines.backend import GraphBackend, graph_adapters, swap_backends

CLIP = {"hidden_size": 8, "intermediate_size": 16, "num_attention_heads": 2, "num_hidden_layers": 1, "vocab_size": 99}


def call(backend: Any, case: Case) -> Any:
    arguments = dict(case.call)
    positional = [arguments.pop(name) for name in case.adapter.positional]
    return backend(*positional, **arguments)


def test_the_fp32_graph_of_a_unet_answers_as_the_unet() -> None:
    case = golden_case("unet")
    (answer,) = call(GraphBackend(case.adapter, case.adapter.run), case)
    torch.testing.assert_close(answer, case.call_model()[0], rtol=0, atol=2e-6)


def test_the_fp32_graph_of_a_controlnet_answers_as_the_controlnet() -> None:
    case = golden_case("controlnet")
    _, down, mid = call(GraphBackend(case.adapter, case.adapter.run), case)
    _, expected_down, expected_mid = case.call_model()
    assert len(down) == len(expected_down) == 8
    for tensor, reference in zip([*down, mid], [*expected_down, expected_mid], strict=True):
        torch.testing.assert_close(tensor, reference, rtol=0, atol=2e-6 * float(reference.abs().max()))


def test_a_simulation_is_a_runner() -> None:
    case, simulation = shared_case("small_controlnet"), shared_simulation("small_controlnet")
    _, down, mid = call(GraphBackend(case.adapter, simulation), case)
    expected = list(simulation(case.samples[0]).values())
    assert len(expected) == 5
    assert all(map(torch.equal, [*down, mid], expected))


def test_a_call_that_the_graph_cannot_answer_is_refused() -> None:
    case = golden_case("controlnet")
    backend = GraphBackend(case.adapter, case.adapter.run)
    with pytest.raises(UsageError, match="conditioning_scale 0.5"):
        backend(**case.call, conditioning_scale=0.5)


def test_models_are_swapped_by_graph_name() -> None:
    pipe: Any = SimpleNamespace(
        text_encoder=CLIPTextModel(CLIPTextConfig(**CLIP)).eval(),
        controlnet=golden_case("controlnet").adapter.model,
        unet=golden_case("unet").adapter.model,
        vae=vae_case().adapter.model,
        vae_encoder=None,
        vae_decoder=None,
    )
    original = pipe.controlnet
    adapters = graph_adapters(pipe, conditioning_scale=0.75)
    assert list(adapters) == ["text_encoder", "vae_encoder", "controlnet", "unet", "vae_decoder"]
    assert all(adapter.graph_name == name for name, adapter in adapters.items())
    kinds = [
        CLIPTextModelAdapter,
        AutoencoderKLEncoderAdapter,
        ControlNetModelAdapter,
        UNet2DConditionModelAdapter,
        AutoencoderKLAdapter,
    ]
    assert [type(adapter) for adapter in adapters.values()] == kinds
    controlnet: Any = adapters["controlnet"]
    assert controlnet.conditioning_scale == 0.75
    config = pipe.text_encoder.config
    swap_backends(pipe, adapters, {name: adapters[name].run for name in adapters if name != "controlnet"})
    assert pipe.controlnet is original
    assert isinstance(pipe.unet, GraphBackend)
    assert pipe.text_encoder.config is config
    latents = torch.randn(1, 4, 8, 8)
    picture = pipe.vae_decoder(latents)
    assert isinstance(picture, Tensor)
    torch.testing.assert_close(picture, pipe.vae.decode(latents).sample.detach(), rtol=0, atol=2e-6)
    posterior = pipe.vae.encode(picture).latent_dist
    torch.testing.assert_close(pipe.vae_encoder(picture), posterior.parameters.detach(), rtol=0, atol=2e-5)
