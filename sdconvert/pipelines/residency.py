"""Which models of a pipeline are in memory: those that the running unit names, and no other.

A component is in one of three states. *Computation*: on the device, and the only state in which it may be called.
*Onload*: on the device still, because `memory_limit` leaves room for it. *Offload*: on the disk (its tensors are on
torch's `meta` device) or, beside a GPU, in host memory. Whole components move, never layers: names and classes of all
modules stay as they are, which quantization and state_dicts rely on.
"""

import difflib
import itertools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import torch
from torch import nn

from sdconvert.errors import BudgetError, ResidencyError
from sdconvert.memory import return_freed_memory
from sdconvert.pipelines.component import Component

Offload = Literal["disk", "cpu"]
State = Literal["offload", "onload", "computation"]


class ModelResidency:
    """Moves the components of a pipeline so that no more of them are in memory than have to be.

    A pipeline takes part by its attribute `residency`; its `load_models_to_device` then calls `load`.

    Args:
        device: Where models compute.
        offload: Where other models go: `disk`, or `cpu` beside another device. Default: `disk` on a CPU, else `cpu`.
        folder: For `disk`: where components are written that have no weights file of their own.
        memory_limit: Bytes of weights that may be on the device at once. Components that are not called stay there
            while they fit, those called last longest. None: only what is called is there.

    Raises:
        ResidencyError: The offload target is the device itself, or `disk` has no folder.
    """

    def __init__(
        self,
        device: str | torch.device = "cpu",
        *,
        offload: Offload | None = None,
        folder: Path | None = None,
        memory_limit: int | None = None,
    ) -> None:
        self.device = torch.device(device)
        self.offload: Offload = offload or ("disk" if self.device.type == "cpu" else "cpu")
        if self.offload == self.device.type:
            raise ResidencyError(
                f"models cannot be offloaded to {self.offload}, where they compute", hint="offload to disk"
            )
        if self.offload == "disk" and folder is None:
            raise ResidencyError("offloading to disk needs a folder", hint="give folder=…, not on a RAM disk")
        self._folder = folder
        self.memory_limit = memory_limit
        self._components: dict[str, Component] = {}
        self._computing: list[Component] = []
        self._allowed: tuple[str, ...] | None = None
        self._order = itertools.count(1)

    def manage(self, name: str, module: nn.Module, weights: Path | None = None) -> None:
        """Take charge of a component; until `load` names it, calling it is an error.

        Modules that contain one another, as a decoder and its autoencoder, move together.

        Args:
            name: What units call it.
            module: The component. It may be on `meta` if `weights` is given.
            weights: A weights file with exactly the module's state; it is read again whenever the component is
                needed, and never written. Not given: the component is written once, to `folder`.

        Raises:
            ResidencyError: The name is taken, the module shares a part of its weights with another one, has neither
                weights nor a file, or the file does not fit it.
        """
        if name in self._components:
            raise ResidencyError(f"a component {name!r} is managed already", hint="choose another name")
        component = Component(name, module, weights)
        for other in self._distinct():
            if other.absorb(component):
                component = other
                break
        component.require_source()
        component.names.append(name)
        self._components[name] = component
        component.guard(self)

    def manage_all(self, modules: Mapping[str, nn.Module]) -> None:
        """Take charge of several components, as `manage` does of one."""
        for name, module in modules.items():
            self.manage(name, module)

    def load(self, names: Iterable[str]) -> None:
        """Bring the named components to the device, and what has no room beside them off it.

        Raises:
            ResidencyError: A name is not managed, or not one of `only`; nothing has moved then.
            BudgetError: The named ones alone exceed `memory_limit`; nothing has moved then.
        """
        names = tuple(names)
        if self._allowed is not None and (undeclared := [name for name in names if name not in self._allowed]):
            raise ResidencyError(
                f"{', '.join(undeclared)} is to be loaded by a unit that does not declare it; "
                f"declared: {', '.join(self._allowed) or 'none'}",
                hint=f"add {undeclared[0]!r} to its onload_model_names",
            )
        wanted = self._named(names)
        self._require_room(wanted)
        for component in self._distinct():
            if component not in wanted:
                component.guard(self)
        evicted = self._to_evict(wanted)
        for component in evicted:
            self._evict(component)
        if evicted:
            return_freed_memory()
        for component in wanted:
            component.to_memory()
            component.move(self.device)
            component.unguard()
            component.last_used = next(self._order)
        self._computing = wanted

    @contextmanager
    def only(self, names: Sequence[str]) -> Iterator[None]:
        """Within the block, no other component may be loaded or called; those loaded before stay where they are."""
        before, self._allowed = self._allowed, tuple(names)
        kept = {self._components[name] for name in names if name in self._components}
        for component in self._computing:
            if component not in kept:
                component.guard(self)
        self._computing = [component for component in self._computing if component in kept]
        try:
            yield
        finally:
            self._allowed = before

    def restore(self) -> None:
        """Bring every component back to host memory, free to be called, and forget all of them."""
        for component in self._distinct():
            component.to_memory()
            component.move(torch.device("cpu"))
            component.unguard()
            component.remove_own_file()
        self._components.clear()
        self._computing = []

    @property
    def states(self) -> dict[str, State]:
        """State of every component, by name."""
        return {name: self._state(component) for name, component in self._components.items()}

    @property
    def resident(self) -> tuple[str, ...]:
        """Names of the components that are called now."""
        return tuple(name for name, state in self.states.items() if state == "computation")

    @property
    def memory_bytes(self) -> int:
        """Bytes of all weights on the device."""
        return _nbytes(component for component in self._distinct() if component.is_on(self.device))

    def require_fit(self, *groups: Iterable[str]) -> None:
        """Check before any work that the components of each group fit together.

        Raises:
            ResidencyError: A name is not managed.
            BudgetError: The largest group exceeds `memory_limit`; the message says what each of it needs.
        """
        self._require_room(max((self._named(names) for names in groups), key=_nbytes, default=[]))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.restore()

    def _state(self, component: Component) -> State:
        if component in self._computing:
            return "computation"
        return "onload" if component.is_on(self.device) else "offload"

    def _distinct(self) -> list[Component]:
        return list(dict.fromkeys(self._components.values()))

    def _named(self, names: Iterable[str]) -> list[Component]:
        found = []
        for name in names:
            if name not in self._components:
                known = list(self._components)
                near = difflib.get_close_matches(name, known, n=1)
                raise ResidencyError(
                    f"no component {name!r} is managed; managed: {', '.join(known) or 'none'}",
                    hint=f"did you mean {near[0]!r}?" if near else f"call manage({name!r}, …) first",
                )
            found.append(self._components[name])
        return list(dict.fromkeys(found))

    def _require_room(self, wanted: list[Component]) -> None:
        needed = _nbytes(wanted)
        if self.memory_limit is not None and needed > self.memory_limit:
            each = ", ".join(f"{component.names[0]} {component.nbytes}" for component in wanted)
            raise BudgetError(
                f"the models called together need {needed} bytes ({each}); the limit is {self.memory_limit}",
                hint=f"set memory_limit to at least {needed}",
            )

    def _to_evict(self, wanted: list[Component]) -> list[Component]:
        others = [one for one in self._distinct() if one not in wanted and one.is_on(self.device)]
        if self.memory_limit is None:
            return others
        room = self.memory_limit - _nbytes(wanted)
        evicted = []
        for component in sorted(others, key=lambda one: one.last_used, reverse=True):
            if component.nbytes <= room:
                room -= component.nbytes
            else:
                evicted.append(component)
        return evicted

    def _evict(self, component: Component) -> None:
        if self.offload == "cpu":
            component.move(torch.device("cpu"))
        elif self._folder is not None:
            component.to_disk(self._folder)


def _nbytes(components: Iterable[Component]) -> int:
    return sum(component.nbytes for component in components)
