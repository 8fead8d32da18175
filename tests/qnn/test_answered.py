"""What was asked before is not computed again, and only that."""

import torch
from torch import Tensor

from sdconvert.qnn.answered import Answered


def test_only_what_was_not_asked_before_is_computed() -> None:
    asked = [{"x": torch.full((1, 2), value), "t": torch.tensor([7])} for value in (1.0, 2.0)]
    computed: list[float] = []

    def double(inputs: dict[str, Tensor]) -> dict[str, Tensor]:
        computed.append(float(inputs["x"][0, 0]))
        return {"y": inputs["x"] * 2}

    runner = Answered(double, asked, [{"y": torch.full((1, 2), value)} for value in (20.0, 40.0)])
    found = [
        runner({"t": torch.tensor([step]), "x": torch.full((1, 2), x)}) for x, step in ((2.0, 7), (2.0, 8), (3.0, 7))
    ]
    assert [float(one["y"][0, 1]) for one in found] == [40.0, 4.0, 6.0]
    assert computed == [2.0, 3.0]


def test_an_answer_does_not_change_with_what_becomes_of_it() -> None:
    runner = Answered(lambda inputs: inputs, [{"x": torch.ones(2)}], [{"y": torch.ones(2)}])
    runner({"x": torch.ones(2)})["y"].add_(1)
    assert torch.equal(runner({"x": torch.ones(2)})["y"], torch.ones(2))
