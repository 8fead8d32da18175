"""One model that residency moves: its tensors between memory and a file, and the guard against untimely calls."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from sdconvert.errors import ResidencyError
from sdconvert.io.tensors import iterate_tensors, save_tensors, tensor_shapes

if TYPE_CHECKING:
    from sdconvert.pipelines.residency import ModelResidency


class Component:
    """A module whose persistent tensors can be dropped and read again.

    Changes of weights between two moves are kept: torch counts what writes to a tensor in place. It does not count
    writes through `.data`; a managed model must not be changed that way.

    Args:
        name: For messages and for the name of its file.
        module: The module.
        weights: File with its state, never written; None: it is written on demand.

    Raises:
        ResidencyError: The file does not fit the module.
    """

    def __init__(self, name: str, module: nn.Module, weights: Path | None) -> None:
        self.names: list[str] = []
        self.last_used = 0
        self._name = name
        self._module = module
        self._file = weights
        self._owns_file = False
        self._guards: list[RemovableHandle] = []
        self.in_memory = not any(tensor.is_meta for tensor in module.state_dict().values())
        self._seen = self._fingerprint()
        self.nbytes = sum(tensor.nbytes for tensor in self._unique().values())
        if weights is not None:
            self._check_fits(weights)

    def absorb(self, other: "Component") -> bool:
        """Make `other` another name of this component, if one of the two modules holds the weights of both.

        Raises:
            ResidencyError: They share some weights only.
        """
        ours, theirs = ({id(tensor) for tensor in one._state().values()} for one in (self, other))
        if not ours & theirs:
            return False
        if not (ours <= theirs or theirs <= ours):
            raise ResidencyError(
                f"components {self._name!r} and {other._name!r} share some of their weights, and each has others",
                hint="manage the module that holds both",
            )
        if ours < theirs or (ours == theirs and other._file and not self._file):
            self.unguard()
            self._module, self._file = other._module, other._file
            self.nbytes, self._seen = other.nbytes, other._seen
        return True

    def require_source(self) -> None:
        """Check that the tensors are in memory or in a file.

        Raises:
            ResidencyError: They are nowhere.
        """
        if self._file is None and not self.in_memory:
            raise ResidencyError(
                f"component {self._name!r} has no data and no file to read it from",
                hint="give weights=…, its weights file",
            )

    def to_disk(self, folder: Path) -> None:
        """Drop the tensors, after writing them to `folder` if no file holds them as they are now."""
        if not self.in_memory:
            return
        if self._file is None or self._seen != self._fingerprint():
            self._file, self._owns_file = folder / f"{self._name}.safetensors", True
            folder.mkdir(parents=True, exist_ok=True)
            save_tensors(self._unique(), self._file)
        self._assign({key: tensor.to("meta") for key, tensor in self._unique().items()})
        self.in_memory = False

    def to_memory(self) -> None:
        """Read the tensors if they are dropped.

        Raises:
            CheckpointError: The file is gone or damaged.
            ResidencyError: It has other tensors than the module.
        """
        if self.in_memory or self._file is None:
            return
        self._check_fits(self._file)
        wanted = self._unique()
        # Copied, not mapped: kernels round differently by the alignment of their operands, and a file's is its own.
        read = {key: one.to(wanted[key].dtype) for key, one in iterate_tensors(self._file) if key in wanted}
        self._assign(read)
        self.in_memory = True
        self._seen = self._fingerprint()

    def is_on(self, device: torch.device) -> bool:
        """Whether the tensors are there, and not on another device or dropped."""
        return self.in_memory and all(tensor.device.type == device.type for tensor in self._unique().values())

    def move(self, device: torch.device) -> None:
        """Move the tensors in memory to a device."""
        if self.in_memory and not self.is_on(device):
            unchanged = self._seen == self._fingerprint()
            self._module.to(device)
            if unchanged:
                self._seen = self._fingerprint()

    def guard(self, residency: "ModelResidency") -> None:
        """Make every call of a module with tensors an error."""
        if self._guards:
            return
        for module in self._module.modules():
            if any(True for _ in module.parameters(recurse=False)) or any(True for _ in module.buffers(recurse=False)):
                self._guards.append(module.register_forward_pre_hook(_Guard(self, residency)))

    def unguard(self) -> None:
        """Allow calls again."""
        for handle in self._guards:
            handle.remove()
        self._guards.clear()

    def remove_own_file(self) -> None:
        """Delete the file that `to_disk` wrote; what is mapped from it stays readable."""
        if self._owns_file and self._file is not None:
            self._file.unlink(missing_ok=True)

    def _state(self) -> dict[str, Tensor]:
        # keep_vars: the module's own tensors, not detached ones, so that tied ones are recognized.
        state: dict[str, Tensor] = self._module.state_dict(keep_vars=True)
        return state

    def _unique(self) -> dict[str, Tensor]:
        """The state without the second names of tied tensors."""
        unique: dict[int, tuple[str, Tensor]] = {}
        for key, tensor in self._state().items():
            unique.setdefault(id(tensor), (key, tensor))
        return dict(unique.values())

    def _assign(self, tensors: dict[str, Tensor]) -> None:
        names = {id(tensor): key for key, tensor in self._unique().items()}
        made: dict[str, Tensor] = {}
        for key, old in self._unique().items():
            new = tensors[key].detach()
            made[key] = nn.Parameter(new, requires_grad=old.requires_grad) if isinstance(old, nn.Parameter) else new
        # Tied tensors stay tied: both names are given the same object.
        self._module.load_state_dict({key: made[names[id(old)]] for key, old in self._state().items()}, assign=True)

    def _fingerprint(self) -> dict[str, tuple[int, int]]:
        return {key: (tensor.data_ptr(), tensor._version) for key, tensor in self._unique().items()}

    def _check_fits(self, weights: Path) -> None:
        found = tensor_shapes(weights)
        wanted = {key: tuple(tensor.shape) for key, tensor in self._unique().items()}
        tied = self._state().keys() - wanted.keys()
        differing = sorted(key for key in wanted.keys() | (found.keys() - tied) if wanted.get(key) != found.get(key))
        if differing:
            more = " …" if len(differing) > 5 else ""
            raise ResidencyError(
                f"`{weights}` does not fit {self._name!r}: they differ in {', '.join(differing[:5])}{more}",
                hint="give the file that the model's own save wrote, or none",
            )


class _Guard:
    """Refuses a call; an object, not a closure, so that copying a guarded model does not copy the residency too."""

    def __init__(self, component: Component, residency: "ModelResidency") -> None:
        self._component = component
        self._residency = residency

    def __call__(self, module: nn.Module, args: Any) -> None:
        called = " or ".join(repr(name) for name in self._component.names)
        resident = ", ".join(self._residency.resident) or "none"
        raise ResidencyError(
            f"{called} is called while it is {self._residency.states[self._component.names[0]]}ed; "
            f"loaded for computation: {resident}",
            hint=f"add {self._component.names[0]!r} to onload_model_names of the unit that calls it, and call "
            "pipe.load_models_to_device(self.onload_model_names) there",
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> "_Guard":
        return self
