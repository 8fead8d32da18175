"""Linear combinations of named values: a solver written with them writes down its own coefficients."""

from collections.abc import Mapping
from typing import Any


class Combination:
    """`Σ coefficient · value`, the values known by name only.

    It adds, subtracts and scales like the tensor that it stands for, so the formulas of a paper stay as they are.

    Args:
        terms: Coefficients by the name of the value.
    """

    __array_ufunc__ = None  # numpy's scalars leave `scalar * combination` to this class

    def __init__(self, terms: Mapping[str, Any]) -> None:
        self.terms = dict(terms)

    def __add__(self, other: "Combination") -> "Combination":
        names = dict.fromkeys([*self.terms, *other.terms])
        return Combination({name: self.terms.get(name, 0.0) + other.terms.get(name, 0.0) for name in names})

    def __mul__(self, factor: Any) -> "Combination":
        return Combination({name: factor * coefficient for name, coefficient in self.terms.items()})

    __rmul__ = __mul__

    def __sub__(self, other: "Combination") -> "Combination":
        return self + -1.0 * other

    def __truediv__(self, divisor: Any) -> "Combination":
        return Combination({name: coefficient / divisor for name, coefficient in self.terms.items()})

    def coefficients(self) -> dict[str, float]:
        """The terms as plain floats, without those that are exactly zero."""
        return {name: float(coefficient) for name, coefficient in self.terms.items() if coefficient != 0.0}


def value(name: str) -> Combination:
    """The combination that is the named value itself."""
    return Combination({name: 1.0})
