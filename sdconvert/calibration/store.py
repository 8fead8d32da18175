"""Graph inputs on disk: sharded safetensors, an index that says what each sample is, and the hash of every shard."""

import copy
import os
import shlex
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from sdconvert.errors import PreconditionError, UsageError
from sdconvert.io.files import read_json, sha256_file, write_json_atomic
from sdconvert.io.tensors import load_tensors, save_tensors

_SHARD_BYTES = 64 << 20
_INDEX, _SHARDS, _JOURNAL = "index.json", "shards.json", "journal.json"
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
        resume: Go on behind the last picture that an unfinished writer committed to the folder, if there was one.

    Raises:
        UsageError: The folder exists, and `resume` is not asked for.
    """

    def __init__(self, folder: Path, *, resume: bool = False) -> None:
        if folder.exists() and not resume:
            raise UsageError(f"`{folder}` exists already", hint="write to another folder")
        self._folder = folder
        self._pending: Tensors = {}
        self._bytes = 0
        self._index: list[SampleInfo] = []
        self._shards: dict[str, dict[str, Any]] = {}
        folder.mkdir(parents=True, exist_ok=True)
        if (folder / _JOURNAL).exists():
            journal = read_json(folder / _JOURNAL)
            self._index, self._shards = _infos(folder / _JOURNAL, journal["samples"]), journal["shards"]
        self._resumed = frozenset(info.picture for info in self._index)
        for path in folder.glob("*.safetensors"):
            if path.name not in self._shards:
                path.unlink()

    def add(self, inputs: Tensors, *, picture: str, step: int, side: str, tile: int) -> None:
        """Take one sample; one of a picture that an earlier writer committed stays as it is.

        Raises:
            UsageError: There is one of the same picture, step, side and tile already.
        """
        if picture in self._resumed:
            return
        sample_id = f"{picture}-{step}-{side}-{tile}"
        if any(info.id == sample_id for info in self._index):
            raise UsageError(
                f"two samples are called `{sample_id}`", hint="photographs of one run need different file names"
            )
        self._index.append(SampleInfo(sample_id, picture, step, side, tile, self._shard(), tuple(inputs)))
        self._pending |= {f"{sample_id}/{name}": tensor.clone() for name, tensor in inputs.items()}
        self._bytes += sum(tensor.nbytes for tensor in inputs.values())
        if self._bytes >= _SHARD_BYTES:
            self._flush()

    def commit(self) -> None:
        """Write what was added so far, so that a later writer goes on from here; between two pictures."""
        self._flush()
        content = {"samples": [asdict(info) for info in self._index], "shards": self._shards}
        write_json_atomic(content, self._folder / _JOURNAL)

    def close(self) -> None:
        """Write what is left, then the index; without an index there is no store."""
        self._flush()
        self._write_index(self._folder)
        (self._folder / _JOURNAL).unlink(missing_ok=True)

    def publish(self, folder: Path) -> None:
        """Make a store of what was added in another folder of the same disk; this one can still be resumed."""
        self.commit()
        folder.mkdir(parents=True)
        for name in self._shards:
            try:
                os.link(self._folder / name, folder / name)
            except OSError:  # not every file system has hard links
                shutil.copyfile(self._folder / name, folder / name)
        self._write_index(folder)

    def _write_index(self, folder: Path) -> None:
        write_json_atomic(self._shards, folder / _SHARDS)
        write_json_atomic([asdict(info) for info in self._index], folder / _INDEX)

    def _shard(self) -> str:
        return f"inputs-{len(self._shards):05d}.safetensors"

    def _flush(self) -> None:
        if not self._pending:
            return
        path = self._folder / self._shard()
        save_tensors(self._pending, path)
        self._shards[path.name] = {"sha256": sha256_file(path), "bytes": path.stat().st_size}
        self._pending, self._bytes = {}, 0


class ActivationStore:
    """Reads what an `ActivationWriter` wrote.

    The sizes of all shards are checked when the store is opened, the content of a shard when it is first read.

    Args:
        folder: Of one graph.

    Raises:
        PreconditionError: The folder has no index, or a shard is missing or truncated.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        if not (folder / _INDEX).is_file() or not (folder / _SHARDS).is_file():
            raise PreconditionError(f"`{folder}` holds no calibration samples", hint="run `sdconvert calibrate`")
        self.infos = _infos(folder / _INDEX, read_json(folder / _INDEX))
        self._shards: dict[str, dict[str, Any]] = read_json(folder / _SHARDS)
        self._verified: set[str] = set()
        for name, shard in self._shards.items():
            path = folder / name
            if not path.is_file():
                raise self._damaged(path, "is missing")
            if (size := path.stat().st_size) != shard["bytes"]:
                raise self._damaged(path, f"has {size} bytes, {shard['bytes']} were written")

    def __len__(self) -> int:
        return len(self.infos)

    def __iter__(self) -> Iterator[Tensors]:
        """The inputs of every sample, with one shard in memory at a time."""
        for _, inputs in self.samples():
            yield inputs

    def samples(self) -> Iterator[tuple[SampleInfo, Tensors]]:
        """Every sample with what it is.

        Raises:
            PreconditionError: The content of a shard is not what was written.
        """
        shard, tensors = "", dict[str, Tensor]()
        for info in self.infos:
            if info.shard != shard:
                shard, tensors = info.shard, self._load(info.shard)
            yield info, {name: tensors[f"{info.id}/{name}"] for name in info.inputs}

    def spread(self, count: int) -> "ActivationStore":
        """Part of the samples: as many of each timestep, other pictures at each.

        Activations of a diffusion model change with the timestep; the first so many samples would show all timesteps
        of few pictures.

        Raises:
            UsageError: There are not as many.
        """
        if count > len(self):
            raise UsageError(
                f"{count} samples are asked for, `{self._folder}` holds {len(self)}",
                hint="ask for fewer, or raise calibration.crops_per_photograph",
            )
        part = copy.copy(self)
        part.infos = [self.infos[index] for index in _spread([info.step for info in self.infos], count)]
        return part

    def sample(self, picture: str, step: int, side: str, tile: int = 0) -> Tensors:
        """The inputs of one call.

        Raises:
            UsageError: There is no such sample; the message says what there is of the picture.
            PreconditionError: The content of its shard is not what was written.
        """
        wanted = f"{picture}-{step}-{side}-{tile}"
        for info in self.infos:
            if info.id == wanted:
                tensors = self._load(info.shard)
                return {name: tensors[f"{info.id}/{name}"] for name in info.inputs}
        found = [info.id for info in self.infos if info.picture == picture]
        pictures = dict.fromkeys(info.picture for info in self.infos)
        raise UsageError(
            f"`{self._folder}` holds no sample `{wanted}`",
            hint=f"it holds {', '.join(found)}" if found else f"its pictures are {', '.join(pictures)}",
        )

    def _load(self, name: str) -> Tensors:
        path = self._folder / name
        if name not in self._verified and sha256_file(path) != self._shards[name]["sha256"]:
            raise self._damaged(path, "does not have the content that was written")
        self._verified.add(name)
        return load_tensors(path)

    def _damaged(self, path: Path, what: str) -> PreconditionError:
        return PreconditionError(f"calibration shard `{path}` {what}", hint=f"redo it: `{_command(self._folder)}`")


def _spread(steps: list[int], count: int) -> list[int]:
    """Choose `count` indices, evenly from the indices of each step; where they begin differs from step to step."""
    by_step: dict[int, list[int]] = {}
    for index, step in enumerate(steps):
        by_step.setdefault(step, []).append(index)
    quotas = dict.fromkeys(by_step, 0)
    while sum(quotas.values()) < count:
        # One to each step that has one left, until all are given out.
        open_steps = [step for step, quota in quotas.items() if quota < len(by_step[step])]
        for step in open_steps[: count - sum(quotas.values())]:
            quotas[step] += 1
    return sorted(
        indices[int((i + rank / len(by_step)) * len(indices) / quotas[step])]
        for rank, (step, indices) in enumerate(by_step.items())
        for i in range(quotas[step])
    )


def _infos(path: Path, entries: Any) -> list[SampleInfo]:
    try:
        return [SampleInfo(**{**entry, "inputs": tuple(entry["inputs"])}) for entry in entries]
    except (TypeError, KeyError) as error:
        raise PreconditionError(f"`{path}` lists no samples: {error!r}", hint="calibrate again") from error


def _command(folder: Path) -> str:
    """The command that makes the samples below `folder` anew, with the recipe that the run folder keeps."""
    command = ["sdconvert", "convert", "--from", "calibration", "--fresh"]
    for parent in folder.parents:
        if (recipe := parent / "recipe.resolved.yaml").is_file():
            command[2:2] = [str(recipe), "--build", str(parent.parent)]
    return shlex.join(command)
