"""Every family: the static graph is the model, its description is right, and the model comes out unchanged."""

import copy
from typing import Any

import pytest
import torch
from model_families import FAMILIES, Family, shared_family
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from sdconvert.adapters import AdapterRegistry, BlockRef, specs
from sdconvert.errors import UsageError
from sdconvert.mha2sha.head_counts import heads_from_config
from sdconvert.mha2sha.heads import attention_paths, head_splits
from sdconvert.mha2sha.state_dict import split_state_dict
from sdconvert.models.attention import SHAAttentionPatch

LIMIT = 1e-5


@pytest.fixture(scope="module", params=FAMILIES)
def family(request: pytest.FixtureRequest) -> Family:
    return shared_family(request.param)


def close(tensor: Tensor, reference: Tensor) -> bool:
    return tensor.shape == reference.shape and bool((tensor - reference).abs().max() <= LIMIT * reference.abs().max())


def test_the_graph_computes_what_the_model_computes(family: Family) -> None:
    expected = family.call_model()
    found = family.adapter.run(family.adapter.pack(family.call))
    assert len(found) == len(expected)
    assert all(map(close, found.values(), expected))
    given = [id(leaf) for leaf in tree_leaves(family.adapter.unpack(found)) if leaf is not None]
    assert sorted(given) == sorted(map(id, found.values()))


def test_io_spec_from_the_config_is_what_the_graph_has(family: Family) -> None:
    spec = family.adapter.io_spec(family.size)
    inputs = family.adapter.pack(family.call)
    bare = [[(one.name, one.shape, one.dtype) for one in part] for part in (spec.inputs, spec.outputs)]
    outputs = family.adapter.run(inputs)
    assert bare == [[(one.name, one.shape, one.dtype) for one in specs(part)] for part in (inputs, outputs)]


def test_inputs_of_the_graph_tell_its_size_and_others_are_refused(family: Family) -> None:
    inputs = family.adapter.pack(family.call)
    family.adapter.require_inputs(inputs)
    with pytest.raises(UsageError, match="are not those of the"):
        family.adapter.require_inputs(inputs | {"another": torch.zeros(1)})
    name, first = next(iter(inputs.items()))
    with pytest.raises(UsageError, match=rf"`{name}` is int64 .*; the {family.adapter.graph_name} graph of"):
        family.adapter.require_inputs(inputs | {name: first.long()})


def test_every_input_changes_the_output(family: Family) -> None:
    inputs = family.adapter.pack(family.call)
    before = family.adapter.run(inputs)
    for name, tensor in inputs.items():
        other = tensor.flip(-1) if tensor.is_floating_point() else (tensor + 1) % 900
        after = family.adapter.run(inputs | {name: other})
        assert not all(map(torch.equal, before.values(), after.values())), name


def test_dummy_inputs_are_in_range_and_belong_to_their_seed(family: Family) -> None:
    spec = family.adapter.io_spec(family.size)
    inputs, again, other = (family.adapter.dummy_inputs(spec, seed) for seed in (3, 3, 4))
    assert specs(inputs) == tuple(type(one)(one.name, one.shape, one.dtype) for one in spec.inputs)
    assert all(map(torch.equal, inputs.values(), again.values()))
    assert not all(map(torch.equal, inputs.values(), other.values()))
    for one in spec.inputs:
        if one.range:
            assert one.range[0] <= float(inputs[one.name].min()) <= float(inputs[one.name].max()) <= one.range[1]
    assert all(bool(tensor.isfinite().all()) for tensor in family.adapter.run(inputs).values())


def first_runs(family: Family, blocks: list[BlockRef]) -> list[str]:
    """Paths of the blocks in the order in which their first module with parameters runs."""
    order: dict[str, None] = {}
    handles = []
    for block in blocks:
        for module in block.module.modules():
            if any(True for _ in module.parameters(recurse=False)):
                hook: Any = lambda *_, path=block.path: order.setdefault(path)  # noqa: E731
                handles.append(module.register_forward_pre_hook(hook))
    family.adapter.run(family.adapter.pack(family.call))
    for handle in handles:
        handle.remove()
    return list(order)


def test_blocks_are_in_execution_order(family: Family) -> None:
    blocks = family.adapter.blocks()
    assert first_runs(family, blocks) == [block.path for block in blocks]


def test_blocks_hold_every_parameter_of_the_graph_once(family: Family) -> None:
    held = [id(parameter) for block in family.adapter.blocks() for parameter in block.module.parameters()]
    assert len(held) == len(set(held))
    model = copy.deepcopy(family.adapter.model).requires_grad_(True)
    inputs = family.adapter.pack(family.call).values()
    with family.adapter_of(model).as_graph() as graph:
        sum(output.sum() for output in graph(*inputs)).backward()
    used = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    mine = {name for name, parameter in family.adapter.model.named_parameters() if id(parameter) in set(held)}
    # A table that belongs to the model itself is in no block; a head that feeds nothing may be in one.
    assert {name for name in used - mine if "." in name} == set()


def test_attention_layers_are_those_that_run(family: Family) -> None:
    layers = family.adapter.attention_layers()
    run: dict[str, int] = {}
    inputs = family.adapter.pack(family.call).values()
    with family.adapter.as_graph() as graph:
        for layer in layers:
            hook: Any = lambda *_, path=layer.path: run.update({path: 1})  # noqa: E731
            graph.get_submodule(f"model.{layer.path}").register_forward_pre_hook(hook)
        graph(*inputs)
    for layer in layers:
        family.adapter.model.get_submodule(layer.path)._forward_pre_hooks.clear()
    assert run.keys() == {layer.path for layer in layers} != set()
    for layer in layers:
        module: Any = family.adapter.model.get_submodule(layer.path)
        rows = (module.to_q if hasattr(module, "to_q") else module.q_proj).weight.shape[0]
        assert layer.heads >= 1
        assert rows % layer.heads == 0


def test_x7_adapters_never_rename(family: Family) -> None:
    model = family.adapter.model
    before = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    family.adapter.run(family.adapter.pack(family.call))
    family.adapter.check()
    family.adapter.blocks()
    with family.adapter.as_graph() as graph:
        assert isinstance(graph, nn.Module)
    after = {name: tensor.data_ptr() for name, tensor in model.state_dict().items()}
    assert list(after.items()) == list(before.items())


def test_x7_only_mha2sha_renames_and_by_its_map(family: Family) -> None:
    adapter = family.adapter_of(copy.deepcopy(family.adapter.model))
    inputs = family.adapter.pack(family.call)
    before, state = adapter.run(inputs), dict(adapter.model.state_dict())
    shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
    heads = heads_from_config(adapter.config(), attention_paths(shapes), shapes)
    assert heads.items() >= {layer.path: layer.heads for layer in adapter.attention_layers()}.items()
    splits = head_splits(shapes, heads)
    SHAAttentionPatch.wrap_model("sha", adapter.model).fuse()
    after = dict(adapter.model.state_dict())
    expected = split_state_dict(state, splits)
    assert after.keys() == expected.keys()
    assert all(torch.equal(after[name], expected[name]) for name in after)
    assert all(map(close, adapter.run(inputs).values(), before.values()))
    assert adapter.attention_layers() == []


def test_every_family_is_tested() -> None:
    tested = {type(shared_family(name).adapter) for name in FAMILIES}
    assert tested == set(AdapterRegistry.entries().values())
