"""Graph inputs on disk: sharded safetensors, and an index that says what each sample is."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from torch import Tensor

from sdconvert.artifacts import write_json_atomic
from sdconvert.errors import PreconditionError, UsageError
from sdconvert.io.tensors import load_tensors, save_tensors

_SHARD_BYTES = 64 << 20
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class SampleInfo:
    """One call of one graph."""

    id: str
    picture: str
    step: int
    side: str
    tile: int
    shard: str
    inputs: tuple[str, ...]


class ActivationWriter:
    """Collects samples of one graph and writes a shard whenever enough have come together.

    Args:
        folder: Of this graph; created.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._pending: Tensors = {}
        self._bytes = 0
        self._shards = 0
        self._index: list[SampleInfo] = []
        folder.mkdir(parents=True)

    def add(self, inputs: Tensors, *, picture: str, step: int, side: str, tile: int) -> None:
        """Take one sample.

        Raises:
            UsageError: There is one of the same picture, step, side and tile already.
        """
        sample_id = f"{picture}-{step}-{side}-{tile}"
        if any(info.id == sample_id for info in self._index):
            raise UsageError(
                f"two samples are called `{sample_id}`", hint="photographs of one run need different file names"
            )
        shard = f"inputs-{self._shards:05d}.safetensors"
        self._index.append(SampleInfo(sample_id, picture, step, side, tile, shard, tuple(inputs)))
        self._pending |= {f"{sample_id}/{name}": tensor.clone() for name, tensor in inputs.items()}
        self._bytes += sum(tensor.nbytes for tensor in inputs.values())
        if self._bytes >= _SHARD_BYTES:
            self._flush()

    def close(self) -> None:
        """Write what is left, then the index; without an index there is no store."""
        if self._pending:
            self._flush()
        write_json_atomic([asdict(info) for info in self._index], self._folder / "index.json")

    def _flush(self) -> None:
        save_tensors(self._pending, self._folder / f"inputs-{self._shards:05d}.safetensors")
        self._pending, self._bytes = {}, 0
        self._shards += 1


class ActivationStore:
    """Reads what an `ActivationWriter` wrote.

    Args:
        folder: Of one graph.

    Raises:
        PreconditionError: The folder has no index.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        index = folder / "index.json"
        if not index.is_file():
            raise PreconditionError(f"`{folder}` holds no calibration samples", hint="run `sdconvert calibrate`")
        entries = json.loads(index.read_text(encoding="utf-8"))
        self.infos = [SampleInfo(**{**entry, "inputs": tuple(entry["inputs"])}) for entry in entries]

    def __len__(self) -> int:
        return len(self.infos)

    def __iter__(self) -> Iterator[Tensors]:
        """The inputs of every sample, with one shard in memory at a time."""
        for _, inputs in self.samples():
            yield inputs

    def samples(self) -> Iterator[tuple[SampleInfo, Tensors]]:
        """Every sample with what it is."""
        shard, tensors = "", dict[str, Tensor]()
        for info in self.infos:
            if info.shard != shard:
                shard, tensors = info.shard, load_tensors(self._folder / info.shard)
            yield info, {name: tensors[f"{info.id}/{name}"] for name in info.inputs}
