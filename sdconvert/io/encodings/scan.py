"""JSON, value after value: of a large file, only one entry at a time is a tree of dictionaries."""

import json
import re
from collections.abc import Iterator
from typing import Any

_SPACE = re.compile(r"[ \t\n\r]*")


class Scanner:
    """Walks over JSON text; `at` is where it stands.

    Args:
        text: One JSON value.
    """

    def __init__(self, text: str) -> None:
        self._text = text
        self._decode = json.JSONDecoder(parse_constant=_refuse).raw_decode
        self.at = 0
        self._skip_space()

    def peek(self) -> str:
        """The next character, empty at the end."""
        return self._text[self.at : self.at + 1]

    def value(self) -> Any:
        """Read the value at hand.

        Raises:
            ValueError: The text is no JSON.
        """
        value, self.at = self._decode(self._text, self.at)
        self._skip_space()
        return value

    def members(self) -> Iterator[str]:
        """The keys of the object at hand; whoever takes one reads its value before the next.

        Raises:
            ValueError: The text is no JSON, or a key is there twice.
        """
        seen = set()
        for _ in self._walk("{", "}"):
            key = self.value()
            if not isinstance(key, str) or key in seen:
                raise ValueError(f"the key {key!r} at character {self.at} is there twice, or no text")
            seen.add(key)
            self._expect(":")
            yield key

    def items(self) -> Iterator[int]:
        """One number for each item of the list at hand; whoever takes one reads the item before the next.

        Raises:
            ValueError: The text is no JSON.
        """
        return self._walk("[", "]")

    def end(self) -> None:
        """Make sure that nothing follows.

        Raises:
            ValueError: Something does.
        """
        if self.at != len(self._text):
            raise ValueError(f"the JSON value ends at character {self.at}, the text at {len(self._text)}")

    def _walk(self, first: str, last: str) -> Iterator[int]:
        self._expect(first)
        if self.peek() == last:
            self._expect(last)
            return
        number = 0
        while True:
            yield number
            number += 1
            if self.peek() == last:
                self._expect(last)
                return
            self._expect(",")

    def _expect(self, character: str) -> None:
        if self.peek() != character:
            raise ValueError(f"expected {character} at character {self.at}, found {self.peek() or 'the end'}")
        self.at += 1
        self._skip_space()

    def _skip_space(self) -> None:
        space = _SPACE.match(self._text, self.at)
        assert space is not None  # for the type checker: it matches nothing, too
        self.at = space.end()


def _refuse(constant: str) -> Any:
    raise ValueError(f"{constant} is no number of JSON")
