"""A registry keyed by the original class: the most derived registered ancestor answers."""

import difflib
from collections.abc import Callable
from typing import Generic, TypeVar

from sdconvert.errors import UnsupportedModelError

T = TypeVar("T", bound=type)


class ClassRegistry(Generic[T]):
    """Maps an original class to the class of ours that covers it.

    Args:
        what: What is registered, for messages: `adapter`.
    """

    def __init__(self, what: str) -> None:
        self._what = what
        self._entries: dict[type, T] = {}

    def register(self, origin: type) -> Callable[[T], T]:
        """Decorate the class that covers `origin`.

        Raises:
            UnsupportedModelError: `origin` is covered already.
        """

        def decorate(cls: T) -> T:
            if origin in self._entries:
                raise UnsupportedModelError(
                    f"{origin.__name__} already has the {self._what} {self._entries[origin].__name__}",
                    hint=f"remove one of the two; {cls.__name__} came second",
                )
            self._entries[origin] = cls
            return cls

        return decorate

    def lookup(self, origin: type) -> T:
        """Find the class that covers `origin` or its nearest registered ancestor.

        Raises:
            UnsupportedModelError: There is none; the message lists what is known.
        """
        for ancestor in origin.__mro__:
            if ancestor in self._entries:
                return self._entries[ancestor]
        known = sorted(cls.__name__ for cls in self._entries)
        near = difflib.get_close_matches(origin.__name__, known, n=1)
        raise UnsupportedModelError(
            f"no {self._what} covers {origin.__name__}; known: {', '.join(known)}",
            hint=f"register one with @…register({origin.__name__})" + (f", as {near[0]} does" if near else ""),
        )
