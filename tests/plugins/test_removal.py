"""H5: over the whole module tree of three UNets, whatever is attached comes off without a trace."""

import copy
import random
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch
from diffusers import UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from sdconvert.models.pasd import build_pasd
from sdconvert.plugins import (
    BasePluginBlock,
    MultiPluginBlock,
    PatchPluginBlock,
    PluginBlock,
    SinglePluginBlock,
    feeding,
    match_layers,
)
from sdconvert.plugins.base import unwrap
from sdconvert.plugins.selectors import iter_layers

SMALL: dict[str, Any] = {
    "block_out_channels": [8, 16],
    "down_block_types": ["CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D"],
    "layers_per_block": 1,
    "cross_attention_dim": 12,
    "attention_head_dim": 2,
    "norm_num_groups": 4,
}
SDXL: dict[str, Any] = SMALL | {
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "UpBlock2D"],
    "transformer_layers_per_block": [1, 2],
    "attention_head_dim": [2, 4],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 4,
    "projection_class_embeddings_input_dim": 6 * 4 + 10,
}
KINDS = ("single", "param", "pair", "multi", "patch")


@dataclass(frozen=True)
class Fixture:
    """A UNet, a call of it, and its layers."""

    model: nn.Module
    call: dict[str, Any]

    @torch.no_grad()
    def run(self) -> Tensor:
        output: Tensor = self.model(**self.call, return_dict=False)[0]
        return output


@cache
def fixture(name: str) -> Fixture:
    """Built once: that a test leaves no trace in it is what is tested."""
    torch.manual_seed(0)
    call: dict[str, Any] = {"sample": torch.randn(1, 4, 8, 8), "timestep": 3}
    call["encoder_hidden_states"] = torch.randn(1, 5, 12)
    if name == "pasd":
        shapes = [(1, 8, 8, 8), (1, 8, 8, 8), (1, 8, 4, 4), (1, 16, 4, 4)]
        residuals = {
            "down_block_additional_residuals": [torch.randn(shape) for shape in shapes],
            "mid_block_additional_residual": torch.randn(1, 16, 4, 4),
        }
        controlnet = {key: value for key, value in SMALL.items() if key != "up_block_types"}
        unet, _ = build_pasd(SMALL, controlnet | {"conditioning_embedding_out_channels": [4, 4]})
        return Fixture(unet, call | residuals)
    if name == "sdxl":
        call["added_cond_kwargs"] = {"text_embeds": torch.randn(1, 10), "time_ids": torch.arange(6.0)[None]}
    return Fixture(UNet2DConditionModel(**(SDXL if name == "sdxl" else SMALL)).eval(), call)


class Seen(SinglePluginBlock):
    """Sees a call and changes nothing."""

    def forward(self, *args: Any) -> Any:
        return args[0] if self.hook_param else None


class Pair(PluginBlock):
    """Needs what it is given."""

    def to_layer_hook(self, host: Any, fea_in: Any, fea_out: Any, fea_kwargs: Any = None) -> None:
        return None


class Multi(MultiPluginBlock):
    """Counts the layers that have run, and puts a child into another module."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._graft(self.host_model.get_submodule("mid_block.resnets.0"), "grafted", nn.Linear(1, 1))

    def from_layer_hook(self, host: Any, fea_in: Any, fea_out: Any, idx: int) -> None:
        self.feat_from[idx] = fea_in

    def to_layer_hook(self, host: Any, fea_in: Any, fea_out: Any, idx: int) -> None:
        return None


class Around(PatchPluginBlock):
    """Passes everything on, and has a parameter."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.gain = nn.Parameter(torch.ones(1))


def attach(kind: str, name: str, paths: list[str], model: nn.Module) -> list[BasePluginBlock]:
    """One plugin per layer, or one for all of them."""
    matches = match_layers(paths, model)
    if kind == "multi":
        return [Multi(name, matches, list(reversed(matches)), host_model=model)]
    attachers: dict[str, Callable[[Any], BasePluginBlock]] = {
        "single": lambda match: Seen(name, match.module),
        "param": lambda match: Seen(name, match.module, hook_param=next(iter(weights(unwrap(match.module))))),
        "pair": lambda match: Pair(name, match, matches[-1]),
        "patch": lambda match: Around(name, match.module, host_model=model),
    }
    return [attachers[kind](match) for match in matches]


def weights(module: nn.Module) -> list[str]:
    """Names of a layer's own parameters."""
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter is not None]


def candidates(kind: str, model: nn.Module) -> list[str]:
    """The layers that take this kind of plugin: any but those that run their children, or that have no parameter."""
    layers = [(path, module) for path, module in iter_layers(model) if path]
    if kind == "param":
        return [path for path, module in layers if weights(module)]
    if kind == "patch":
        return [path for path, module in layers if not isinstance(module, nn.ModuleList)]
    containers = (nn.ModuleList, nn.Sequential, nn.ModuleDict)
    return [path for path, module in layers if not isinstance(module, containers)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("unet", ["sd15", "pasd", "sdxl"])
def test_h5_attach_and_remove_over_the_whole_tree(unet: str, kind: str, structure: Any) -> None:
    case = fixture(unet)
    before, expected = structure(case.model), case.run()
    keys = list(case.model.state_dict())
    choices = candidates(kind, case.model)

    @settings(deadline=None, max_examples=3)
    @given(picks=st.lists(st.sampled_from(choices), min_size=1, max_size=12, unique=True), twice=st.booleans())
    def check(picks: list[str], twice: bool) -> None:
        names = ["probe", "second"][: 1 + twice] if kind != "multi" else ["probe"]
        plugins = [plugin for name in names for plugin in attach(kind, name, picks, case.model)]
        for plugin in plugins:
            plugin.register_input_feeder_to(case.model)
        with feeding(case.model, cond=1):
            assert torch.equal(case.run(), expected)
        assert [key for key in case.model.state_dict() if key in set(keys)] == keys
        for plugin in reversed(plugins):
            plugin.remove()
        assert structure(case.model) == before
        assert torch.equal(case.run(), expected)

    check()


@pytest.mark.parametrize("unet", ["sd15", "pasd", "sdxl"])
def test_h5_all_kinds_together_come_off_in_any_order(unet: str, structure: Any) -> None:
    shared = fixture(unet)
    expected = shared.run()

    picks = {
        kind: st.lists(st.sampled_from(candidates(kind, shared.model)), min_size=1, max_size=4, unique=True)
        for kind in KINDS
    }

    @settings(deadline=None, max_examples=3)
    @given(st.permutations(KINDS), st.fixed_dictionaries(picks), st.randoms(use_true_random=False))
    def check(kinds: list[str], picked: dict[str, list[str]], order: random.Random) -> None:
        case = copy.deepcopy(shared)  # an example that fails must not spoil the next one
        before = structure(case.model)
        plugins = [plugin for kind in kinds for plugin in attach(kind, f"probe_{kind}", picked[kind], case.model)]
        assert torch.equal(case.run(), expected)
        order.shuffle(plugins)
        for plugin in plugins:
            plugin.remove()
        assert structure(case.model) == before
        assert torch.equal(case.run(), expected)

    check()
