"""H13: low-rank plugins begin without effect, and fused they are the weight that they computed with."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sdconvert.errors import PluginError
from sdconvert.plugins import LohaBlock, LoraBlock, PatchPluginBlock, SinglePluginBlock, require_fused

LAYERS: dict[str, tuple[Any, tuple[int, ...]]] = {
    "linear": (lambda: nn.Linear(12, 20), (2, 5, 12)),
    "linear without bias": (lambda: nn.Linear(12, 20, bias=False), (2, 12)),
    "conv 1x1": (lambda: nn.Conv2d(8, 12, 1), (2, 8, 6, 5)),
    "conv 3x3": (lambda: nn.Conv2d(8, 12, 3, padding=1), (2, 8, 6, 5)),
    "strided": (lambda: nn.Conv2d(8, 12, 3, stride=2, padding=1, dilation=2), (1, 8, 9, 9)),
    "groups": (lambda: nn.Conv2d(8, 12, 3, padding=1, groups=4), (2, 8, 6, 5)),
    "depthwise": (lambda: nn.Conv2d(8, 8, 3, padding=1, groups=8), (2, 8, 6, 5)),
    "circular": (lambda: nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular"), (1, 4, 5, 5)),
    "same": (lambda: nn.Conv2d(4, 4, (3, 1), padding="same"), (1, 4, 5, 5)),
}
KINDS: dict[str, Any] = {
    "lora": lambda host: LoraBlock(0, host, rank=3, alpha=2.0),
    "lora unscaled": lambda host: LoraBlock(0, host, rank=2, alpha=0.3, alpha_auto_scale=False),
    "loha": lambda host: LohaBlock(0, host, rank=2, alpha=0.5),
}


def fill(plugin: nn.Module) -> None:
    """Give every parameter a value that shows."""
    for parameter in plugin.parameters():
        nn.init.normal_(parameter, std=0.5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer", LAYERS)
def test_h13_fuse_keeps_the_outputs(layer: str, kind: str, structure: Any) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    model = nn.Sequential(make()).eval()
    x, before = torch.randn(shape), structure(model)
    stock = model(x)
    plugin = KINDS[kind](model[0])
    assert torch.equal(model(x), stock)
    fill(plugin)
    expected = model(x)
    assert (expected - stock).abs().max() > 1e-2
    plugin.fuse()
    assert (model(x) - expected).abs().max() <= 1e-5
    assert structure(model) == before
    require_fused(model)
    for again in (plugin.fuse, plugin.remove):
        with pytest.raises(PluginError, match="not attached"):
            again()


@pytest.mark.parametrize("layer", ["linear", "conv 1x1", "conv 3x3", "groups"])
def test_h13_biases_are_fused_too(layer: str) -> None:
    torch.manual_seed(0)
    make, shape = LAYERS[layer]
    host, x = make(), torch.randn(shape)
    plugin = LoraBlock(0, host.eval(), rank=2, bias=True)
    fill(plugin)
    expected = host(x)
    plugin.fuse()
    assert (host(x) - expected).abs().max() <= 1e-5
    with pytest.raises(PluginError, match="has no bias"):
        LoraBlock(0, nn.Linear(2, 2, bias=False), bias=True)


@settings(deadline=None, max_examples=40)
@given(
    groups=st.integers(1, 4),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    rank=st.integers(1, 5),
    alpha=st.floats(-4, 4),
    seed=st.integers(0, 2**31),
)
def test_h13_a_convolution_of_any_shape(
    groups: int, channels: tuple[int, int], kernel: tuple[int, int], rank: int, alpha: float, seed: int
) -> None:
    torch.manual_seed(seed)
    host = nn.Conv2d(channels[0] * groups, channels[1] * groups, kernel, padding=1, groups=groups).double().eval()
    x = torch.randn(1, channels[0] * groups, 4, 4, dtype=torch.double)
    plugin = LoraBlock("any", host, rank, alpha=alpha)
    fill(plugin)
    with torch.no_grad():
        expected = host(x)
        plugin.fuse()
        assert torch.allclose(host(x), expected, atol=1e-10)


def test_h13_several_loras_on_one_layer_fuse_in_any_order() -> None:
    host = nn.Linear(4, 4).eval()
    plugins = [LoraBlock(i, host, rank=2) for i in range(3)]
    for plugin in plugins:
        fill(plugin)
    x = torch.randn(2, 4)
    expected = host(x)
    for index in (1, 2, 0):
        plugins[index].fuse()
    assert (host(x) - expected).abs().max() <= 1e-5


class Double(SinglePluginBlock):
    """Doubles an output, or a weight."""

    def forward(self, *args: Any) -> Any:
        return 2 * args[-1]


@pytest.mark.parametrize("hook_param", [None, "weight"])
def test_h13_lora_behind_another_plugin_is_not_fused_before_it(hook_param: str | None) -> None:
    host = nn.Linear(4, 4).eval()
    other = Double("twice", host, hook_param)
    lora = LoraBlock(0, host)
    fill(lora)
    weight = host.weight.detach().clone()
    with pytest.raises(PluginError, match="builds on plugin `twice`"):
        lora.fuse()
    assert lora.attached
    assert torch.equal(host.weight, weight)
    x = torch.randn(2, 4)
    other.remove()
    expected = host(x)
    lora.fuse()
    assert (host(x) - expected).abs().max() <= 1e-5


def test_h13_an_earlier_lora_is_fused_under_a_later_plugin() -> None:
    host = nn.Linear(4, 4).eval()
    lora = LoraBlock(0, host)
    fill(lora)
    Double("twice", host)
    x = torch.randn(2, 4)
    expected = host(x)
    lora.fuse()
    assert (host(x) - expected).abs().max() <= 1e-5


def test_lora_in_a_patched_layer_belongs_to_the_layer() -> None:
    model = nn.Sequential(nn.Linear(4, 4)).eval()

    class Negated(PatchPluginBlock):
        def post_forward(self, output: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            return -output

    Negated("negated", model[0], host_model=model)
    lora = LoraBlock(0, model[0])
    fill(lora)
    x = torch.randn(2, 4)
    expected = model(x)
    lora.fuse()
    assert (model(x) - expected).abs().max() <= 1e-5


@pytest.mark.parametrize("plugin_class", [LoraBlock, LohaBlock])
def test_what_has_no_low_rank_product_is_refused(plugin_class: Any, structure: Any) -> None:
    for host, options, message in ((nn.Linear(2, 2), {"rank": 0}, "not positive"), (nn.LayerNorm(2), {}, "LayerNorm")):
        before = structure(host)
        with pytest.raises(PluginError, match=message):
            plugin_class(0, host, **options)
        assert structure(host) == before


@pytest.mark.parametrize("plugin_class", [LoraBlock, LohaBlock])
def test_gradients_reach_the_plugin_and_dropout_is_for_training(plugin_class: Any) -> None:
    torch.manual_seed(0)
    host = nn.Linear(16, 16).train()
    plugin = plugin_class(0, host, rank=8, dropout=0.5)
    fill(plugin)
    x = torch.randn(4, 16)
    host(x).square().sum().backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in plugin.parameters())
    assert not torch.equal(host(x), host(x))
    expected = host.eval()(x)
    assert torch.equal(host(x), expected)
    host.train()
    plugin.fuse()
    assert (host(x) - expected).abs().max() <= 1e-5


def test_every_layer_of_a_unet_is_wrapped_and_fused(tiny_unet: Any, unet_inputs: dict[str, Any]) -> None:
    keys = list(tiny_unet.state_dict())
    layers = [path for path, module in tiny_unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    group = LoraBlock.wrap_model("style", tiny_unet, rank=2)
    assert list(group) == layers
    for plugin in group.plugins:
        fill(plugin)
    with torch.no_grad():
        expected = tiny_unet(**unet_inputs).sample
        group.fuse()
        assert (tiny_unet(**unet_inputs).sample - expected).abs().max() <= 1e-4 * expected.abs().max()
    assert list(tiny_unet.state_dict()) == keys
