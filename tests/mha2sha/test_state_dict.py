"""Heads on disk are the parent's rows and come together again bit by bit, in every format, type and layout."""

import subprocess
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file
from stored_weights import DTYPES, random_bits, same, save_sharded, state_dicts
from torch import Tensor

from sdconvert.errors import CheckpointError, QualityGateError, SdconvertError
from sdconvert.io.tensors import save_tensors
from sdconvert.io.weights_index import WeightsIndex, WeightsLayout, read_index
from sdconvert.mha2sha.row_split import Part, RowSplit, even_split
from sdconvert.mha2sha.state_dict import merge_weights, split_state_dict, split_weights, verify_weights

SUFFIXES = [".safetensors", ".pth"]


@dataclass(frozen=True)
class Drawn:
    """Weights in MHA form as a state dict and as files, and how they are cut."""

    state: dict[str, Tensor]
    splits: list[RowSplit]
    suffix: str
    shards: int

    def save(self, folder: Path) -> WeightsIndex:
        names = list(self.state)
        cuts = [len(names) * k // self.shards for k in range(self.shards + 1)]
        if self.shards == 1 and self.suffix == ".pth":
            torch.save(self.state, folder / "mha.pth")  # keeps what is shared
            return read_index(folder / "mha.pth")
        if self.shards == 1:
            save_tensors(self.state, folder / f"mha{self.suffix}")
            return read_index(folder / f"mha{self.suffix}")
        parts = [{name: self.state[name] for name in names[a:b]} for a, b in pairwise(cuts)]
        return read_index(save_sharded(folder, "mha", parts, self.suffix))


@st.composite
def drawn_weights(draw: st.DrawFn) -> Drawn:
    """Projections of any type and layout, tied and not, cut evenly and unevenly, among any other weights."""
    state = draw(state_dicts())
    splits = []
    for number in range(draw(st.integers(1, 3))):
        dtype, heads = draw(st.sampled_from(DTYPES)), draw(st.integers(1, 5))
        shape = (heads * draw(st.integers(1, 3)), draw(st.integers(1, 4)))
        weight, bias = random_bits(shape, dtype, number), random_bits(shape[:1], dtype, number)
        parent = f"layer.{number}.to_q"
        match draw(st.sampled_from(["plain", "transposed", "tied", "view"])):
            case "transposed":
                weight = random_bits(shape[::-1], dtype, number).t()
            case "tied":
                state[f"{parent}.twin.weight"] = weight
                splits.append(cut(f"{parent}.twin", "weight", heads, shape[0]))
            case "view":
                state[f"{parent}.whole"] = (whole := random_bits((shape[0] + 2, *shape[1:]), dtype, number))
                weight = whole[1:-1]
        state |= {f"{parent}.weight": weight, f"{parent}.bias": bias}
        splits += [cut(parent, kind, heads, shape[0]) for kind in ("weight", "bias")]
        state[f"layer.{number}.to_out.0.weight"] = random_bits((2, 3), dtype, number)
        rows = (Part(f"layer.{number}.left", 0, 1), Part(f"layer.{number}.right", 1, 2))
        splits.append(RowSplit(f"layer.{number}", f"layer.{number}.to_out.0.weight", rows, draw(st.booleans())))
    order = draw(st.permutations(list(state)))
    state = {name: state[name] for name in order}
    return Drawn(state, splits, draw(st.sampled_from(SUFFIXES)), draw(st.sampled_from([1, 1, 2, 3])))


def cut(parent: str, kind: str, heads: int, rows: int) -> RowSplit:
    children = [f"{parent}_convs.{head}.{kind}" for head in range(heads)]
    return even_split(parent.rpartition(".")[0], f"{parent}.{kind}", children, rows, to_convolution=kind == "weight")


def loaded(index: WeightsIndex) -> dict[str, Tensor]:
    """What the libraries read."""
    found: dict[str, Tensor] = {}
    for file in index.files:
        is_safe = file.path.suffix == ".safetensors"
        found |= load_file(file.path) if is_safe else torch.load(file.path, weights_only=True, mmap=True)
    return found


def require_same(index: WeightsIndex, expected: Mapping[str, Tensor]) -> None:
    found = loaded(index)
    assert found.keys() == expected.keys()
    assert all(same(found[name], tensor) for name, tensor in expected.items())


def round_trip(folder: Path, drawn: Drawn, suffix: str | None) -> None:
    mha = drawn.save(folder)
    expected = split_state_dict({name: drawn.state[name] for name in mha.order}, drawn.splits)
    sha = read_index(split_weights(mha, drawn.splits, folder / "sha", "sha", suffix))
    require_same(sha, expected)
    assert list(sha.tensors) == list(expected)
    assert len(sha.files) == drawn.shards
    assert sha.suffix == (suffix or drawn.suffix)
    assert verify_weights(mha, sha, drawn.splits) == len(expected)
    layout = WeightsLayout.parse(asdict(mha.layout()), folder / "heads.json")
    back = read_index(merge_weights(sha, drawn.splits, layout, folder / "back"))
    require_same(back, drawn.state)
    assert [list(file.tensors) for file in back.files] == [list(file.tensors) for file in mha.files]
    assert (back.order, back.path.name, back.layout().files) == (mha.order, mha.path.name, layout.files)
    assert verify_weights(back, sha, drawn.splits) == len(expected)


@settings(max_examples=60, deadline=None)
@given(drawn=drawn_weights(), suffix=st.sampled_from([None, *SUFFIXES]))
def test_split_and_merge_give_the_original_back(
    tmp_path_factory: pytest.TempPathFactory, drawn: Drawn, suffix: str | None
) -> None:
    round_trip(tmp_path_factory.mktemp("w"), drawn, suffix)


@pytest.mark.slow
@settings(max_examples=2000, deadline=None)
@given(drawn=drawn_weights(), suffix=st.sampled_from([None, *SUFFIXES]))
def test_split_and_merge_give_the_original_back_in_two_thousand_cases(
    tmp_path_factory: pytest.TempPathFactory, drawn: Drawn, suffix: str | None
) -> None:
    round_trip(tmp_path_factory.mktemp("w"), drawn, suffix)


QKV = [cut("a.to_q", "weight", 4, 8), cut("b.to_q", "weight", 4, 8)]


@pytest.fixture
def mha(tmp_path: Path) -> WeightsIndex:
    tied = torch.randn(8, 6)
    state = {"conv_in.bias": torch.randn(3), "a.to_q.weight": tied, "b.to_q.weight": tied, "norm": torch.randn(2)}
    torch.save(state, tmp_path / "mha.pth")
    return read_index(tmp_path / "mha.pth")


def test_heads_of_tied_projections_are_tied(mha: WeightsIndex, tmp_path: Path) -> None:
    sha = loaded(read_index(split_weights(mha, QKV, tmp_path / "sha", "sha")))
    places = {name: tensor.untyped_storage().data_ptr() for name, tensor in sha.items()}
    assert [places[f"a.to_q_convs.{k}.weight"] for k in range(4)] == [
        places[f"b.to_q_convs.{k}.weight"] for k in range(4)
    ]
    assert len(set(places.values())) == 4 + 2
    assert {sha[f"a.to_q_convs.{k}.weight"].untyped_storage().nbytes() for k in range(4)} == {2 * 6 * 4}
    index = read_index(tmp_path / "sha/sha.pth")
    back = torch.load(merge_weights(index, QKV, mha.layout(), tmp_path / "back"), weights_only=True)
    assert back["a.to_q.weight"].data_ptr() == back["b.to_q.weight"].data_ptr()


def test_parts_stay_in_their_parent_s_shard(tmp_path: Path) -> None:
    state = {name: torch.randn(8, 6) for name in ("a.to_q.weight", "norm", "b.to_q.weight")}
    parts = [{name: state[name]} for name in ("a.to_q.weight", "norm")] + [{"b.to_q.weight": state["b.to_q.weight"]}]
    mha = read_index(save_sharded(tmp_path, "model", parts))
    path = split_weights(mha, QKV, tmp_path / "sha", "model", ".pth")
    assert path.name == "model.pth.index.json"
    sha = read_index(path)
    assert [[name[:1] for name in file.tensors] for file in sha.files] == [["a"] * 4, ["n"], ["b"] * 4]
    assert [file.path.name for file in sha.files] == [f"model-0000{k}-of-00003.pth" for k in (1, 2, 3)]
    assert sha.metadata == {"total_size": 3 * 8 * 6 * 4, "kept": "yes"}


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_verification_sees_every_tensor(mha: WeightsIndex, tmp_path: Path, suffix: str) -> None:
    sha = read_index(split_weights(mha, QKV, tmp_path / "sha", "sha", suffix))
    content = sha.path.read_bytes()
    for name, tensor in sha.tensors.items():
        changed = bytearray(content)
        changed[tensor.bytes.stop - 1] ^= 1
        sha.path.write_bytes(changed)
        # A storage that two tensors share is the first one's.
        expected = name.replace("b.", "a.") if suffix == ".pth" else name
        with pytest.raises(QualityGateError, match=rf"`{expected}` of .* is not what its rows in .*mha\.pth` are"):
            verify_weights(mha, read_index(sha.path), QKV)


def changed(index: WeightsIndex, **tensors: Any) -> WeightsIndex:
    """The index with other tensors, None for without."""
    kept = {name: tensor for name, tensor in (index.tensors | tensors).items() if tensor is not None}
    return replace(index, files=(replace(index.files[0], tensors=kept),), order=tuple(kept))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {"norm": None}, "`norm` is missing from"),
        (lambda t: {"more": t["norm"]}, "`more` is left over in"),
        (lambda t: {"norm": replace(t["norm"], dtype="int32")}, r"`norm` is int32 \(2,\) instead of float32 \(2,\)"),
        (lambda t: {"norm": replace(t["norm"], shape=(1, 2))}, r"`norm` is float32 \(1, 2\) instead of"),
    ],
)
def test_verification_sees_what_is_not_as_it_should_be(
    mha: WeightsIndex, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    sha = read_index(split_weights(mha, QKV, tmp_path / "sha", "sha"))
    with pytest.raises(QualityGateError, match=message):
        verify_weights(mha, changed(sha, **change(sha.tensors)), QKV)


HEAD = "a.to_q_convs.1.weight"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: {HEAD: None}, r"cannot give `a\.to_q\.weight` of shape \(8, 6\): found a\.to_q_convs\.0"),
        (lambda t: {HEAD: replace(t[HEAD], dtype="int32")}, r"cannot give `a\.to_q\.weight`.*int32"),
        (lambda t: {HEAD: replace(t[HEAD], shape=(2, 6))}, r"cannot give `a\.to_q\.weight`"),
        (lambda t: {"norm": None}, r"cannot give `norm` of shape \(2,\): found nothing"),
        (lambda t: {"more": t["norm"]}, "1 tensors that the name map does not know, the first `more`"),
    ],
)
def test_weights_that_are_not_those_of_the_name_map_are_not_merged(
    mha: WeightsIndex, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    sha = read_index(split_weights(mha, QKV, tmp_path / "sha", "sha"))
    with pytest.raises(CheckpointError, match=message):
        merge_weights(changed(sha, **change(sha.tensors)), QKV, mha.layout(), tmp_path / "back")
    assert not (tmp_path / "back").exists()


@pytest.mark.parametrize(
    ("split", "message"),
    [
        (cut("a.to_q", "weight", 4, 12), r"`a\.to_q\.weight` should have 12 rows; .* its shape is \(8, 6\)"),
        (cut("gone.to_q", "weight", 4, 8), r"`gone\.to_q\.weight` should have 8 rows; .* its shape is None"),
        (even_split("a", "a.to_q.weight", ["norm", "x"], 8, to_convolution=True), "two tensors .* called `norm`"),
    ],
)
def test_splits_of_another_model_are_refused(mha: WeightsIndex, tmp_path: Path, split: RowSplit, message: str) -> None:
    with pytest.raises(SdconvertError, match=message):
        split_weights(mha, [split], tmp_path / "sha", "sha")
    assert not (tmp_path / "sha").exists()


MEASURE = """
import sys
from pathlib import Path
from sdconvert.memory import PeakMemory
from sdconvert.io.weights_index import read_index
from sdconvert.mha2sha.row_split import even_split
from sdconvert.mha2sha.state_dict import merge_weights, split_weights, verify_weights
peak, folder, suffix = PeakMemory(), Path(sys.argv[1]), sys.argv[2]
mha = read_index(folder / "mha.safetensors")
splits = [even_split("a", key, [f"{key}.{k}" for k in range(8)], rows, True) for key, (rows, _) in mha.shapes.items()]
sha = read_index(split_weights(mha, splits, folder / "sha", "sha", suffix))
verify_weights(mha, sha, splits)
merge_weights(sha, splits, mha.layout(), folder / "back")
assert not {"torch", "safetensors", "numpy"} & sys.modules.keys()
print(peak.peak_bytes() // 1024)
"""


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_memory_does_not_depend_on_the_weights(tmp_path: Path, suffix: str) -> None:
    """And neither torch nor safetensors is loaded, whose import alone takes more memory and time than the work."""
    peak_kb = []
    for megabytes in (1, 100):
        folder = tmp_path / str(megabytes)
        folder.mkdir()
        state = {f"{k}.weight": torch.zeros(megabytes << 10, 128, dtype=torch.float16) for k in range(4)}
        save_tensors(state, folder / "mha.safetensors")
        command = [sys.executable, "-c", MEASURE, str(folder), suffix]
        peak_kb.append(int(subprocess.run(command, check=True, capture_output=True, text=True).stdout))
    assert peak_kb[1] - peak_kb[0] < 4 << 10
    assert peak_kb[1] < 100 << 10
