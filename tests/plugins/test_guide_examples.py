"""H1: the guide's five examples do what it says, from Python and from its YAML, with only the import changed."""

import copy
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from model_plugin import ControlNetPlugin, LohaLayer, LoraBlock, PReLUPatch, PReLUPatchEverywhere, Skip
from omegaconf import OmegaConf
from torch import Tensor, nn

from sdconvert.errors import PluginError
from sdconvert.plugins import build_plugins, feeding, match_layers

WIDTHS = [8, 8, 16, 16]


def build_unet() -> UNet2DConditionModel:
    """SD1.5's four blocks of two layers each, narrow; linear projections, as the guide's Skip needs them."""
    torch.manual_seed(0)
    unet = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=WIDTHS,
        layers_per_block=2,
        cross_attention_dim=6,
        attention_head_dim=2,
        norm_num_groups=4,
        use_linear_projection=True,
    )
    return unet.eval()


@pytest.fixture
def unet() -> UNet2DConditionModel:
    return build_unet()


INPUTS: tuple[Any, ...] = (
    torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8),
    3,
    torch.linspace(-1, 1, 30).reshape(1, 5, 6),
)


@torch.no_grad()
def run(unet: nn.Module, **kwargs: Any) -> Tensor:
    output: Tensor = unet(*INPUTS, **kwargs).sample
    return output


def from_yaml(unet: nn.Module, text: str) -> Any:
    """What `plugin_unet` of a guide's YAML builds."""
    return build_plugins(unet, OmegaConf.create(text).plugin_unet)


def close(x: Tensor, reference: Tensor) -> bool:
    return bool((x - reference).abs().max() <= 1e-5 * reference.abs().max())


LORA_YAML = r"""
plugin_unet:
  lora1:
    _target_: model_plugin.LoraBlock
    _partial_: True # 必须加
    lr: 1e-4 # 这部分模块的学习率
    alpha: 0.5 # LoraBlock模块声明的参数
    rank: 4 # slip: LoraBlock has no default for it, and the guide's YAML leaves it out
    layers: # 添加到哪些层上
      - 're:.*\.attn.?$'
      - 're:.*\.ff$'
"""


def lora_layers(unet: nn.Module) -> list[str]:
    inside = match_layers([r"re:.*\.attn.?\.", r"re:.*\.ff\."], unet)
    return [match.path for match in inside if isinstance(match.module, nn.Linear)]


def test_h1_lora_from_yaml(unet: Any) -> None:
    stock, expected_paths = build_unet(), lora_layers(unet)
    group = from_yaml(unet, LORA_YAML)["lora1"]
    assert list(group) == expected_paths
    assert group.lr == 1e-4
    for path, plugin in group.items():
        assert plugin is unet.get_submodule(path).lora_block_lora1
        assert float(plugin.alpha) == 0.5 / 4
        layer = plugin.layer
        with torch.no_grad():
            stock.get_submodule(path).weight += plugin.alpha * layer.lora_up.weight @ layer.lora_down.weight
    assert not close(run(unet), run(build_unet()))
    assert close(run(unet), run(stock))


def test_h1_lora_from_python(unet: Any) -> None:
    layer = unet.mid_block.resnets[0].conv1
    x = torch.randn(1, 16, 4, 4)
    before = layer(x)
    plugin = LoraBlock(7, layer, rank=2)
    assert torch.allclose(layer(x), before + plugin.layer(x) / 2)
    with pytest.raises(NotImplementedError, match="No lora"):
        LoraBlock(7, unet.conv_norm_out, rank=2)
    group = LoraBlock.wrap_model(8, unet, rank=2)
    assert list(group) == [
        p for p, m in unet.named_modules() if isinstance(m, nn.Linear | nn.Conv2d) and "lora_" not in p
    ]


LOHA_YAML = r"""
plugin_unet:
  loha1:
    _target_: model_plugin.LohaLayer
    rank: 2
    layers: ['re:.*\.attn.?$']
"""


@pytest.mark.parametrize("way", ["python", "yaml"])
def test_h1_loha_stands_in_for_the_weight(unet: Any, way: str) -> None:
    stock = build_unet()
    if way == "python":
        group = {"mid_block.resnets.0.conv1": LohaLayer("loha1", unet.mid_block.resnets[0].conv1, rank=2)}
    else:
        group = from_yaml(unet, LOHA_YAML)["loha1"]
    for path, plugin in group.items():
        weight = stock.get_submodule(path).weight
        with torch.no_grad():
            weight += plugin.layer(weight) * plugin.alpha
    assert not close(run(unet), run(build_unet()))
    assert close(run(unet), run(stock))


SKIP_YAML = """
plugin_unet:
  loha1:
    _target_: model_plugin.SkipIn
    _partial_: True # 必须加
    lr: 1e-4 # 这部分模块的学习率

    from_layer:
      - 're:.*proj_in$'
    to_layer:
      - 'prehook:re:.*proj_out$'
"""


def test_h1_skip_from_yaml_changes_what_enters(unet: Any) -> None:
    stock = build_unet()
    group = from_yaml(unet, SKIP_YAML)["loha1"]
    assert len(group) == len(match_layers("re:.*proj_out$", unet)) == 16
    seen: dict[str, Tensor] = {}
    for path, plugin in group.items():
        source, target = stock.get_submodule(path), stock.get_submodule(path.replace("proj_in", "proj_out"))
        source.register_forward_pre_hook(lambda module, args, path=path: seen.update({path: args[0]}))
        layer = copy.deepcopy(plugin.layer)
        target.register_forward_pre_hook(lambda module, args, path=path, layer=layer: (args[0] + layer(seen[path]),))
    assert not close(run(unet), run(build_unet()))
    assert close(run(unet), run(stock))


def test_h1_skip_from_python(unet: Any) -> None:
    expected = run(unet)
    layers = match_layers(["mid_block.attentions.0.proj_in", "mid_block.attentions.0.proj_out"], unet)
    plugin = Skip("skip", *layers)
    assert not close(run(unet), expected)
    nn.init.zeros_(plugin.layer.weight)
    nn.init.zeros_(plugin.layer.bias)
    assert torch.equal(run(unet), expected)


CONTROLNET_YAML = """
plugin_unet:
  controlnet1:
    _target_: model_plugin.ControlNetPlugin
    _partial_: True
    lr: 1e-4
    cond_block_channels: [3, 4, 4, 8] # these three: the width of the test's model
    layers_per_block: 2
    block_out_channels: [8, 8, 16, 16]
    from_layers:
      - 'pre_hook:' #获取模型输入
      - 'pre_hook:conv_in' # 让forward在autocast范围内
    to_layers:
      - 'down_blocks.0'
      - 'down_blocks.1'
      - 'down_blocks.2'
      - 'down_blocks.3'
      - 'mid_block'
      - 'pre_hook:up_blocks.3.resnets.2'
"""


@pytest.mark.parametrize("way", ["python", "yaml"])
def test_h1_controlnet_equals_diffusers_own(unet: Any, way: str) -> None:
    entry = OmegaConf.create(CONTROLNET_YAML).plugin_unet.controlnet1
    if way == "yaml":
        plugin = from_yaml(unet, CONTROLNET_YAML)["controlnet1"][""]
    else:
        layers = [match_layers(list(entry[key]), unet) for key in ("from_layers", "to_layers")]
        plugin = ControlNetPlugin("controlnet1", *layers, unet, list(entry.cond_block_channels), 2, WIDTHS)
    controlnet = plugin.net.eval()
    for parameter in controlnet.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.2)
    cond = torch.linspace(0, 1, 3 * 16 * 16).reshape(1, 3, 16, 16)
    with torch.no_grad():
        down, mid = controlnet(*INPUTS, cond, return_dict=False)
    stock = build_unet()
    expected = run(stock, down_block_additional_residuals=down, mid_block_additional_residual=mid)
    assert not close(expected, run(stock))
    with feeding(unet, cond=cond):
        assert close(run(unet), expected)
    assert not hasattr(plugin, "cond")
    with pytest.raises(AttributeError, match="cond"):
        run(unet)


PRELU_YAML = """
plugin_unet:
  prelu:
    _target_: model_plugin.PReLUPatch
    _partial_: True
    lr: 1e-4
    layers:
      - 're:.*nonlinearity$'
"""
PRELU_EVERYWHERE_YAML = """
plugin_unet:
  prelu:
    _target_: model_plugin.PReLUPatchEverywhere.wrap_model
    _partial_: True
    lr: 1e-4
    layers:
      - ''
"""


def with_prelu(only: str) -> nn.Module:
    """A stock UNet whose activations at paths that end so are another class."""
    stock = build_unet()
    for path, module in list(stock.named_modules()):
        if isinstance(module, nn.SiLU) and path.endswith(only):
            stock.set_submodule(path, nn.PReLU(init=0.2))
    return stock


@pytest.mark.parametrize(
    ("attach", "only"),
    [
        (lambda unet: from_yaml(unet, PRELU_YAML), "nonlinearity"),
        (lambda unet: from_yaml(unet, PRELU_EVERYWHERE_YAML), ""),
        (lambda unet: PReLUPatchEverywhere.wrap_model("prelu", unet), ""),
        (
            lambda unet: [
                PReLUPatch("prelu", match.module, host_model=unet) for match in match_layers("re:.*nonlinearity$", unet)
            ],
            "nonlinearity",
        ),
    ],
)
def test_h1_prelu_takes_the_place_of_silu(unet: Any, attach: Any, only: str) -> None:
    attach(unet)
    assert not close(run(unet), run(build_unet()))
    assert torch.equal(run(unet), run(with_prelu(only)))


@pytest.mark.parametrize("text", [LORA_YAML, LOHA_YAML, SKIP_YAML, CONTROLNET_YAML, PRELU_YAML, PRELU_EVERYWHERE_YAML])
def test_h1_examples_come_off_again(unet: Any, structure: Any, text: str) -> None:
    before, expected = structure(unet), run(unet)
    for group in from_yaml(unet, text).values():
        group.remove()
    assert structure(unet) == before
    assert torch.equal(run(unet), expected)


def test_h1_single_and_patch_plugins_take_no_prehook(unet: Any) -> None:
    for text in (LORA_YAML.replace("'re:", "'prehook:re:"), PRELU_YAML.replace("'re:", "'prehook:re:")):
        with pytest.raises(PluginError, match="nothing that a .* can hang on"):
            from_yaml(unet, text)
