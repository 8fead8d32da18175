"""H2, H15: a configuration is data: it can be used again, its mistakes are named, and it attaches all or nothing."""

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from model_plugin import PReLUPatch
from omegaconf import OmegaConf
from torch import Tensor, nn

from sdconvert.errors import PluginError
from sdconvert.models.pasd import build_pasd
from sdconvert.plugins import (
    BasePluginBlock,
    LoraBlock,
    MultiPluginBlock,
    PatchPluginContainer,
    SinglePluginBlock,
    build_pipeline_plugins,
    build_plugins,
    read_plugin_config,
)

X = torch.linspace(-1, 1, 8).reshape(2, 4)


class Model(nn.Module):
    """Two blocks of a linear layer and an activation."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = (nn.Sequential(nn.Linear(4, 4), nn.SiLU()) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.b(self.a(x))
        return output


class Gate(SinglePluginBlock):
    """Takes an object as an argument, and swallows what it does not know, as the guide's classes do."""

    def __init__(self, name: str, host: nn.Module, act: nn.Module, **kwargs: Any) -> None:
        super().__init__(name, host)
        self.act = act

    def forward(self, fea_in: Any, fea_out: Tensor) -> Tensor:
        output: Tensor = self.act(fea_out)
        return output


class Sees(MultiPluginBlock):
    """Counts what it is linked to."""

    def __init__(self, name: str, from_layers: Any, to_layers: Any, host_model: Any = None, gain: float = 1.0) -> None:
        super().__init__(name, from_layers, to_layers, host_model)
        self.gain = gain

    def forward(self, features: list[Any]) -> list[Tensor]:
        return [self.gain * torch.ones(4)] * len(self.to_paths)


LORA = {"_target_": "sdconvert.plugins.LoraBlock", "rank": 2, "layers": ["re:[ab]$"]}
PRELU = {"_target_": "model_plugin.PReLUPatchEverywhere.wrap_model", "layers": [""]}
GATE = {"_target_": "test_build.Gate", "act": {"_target_": "torch.nn.PReLU", "init": 0.5}, "layers": ["a.0", "b.0"]}
SEES = {"_target_": "test_build.Sees", "from_layers": "a", "to_layers": ["pre_hook:b"], "gain": 2}


def plugins(model: nn.Module) -> list[BasePluginBlock]:
    return [module for module in model.modules() if isinstance(module, BasePluginBlock)]


@pytest.mark.parametrize("make", [dict, OmegaConf.create])
@pytest.mark.parametrize("partial", [{}, {"_partial_": True}])
def test_h15_a_config_is_reusable(make: Any, partial: dict[str, Any]) -> None:
    content = {name: entry | partial for name, entry in {"lora": LORA, "prelu": PRELU, "gate": GATE}.items()}
    cfg = make(copy.deepcopy(content))
    models = [Model(), Model()]
    for model in models:
        torch.manual_seed(1)
        groups = build_plugins(model, cfg)
        assert {name: list(group) for name, group in groups.items()} == {
            "lora": ["a.0", "b.0"],
            "prelu": ["a.1", "b.1"],
            "gate": ["a.0", "b.0"],
        }
    assert cfg == content
    assert list(models[0].state_dict()) == list(models[1].state_dict())
    assert torch.equal(models[0](X), models[1](X))
    assert not torch.equal(models[0](X), Model()(X))


def test_arguments_that_are_objects_are_made_for_each_layer() -> None:
    gates = build_plugins(Model(), {"gate": GATE})["gate"]
    assert isinstance(gates["a.0"].act, nn.PReLU)
    assert gates["a.0"].act.weight.item() == 0.5
    assert gates["a.0"].act is not gates["b.0"].act


def test_h2_wrap_model_of_the_whole_model_and_of_parts() -> None:
    model = Model()
    assert list(build_plugins(model, {"p": PRELU})["p"]) == ["a.1", "b.1"]
    model = Model()
    assert list(build_plugins(model, {"p": PRELU | {"layers": ["b"]}})["p"]) == ["b.1"]
    model = Model()
    assert list(build_plugins(model, {"p": PRELU | {"layers": "", "exclude_key": "^b"}})["p"]) == ["a.1"]


def test_h7_each_plugin_sees_the_model_with_those_before_it() -> None:
    model = Model()
    patch = {"_target_": "model_plugin.PReLUPatch", "layers": ["a.1"]}
    groups = build_plugins(model, {"first": patch, "second": patch | {"p": 0.5}, "seen": GATE | {"layers": ["a.1"]}})
    assert isinstance(model.a[1], PatchPluginContainer)
    assert model.a[1].plugin_names == ["first", "second"]
    assert isinstance(groups["seen"]["a.1"].host, PatchPluginContainer)
    hidden = model.a[0](X)
    summed = sum(nn.functional.prelu(hidden, torch.tensor(p)) for p in (0.2, 0.5))
    assert torch.allclose(model.a(X), nn.functional.prelu(summed, torch.tensor(0.5)))


def test_a_layer_at_two_paths_gets_one_plugin() -> None:
    model = Model()
    model.b[1] = model.a[1]
    group = build_plugins(model, {"p": {"_target_": "model_plugin.PReLUPatch", "layers": ["re:.*1$"]}})["p"]
    assert list(group) == ["a.1", "b.1"]
    assert len(group.plugins) == 1
    assert isinstance(group.plugins[0], PReLUPatch)
    assert model.a[1] is model.b[1]


def test_links_are_built_from_their_own_selectors() -> None:
    model = Model()
    group = build_plugins(model, {"sees": SEES})["sees"]
    assert group[""].to_paths == ["b"]
    stock = Model()
    assert torch.equal(model(X), stock.b(stock.a(X) + 2))


def test_a_plugin_that_knows_its_layers_takes_no_selectors() -> None:
    small = {"block_out_channels": [8, 16], "layers_per_block": 1, "cross_attention_dim": 12, "norm_num_groups": 4}
    small |= {"attention_head_dim": 2, "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"]}
    pasd, _ = build_pasd(
        small | {"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"]},
        small | {"conditioning_embedding_out_channels": [4, 4]},
    )
    keys = set(pasd.state_dict())
    pasd.pasd.remove()
    entry = {"_target_": "sdconvert.models.pixel_attention.PixelAttentionPlugin", "train": False}
    group = build_plugins(pasd, {"pasd": entry})["pasd"]
    assert set(pasd.state_dict()) == keys
    trained = {name for name, parameter in pasd.named_parameters() if parameter.requires_grad}
    assert keys - trained == {name for name in keys if "pixel_attentions" in name}
    group.remove()


def test_lr_and_train_are_kept() -> None:
    groups = build_plugins(Model(), {"a": LORA | {"lr": "1e-4", "train": False}, "b": LORA})
    assert groups["a"].lr == 1e-4
    assert groups["b"].lr is None
    assert not any(parameter.requires_grad for plugin in groups["a"].plugins for parameter in plugin.parameters())
    assert all(parameter.requires_grad for plugin in groups["b"].plugins for parameter in plugin.parameters())


MISTAKES: dict[str, tuple[Any, str]] = {
    "nothing": ({}, "has no plugins"),
    "no target": ({"bad": {"layers": ["a"]}}, "`bad` does not say what it is"),
    "no mapping": ({"bad": 4}, "`bad` does not say what it is"),
    "unknown module": ({"bad": LORA | {"_target_": "no_such.Module"}}, "`no_such.Module` cannot be made"),
    "no plugin": ({"bad": LORA | {"_target_": "torch.nn.Linear"}}, "`torch.nn.Linear` is no plugin"),
    "another method": ({"bad": LORA | {"_target_": "sdconvert.plugins.LoraBlock.find_layers"}}, "is no plugin"),
    "no selectors": ({"bad": {"_target_": LORA["_target_"]}}, r"\(LoraBlock\) takes `layers`, but has nothing"),
    "other selectors": ({"bad": SEES | {"layers": ["a"]}}, "takes `from_layers`, `to_layers`, but has `layers`"),
    "number": ({"bad": LORA | {"layers": [4]}}, "`layers` is no list of selectors"),
    "no match": ({"bad": LORA | {"layers": ["c"]}}, "selector `c` matches no layer"),
    "nothing below": ({"bad": LORA | {"layers": ["a.1"]}}, "LoraBlock finds no layer in SiLU"),
    "misspelt argument": ({"bad": LORA | {"alhpa": 1}}, "LoraBlock has no `alhpa`\nhint: its arguments: `rank`"),
    "missing argument": (
        {"bad": {"_target_": "model_plugin.Skip", "from_layer": "a", "to_layer": "re:[ab]$"}},
        r"1 and 2: from \[`a`\]",
    ),
    "lr": ({"bad": LORA | {"lr": "fast"}}, "lr 'fast' is no number"),
    "interpolation": ({"bad": LORA | {"alpha": "${nowhere}"}}, "cannot be resolved"),
    "argument": ({"bad": GATE | {"act": {"_target_": "torch.nn.PReLU", "initial": 1}}}, "cannot be made"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_mistakes_are_named_and_leave_the_model_untouched(mistake: str, structure: Any) -> None:
    cfg, message = MISTAKES[mistake]
    model = Model()
    before = structure(model)
    with pytest.raises(PluginError, match=message):
        build_plugins(model, {**({"good": LORA} if cfg else {}), **cfg})
    assert structure(model) == before


def test_sections_reach_their_models() -> None:
    pipeline = SimpleNamespace(unet=Model(), controlnet=Model(), text_encoder=None)
    cfg = {"plugin_unet": {"lora": LORA}, "plugin_controlnet": {"prelu": PRELU}}
    built = build_pipeline_plugins(pipeline, cfg)
    assert {type(plugin) for plugin in plugins(pipeline.unet)} == {LoraBlock}
    assert [list(group) for groups in built.values() for group in groups.values()] == [["a.0", "b.0"], ["a.1", "b.1"]]
    pipeline.text_encoder = Model()
    build_pipeline_plugins(pipeline, {"plugin_TE": {"lora": LORA}})
    assert len(plugins(pipeline.text_encoder)) == 2


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        ({"plugin_TE": {"lora": LORA}}, "`plugin_TE` is for a text_encoder, which is not loaded"),
        ({"plugin_unett": {"lora": LORA}}, "`plugin_unett` is no section .*\n.*plugin_unet, plugin_controlnet"),
        ({"plugin_controlnet": {"lora": LORA | {"layers": ["c"]}}}, "matches no layer"),
    ],
)
def test_no_section_is_attached_if_one_fails(cfg: Any, message: str, structure: Any) -> None:
    pipeline = SimpleNamespace(unet=Model(), controlnet=Model())
    before = structure(pipeline.unet)
    with pytest.raises(PluginError, match=message):
        build_pipeline_plugins(pipeline, {"plugin_unet": {"lora": LORA}, **cfg})
    assert structure(pipeline.unet) == before


FILE = r"""
plugin_unet:
  lora1:
    _target_: sdconvert.plugins.LoraBlock
    alpha: 1.0
    lr: 1e-4
    layers: ['re:[ab]$']
"""


def test_files_and_their_overrides(tmp_path: Path) -> None:
    path = tmp_path / "plugins.yaml"
    path.write_text(FILE)
    cfg = read_plugin_config(path, ["plugin_unet.lora1.alpha=0.5", "plugin_unet.lora1.rank=2"])
    group = build_plugins(Model(), cfg["plugin_unet"])["lora1"]
    assert group.lr == 1e-4
    assert float(group["a.0"].alpha) == 0.25
    for override in ("plugin_unet.lora2.alpha=1", "plugin_unett.lora1.alpha=1", "alpha=1"):
        with pytest.raises(PluginError, match=f"`{override}`: .* has no plugin"):
            read_plugin_config(path, [override])
    for text in ("- a\n", "a: [b\n"):
        path.write_text(text)
        with pytest.raises(PluginError, match="plugins.yaml"):
            read_plugin_config(path)
    with pytest.raises(PluginError, match="nowhere.yaml"):
        read_plugin_config(tmp_path / "nowhere.yaml")
