"""Where the tensors of all samples wait between two parts of a graph: in memory within a budget, else on disk."""

import shutil
from collections.abc import Hashable
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from sdconvert.errors import UsageError
from sdconvert.quantize.adaround.storage import StoredTensor, compact, spill


class ActivationStore:
    """Holds tensors until they were taken as often as was said.

    Floats are kept as `dtype` wherever they are, so what is read does not depend on the budget.

    Args:
        budget_bytes: The most that is held in memory.
        folder: For the rest. What a killed process left there is removed, and everything again by `close`.
        dtype: Of stored floats: float16 (with a power of two per tensor, so that nothing overflows) or float32.

    Attributes:
        memory_bytes: Held in memory now.
        disk_bytes: Held on disk now.
        peak_memory_bytes: The most there was in memory.
        peak_disk_bytes: The most there was on disk.
    """

    def __init__(self, budget_bytes: int, folder: Path, dtype: torch.dtype = torch.float16) -> None:
        self._budget, self._folder, self._dtype = budget_bytes, folder, dtype
        self._held: dict[Hashable, tuple[StoredTensor, int]] = {}
        self._files = 0
        self.memory_bytes = self.disk_bytes = self.peak_memory_bytes = self.peak_disk_bytes = 0
        self.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: Hashable) -> bool:
        return key in self._held

    def put(self, key: Hashable, tensor: Tensor, uses: int) -> None:
        """Keep a tensor until it was taken `uses` times.

        Raises:
            UsageError: There is one under this key, or it is never to be taken.
            EnvironmentProblem: The disk is full.
        """
        if key in self._held or uses < 1:
            raise UsageError(f"`{key}` cannot be stored for {uses} uses", hint="one tensor per key, of one use or more")
        stored = compact(tensor, self._dtype)
        if self.memory_bytes + stored.nbytes <= self._budget:
            self.memory_bytes += stored.nbytes
        else:
            self._folder.mkdir(parents=True, exist_ok=True)
            stored = spill(stored, self._folder / f"{self._files}.bin")
            self._files += 1
            self.disk_bytes += stored.nbytes
        self._held[key] = stored, uses
        self.peak_memory_bytes = max(self.peak_memory_bytes, self.memory_bytes)
        self.peak_disk_bytes = max(self.peak_disk_bytes, self.disk_bytes)

    def take(self, key: Hashable) -> Tensor:
        """A tensor, once less to be taken; after the last time it is gone.

        Raises:
            UsageError: There is none.
        """
        tensor = self.look(key)
        self.release(key)
        return tensor

    def release(self, key: Hashable) -> None:
        """Count one use of a tensor, without reading it.

        Raises:
            UsageError: There is none.
        """
        stored, uses = self._find(key)
        if uses > 1:
            self._held[key] = stored, uses - 1
        else:
            self._drop(key)

    def look(self, key: Hashable) -> Tensor:
        """A tensor that is not taken by that.

        Raises:
            UsageError: There is none.
        """
        return self._find(key)[0].read()

    def hold(self, key: Hashable) -> None:
        """Have a tensor stay for one more use.

        Raises:
            UsageError: There is none.
        """
        stored, uses = self._find(key)
        self._held[key] = stored, uses + 1

    def replace(self, key: Hashable, tensor: Tensor) -> None:
        """Put another tensor in a tensor's place, for as many uses as are left.

        Raises:
            UsageError: There is none.
            EnvironmentProblem: The disk is full.
        """
        _, uses = self._find(key)
        self._drop(key)
        self.put(key, tensor, uses)

    def close(self) -> None:
        """Forget everything, and remove the folder."""
        self._held.clear()
        self.memory_bytes = self.disk_bytes = 0
        shutil.rmtree(self._folder, ignore_errors=True)

    def _find(self, key: Hashable) -> tuple[StoredTensor, int]:
        if key not in self._held:
            raise UsageError(f"`{key}` is not stored", hint="it was never put, or taken as often as was said")
        return self._held[key]

    def _drop(self, key: Hashable) -> None:
        stored, _ = self._held.pop(key)
        if stored.path is None:
            self.memory_bytes -= stored.nbytes
        else:
            self.disk_bytes -= stored.nbytes
            stored.path.unlink()
