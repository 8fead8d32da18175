"""A model in several graphs answers as one, and hands on between them what nobody else asks for."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sdconvert.android.executors import Answered, ChainExecutor
from sdconvert.android.manifest import ChainRecord, GraphRecord, Manifest, TensorRecord


class Parts:
    """Two graphs: 2 x and x + 1; then hidden + skip + z."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, list[list[str]], bool]] = []

    def execute(self, graph: str, calls: Sequence[Mapping[str, Tensor]], *, keep: bool) -> Answered:
        self.asked.append((graph, [list(call) for call in calls], keep))
        if graph == "net_1":
            outputs = [{"hidden": 2 * call["x"], "skip": call["x"] + 1} for call in calls]
        else:
            outputs = [{"y": call["hidden"] + call["skip"] + call["z"]} for call in calls]
        return Answered(outputs, [1.0 if graph == "net_1" else 10.0] * len(calls))


def manifest(outputs: Sequence[str]) -> Manifest:
    def graph(name: str, inputs: Sequence[str], outputs: Sequence[str]) -> GraphRecord:
        records = (
            tuple(TensorRecord(name=one, dtype="float32", shape=(1,)) for one in names) for names in (inputs, outputs)
        )
        return GraphRecord(name=name, soc="SM8650", context="", epcontext="", **dict(zip(IO, records, strict=True)))

    graphs = (graph("net_1", ["x"], ["hidden", "skip"]), graph("net_2", ["hidden", "skip", "z"], ["y"]))
    chain = ChainRecord(name="net", parts=("net_1", "net_2"), outputs=tuple(outputs))
    return Manifest.model_construct(graphs=(*graphs, graph("other", ["x"], ["y"])), chains=(chain,))


IO = ("inputs", "outputs")
CALLS = [{"x": torch.tensor([value]), "z": torch.tensor([100.0])} for value in (1.0, 5.0)]


def test_the_chain_answers_every_call_as_one_graph() -> None:
    parts = Parts()
    answered = ChainExecutor(parts, manifest(["y"])).execute("net", CALLS, keep=False)
    assert [{name: float(tensor) for name, tensor in one.items()} for one in answered.outputs] == [
        {"y": 104.0},
        {"y": 116.0},
    ]
    assert answered.times_ms == [11.0, 11.0]
    # What goes from part to part stays where it was made.
    assert parts.asked == [
        ("net_1", [["x"], ["x"]], True),
        ("net_2", [["hidden", "skip", "z"]] * 2, False),
    ]
    assert [list(call) for call in CALLS] == [["x", "z"]] * 2


def test_an_output_of_an_early_part_is_fetched() -> None:
    parts = Parts()
    answered = ChainExecutor(parts, manifest(["y", "skip"])).execute("net", CALLS[:1], keep=False)
    assert [keep for *_, keep in parts.asked] == [False, False]
    assert list(answered.outputs[0]) == ["y", "skip"]
    ChainExecutor(parts, manifest(["y", "skip"])).execute("net", CALLS[:1], keep=True)
    assert [keep for *_, keep in parts.asked[2:]] == [True, True]


def test_a_model_takes_the_place_of_its_parts_and_other_graphs_pass() -> None:
    record, parts = manifest(["y"]), Parts()
    assert record.models() == {"net", "other"}
    ChainExecutor(parts, record).execute(
        "net_2", [{"hidden": CALLS[0]["x"], "skip": CALLS[0]["x"], "z": CALLS[0]["z"]}], keep=True
    )
    assert parts.asked == [("net_2", [["hidden", "skip", "z"]], True)]
