"""Runs in lockstep: calls of one graph are answered together, and the answers are those of runs one by one."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import Tensor

from sdconvert.assets import asset_path
from sdconvert.pipelines.loading import load_tokenizer
from sdconvert.pipelines.lockstep import Lockstep, Request
from sdconvert.pipelines.prompt_units import tokenize

Told = list[tuple[str, list[str]]]


def lockstep() -> tuple[Lockstep, Told]:
    """Graphs `plus` and `twice`, and what was asked of them."""
    told: Told = []

    def execute(graph: str, requests: Sequence[Request]) -> list[dict[str, Tensor]]:
        told.append((graph, sorted(request.owner for request in requests)))
        values = [request.inputs["x"] for request in requests]
        return [{"y": value + 1 if graph == "plus" else value * 2} for value in values]

    return Lockstep(execute), told


def ask(steps: Lockstep, graph: str, value: Tensor) -> Tensor:
    return steps.runner(graph)({"x": value})["y"]


def test_calls_of_several_runs_become_one_per_graph_and_step() -> None:
    steps, told = lockstep()

    def run(value: float) -> Tensor:
        sample = torch.tensor(value)
        for _ in range(3):
            sample = ask(steps, "twice", ask(steps, "plus", sample))
        return sample

    found = steps.run({"a": lambda: run(1.0), "b": lambda: run(5.0)})
    assert [float(one) for one in found] == [22.0, 54.0]
    assert told == [("plus", ["a", "b"]), ("twice", ["a", "b"])] * 3


def test_tiles_and_sides_of_a_run_are_asked_at_once_too() -> None:
    steps, told = lockstep()

    def run(values: list[float]) -> float:
        def tile(value: float) -> Tensor:
            def side(sign: float) -> Tensor:
                return ask(steps, "plus", torch.tensor(sign * value))

            return torch.stack(list(steps.each(side, [1.0, -1.0]))).sum()

        return float(sum(steps.each(tile, values)))

    assert steps.run({"a": lambda: run([1.0, 2.0]), "b": lambda: run([3.0])}) == [4.0, 2.0]
    assert told == [("plus", ["a", "a", "a", "a", "b", "b"])]


def test_runs_of_other_lengths_end_each_in_its_time() -> None:
    steps, told = lockstep()

    def run(count: int) -> int:
        for _ in range(count):
            ask(steps, "plus", torch.zeros(()))
        return count

    assert steps.run({"a": lambda: run(1), "b": lambda: run(3), "c": lambda: run(0)}) == [1, 3, 0]
    assert told == [("plus", ["a", "b"]), ("plus", ["b"]), ("plus", ["b"])]


def test_a_failure_of_the_device_ends_all_runs_and_is_the_one_that_is_told() -> None:
    def execute(graph: str, requests: Sequence[Request]) -> list[dict[str, Tensor]]:
        raise OSError("unplugged")

    steps = Lockstep(execute)
    with pytest.raises(OSError, match="unplugged"):
        steps.run({name: lambda: steps.each(lambda x: ask(steps, "plus", torch.tensor(x)), [1, 2]) for name in "ab"})


def test_a_failure_of_one_run_ends_the_others() -> None:
    steps, told = lockstep()

    def fails() -> None:
        raise ValueError("no picture")

    def goes_on() -> None:
        for _ in range(1000):
            ask(steps, "plus", torch.zeros(()))

    with pytest.raises(ValueError, match="no picture"):
        steps.run({"a": fails, "b": goes_on})
    assert len(told) < 1000


def test_gradients_are_recorded_in_no_thread() -> None:
    steps, _ = lockstep()
    weight = torch.ones((), requires_grad=True)

    def run() -> bool:
        return any(one.requires_grad for one in steps.each(lambda x: weight * x, [1.0, 2.0]))

    assert steps.run({"a": run}) == [False]


def test_prompts_are_read_side_by_side_with_one_tokenizer() -> None:
    tokenizer = load_tokenizer(asset_path("pasd_tiny") / "tokenizer")
    with ThreadPoolExecutor(4) as pool:
        found = pool.map(lambda _: tokenize(tokenizer, "clean", 77).input_ids.shape, range(200))
        assert set(found) == {(1, 77)}
