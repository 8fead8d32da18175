"""Registries keyed by the original class, and the entry points through which other packages fill them.

A package outside names its module in the group `sdconvert.adapters`; importing that module registers what it has:

    [project.entry-points."sdconvert.adapters"]
    my_unet = "my_package.my_unet"
"""

import difflib
import functools
import importlib.metadata
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from sdconvert.errors import AmbiguousAdapterError, ExtensionError, RegistrationError, UnsupportedModelError

ENTRY_POINTS = "sdconvert.adapters"

T = TypeVar("T")


class ClassRegistry(Generic[T]):
    """Maps an original class to what covers it; the nearest registered ancestor answers for a class.

    Args:
        what: What is registered, for messages. It also names the registry in the line that a message proposes: an
            `adapter` is registered with `@AdapterRegistry.register(…)`.
        base: What everything registered must extend.
        error: Raised for a class that nothing covers.
        method: The method that makes a class what it is. A class that defines its own is no longer what its ancestors
            are, so that they do not answer for it.
    """

    def __init__(
        self,
        what: str,
        base: type | None = None,
        error: type[UnsupportedModelError] = UnsupportedModelError,
        *,
        method: str | None = None,
    ) -> None:
        self.what = what
        self.error = error
        self._base = base
        self._method = method
        self._entries: dict[type, T] = {}

    def register(self, origin: type, override: bool = False) -> Callable[[T], T]:
        """Decorate what covers `origin`.

        Args:
            origin: The original class.
            override: Take the place of what covers it already.

        Raises:
            RegistrationError: `origin` is covered already, `override` overrides nothing, or the decorated class does
                not extend the registry's base.
        """

        def decorate(cover: T) -> T:
            if self._base and not (isinstance(cover, type) and issubclass(cover, self._base)):
                raise RegistrationError(
                    f"{_name(cover)} cannot be the {self.what} of {origin.__name__}: it is no {self._base.__name__}",
                    hint=f"write `class {_name(cover)}({self._base.__name__})`",
                )
            if origin in self._entries and not override:
                raise RegistrationError(
                    f"{origin.__name__} already has the {self.what} {_name(self._entries[origin])}; "
                    f"{_name(cover)} came second",
                    hint=f"remove one of the two, or replace the first with `{self.line(origin, 'override=True')}`",
                )
            if override and origin not in self._entries:
                raise RegistrationError(
                    f"{_name(cover)} is to override the {self.what} of {origin.__name__}, which has none",
                    hint=f"leave out override=True: `{self.line(origin)}`",
                )
            self._entries[origin] = cover
            return cover

        return decorate

    def lookup(self, cls: type) -> T:
        """Find what covers a class: its own entry, else that of its nearest registered ancestor.

        Raises:
            AmbiguousAdapterError: Two ancestors, neither of which extends the other, are covered differently.
            UnsupportedModelError: Nothing covers it (the registry's `error`).
            ExtensionError: A package that extends sdconvert cannot be imported.
        """
        nearest = self._nearest(cls)
        if len({id(self._entries[one]) for one in nearest}) > 1:
            named = " and ".join(f"{one.__name__} ({_name(self._entries[one])})" for one in nearest)
            raise AmbiguousAdapterError(
                f"{cls.__name__} has unrelated ancestors with a different {self.what} each: {named}",
                hint=f"say what it is with `{self.line(cls)}`",
            )
        if not nearest:
            raise self.error(f"no {self.what} covers {cls.__name__}; {self.known()}", hint=self.way_out(cls))
        return self._entries[nearest[0]]

    def covers(self, cls: type) -> bool:
        """Whether something is registered for a class or an ancestor of it."""
        return bool(self._nearest(cls))

    def entries(self) -> dict[type, T]:
        """What is registered, by original class, in the order of registration; extensions included."""
        load_extensions()
        return dict(self._entries)

    def known(self) -> str:
        """The original classes that are covered, for a message: `known: ControlNetModel, …`."""
        return f"known: {', '.join(sorted(cls.__name__ for cls in self._entries)) or 'none'}"

    def line(self, cls: type, *options: str) -> str:
        """The line that registers something for a class: `@AdapterRegistry.register(Foo)`."""
        registry = self.what.title().replace(" ", "") + "Registry"
        return f"@{registry}.register({', '.join((cls.__name__, *options))})"

    def way_out(self, cls: type) -> str:
        """What to do about a class that nothing covers."""
        near = difflib.get_close_matches(cls.__name__, [known.__name__ for known in self._entries], n=1)
        return f"register one with `{self.line(cls)}`" + (f", as {near[0]} does" if near else "")

    def _nearest(self, cls: type) -> list[type]:
        load_extensions()
        ancestors = list(cls.__mro__)
        if self._method:
            owner = next((one for one in ancestors if self._method in vars(one)), cls)
            ancestors = [one for one in ancestors if issubclass(one, owner)]
        covered = [one for one in ancestors if one in self._entries]
        return [one for one in covered if not any(other is not one and issubclass(other, one) for other in covered)]


@dataclass(frozen=True)
class Offender:
    """A part of a model that cannot be handled; `registry` names the one that knows nothing of its class."""

    path: str
    cls: type
    reason: str
    registry: ClassRegistry[Any] | None = None


def unknown(registry: ClassRegistry[Any], path: str, cls: type) -> Offender:
    """A part of a model whose class a registry does not know."""
    return Offender(path, cls, f"no {registry.what} covers {cls.__name__}", registry)


def refuse_together(summary: str, offenders: Sequence[Offender], hint: str) -> None:
    """Raise one error for all offenders of a model, or none if there are none.

    Args:
        summary: What cannot be done, for the first line.
        offenders: Each gets a line with its path and reason.
        hint: What to do about those that are known and refused.

    Raises:
        UnsupportedModelError: The error of the registry that does not know them, where there is just one such.
    """
    if not offenders:
        return
    registries = list(dict.fromkeys(offender.registry for offender in offenders))
    lines = [f"`{offender.path or '(the model)'}`: {offender.reason}" for offender in offenders]
    lines += [f"{registry.what} {registry.known()}" for registry in registries if registry]
    ways = [offender.registry.way_out(offender.cls) if offender.registry else hint for offender in offenders]
    error = registries[0].error if len(registries) == 1 and registries[0] else UnsupportedModelError
    raise error("\n".join([f"{summary}:", *lines]), hint="; ".join(dict.fromkeys(ways)))


def _name(cover: object) -> str:
    return str(getattr(cover, "__name__", type(cover).__name__))


_LOADED: set[str] = set()


def load_extensions() -> None:
    """Import what other packages name in the entry-point group `sdconvert.adapters`, once per process.

    Raises:
        ExtensionError: One of them cannot be imported; it names the entry point and the package it belongs to.
    """
    for point in extensions():
        if point.name in _LOADED:
            continue
        _LOADED.add(point.name)  # first, for the module may look something up while it is imported
        try:
            point.load()
        except (ImportError, AttributeError, SyntaxError) as error:
            _LOADED.discard(point.name)
            owner = point.dist.name if point.dist else "an unknown package"
            raise ExtensionError(
                f"entry point `{point.name} = {point.value}` of {owner} cannot be loaded: {error}",
                hint=f"repair or uninstall {owner}",
            ) from error


@functools.cache
def extensions() -> tuple[importlib.metadata.EntryPoint, ...]:
    """The entry points of the group, in the order of their names."""
    return tuple(sorted(importlib.metadata.entry_points(group=ENTRY_POINTS), key=lambda point: point.name))
