"""H3: one grammar for layers; what it does not understand or does not find is an error."""

import pytest
from torch import nn

from sdconvert.errors import PluginError
from sdconvert.plugins import LayerMatch, PatchPluginBlock, SinglePluginBlock, match_layers


class Wide(nn.Linear):
    """A subclass, which `cls(Linear):` finds too."""


@pytest.fixture
def model() -> nn.Module:
    block = nn.ModuleDict({"attn": nn.Linear(2, 2), "ff": nn.Sequential(Wide(2, 2), nn.ReLU(), nn.Linear(2, 2))})
    return nn.ModuleDict({"down": block, "up": nn.ModuleDict({"attn": nn.Linear(2, 2)})})


@pytest.mark.parametrize(
    ("selector", "found"),
    [
        ("down.attn", [("down.attn", False)]),
        ("", [("", False)]),
        ("pre_hook:", [("", True)]),
        ("prehook:up.attn", [("up.attn", True)]),
        (r"re:.*attn$", [("down.attn", False), ("up.attn", False)]),
        (r"re:(?:down|up)\.attn", [("down.attn", False), ("up.attn", False)]),
        (r"re:attn", []),
        (r"re:pre_hook:up\.", [("up.attn", True)]),
        (r"pre_hook:re:up\.", [("up.attn", True)]),
        ("re:cls(Linear):.*", [(path, False) for path in ("down.attn", "down.ff.0", "down.ff.2", "up.attn")]),
        ("cls(Wide):pre_hook:re:down", [("down.ff.0", True)]),
        ("cls(ReLU):down.ff.1", [("down.ff.1", False)]),
        ("cls(Wide):down.ff.1", []),
        ("nope", []),
    ],
)
def test_h3_selector_table(model: nn.Module, selector: str, found: list[tuple[str, bool]]) -> None:
    if not found:
        with pytest.raises(PluginError, match="matches no layer"):
            match_layers(selector, model)
    else:
        matches = match_layers(selector, model)
        assert [(match.path, match.pre_hook) for match in matches] == found
        assert all(match.module is model.get_submodule(match.path) for match in matches)


def test_h3_duplicates_are_dropped_and_order_is_kept(model: nn.Module) -> None:
    matches = match_layers(["up.attn", r"re:.*attn", "pre_hook:up.attn"], model)
    expected = [("up.attn", False), ("down.attn", False), ("up.attn", True)]
    assert [(match.path, match.pre_hook) for match in matches] == expected


@pytest.mark.parametrize("selector", ["prehok:down.attn", "re:post_hook:.*", "class(Linear):down", "cls():down"])
def test_h3_unknown_prefix_lists_the_known_ones(model: nn.Module, selector: str) -> None:
    with pytest.raises(PluginError, match=r"unknown prefix[^\n]*\n.*re:, pre_hook:, prehook:, cls\(Name\):"):
        match_layers(selector, model)


def test_h3_no_match_shows_the_nearest_names(model: nn.Module) -> None:
    with pytest.raises(PluginError, match=r"nearest: `down\.attn`, `down\.ff`, `down`"):
        match_layers("down.atn", model)
    with pytest.raises(PluginError, match=r"nearest: .*`down\.ff\.0 \(Wide\)`"):
        match_layers("cls(Wid):re:.*ff", model)


def test_h3_bad_regular_expression(model: nn.Module) -> None:
    with pytest.raises(PluginError, match="no regular expression"):
        match_layers("re:down(", model)


def test_h3_match_reads_as_the_guides_dict(model: nn.Module) -> None:
    (match,) = match_layers("prehook:up.attn", model)
    assert match == LayerMatch("up.attn", model.get_submodule("up.attn"), True, model)
    assert match["layer"] is match.module
    assert match["pre_hook"] is True


def test_h3_paths_do_not_change_with_plugins(model: nn.Module) -> None:
    before = [match.path for match in match_layers("re:", model)]
    SinglePluginBlock("single", model.get_submodule("up.attn"))
    PatchPluginBlock("patch", model.get_submodule("down.ff"), host_model=model)
    PatchPluginBlock("patch", model.get_submodule("up.attn"), host_model=model)
    assert [match.path for match in match_layers("re:", model)] == before
    assert match_layers("cls(Sequential):re:", model)[0].module is model.get_submodule("down.ff")
