"""A model that has no static graph is refused with the module that stands in the way, not with a page of torch."""

import copy

import pytest
import torch
from static_graphs import module_case, shared_case
from torch import Tensor, nn

from sdconvert.errors import UnsupportedModelError
from sdconvert.quantize import graph


class Branch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if x.sum() > 0 else -x


class Number(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x * float(x.max())


class OutOfTorch(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.from_numpy(x.detach().numpy() * 2)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("cls", [Branch, Number, OutOfTorch])
def test_the_module_is_named(cls: type[nn.Module], capfd: pytest.CaptureFixture[str]) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4), cls()), nn.Linear(4, 4))
    case = module_case(model, 2, 4)
    with pytest.raises(
        UnsupportedModelError, match=rf"`1.1` \({cls.__name__}\) of the module cannot be traced"
    ) as found:
        graph.trace(case.adapter, case.samples[0])
    assert "torch.where" in found.value.hint
    assert "\n" not in str(found.value).partition("\nhint: ")[0]
    assert "def forward" not in "".join(capfd.readouterr())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_one_block_of_a_controlnet_is_named() -> None:
    case = copy.deepcopy(shared_case("small_controlnet"))
    case.adapter.model.get_submodule("mid_block.resnets.1").nonlinearity = Branch()
    with pytest.raises(UnsupportedModelError, match=r"`mid_block.resnets.1.nonlinearity` \(Branch\) of the controlnet"):
        graph.trace(case.adapter, case.samples[0])
