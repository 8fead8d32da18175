"""Which estimator takes the range of which kind of tensor."""

from collections.abc import Collection, Mapping

from sdconvert.config import RangeEstimator, did_you_mean
from sdconvert.errors import UsageError

DEFAULT = "default"


def estimator_of(estimators: Mapping[str, RangeEstimator], kind: str) -> RangeEstimator:
    """The estimator for tensors of a kind; min-max where nothing is said."""
    return estimators.get(kind, estimators.get(DEFAULT, RangeEstimator()))


def require_known_kinds(
    estimators: Mapping[str, RangeEstimator], kinds: Collection[str], fixed: Collection[str]
) -> None:
    """Check that every estimator takes a range.

    Args:
        estimators: Of the recipe, by kind.
        kinds: Of the tensors of all graphs.
        fixed: Kinds whose ranges the settings fix.

    Raises:
        UsageError: No graph has tensors of a kind, or their range is fixed.
    """
    for kind in estimators.keys() - {DEFAULT}:
        if kind in fixed:
            raise UsageError(f"quantize.ranges: the range of {kind} is fixed", hint=f"leave `{kind}` out")
        if kind not in kinds:
            known = sorted({*kinds} - {*fixed})
            raise UsageError(
                f"quantize.ranges: `{kind}` makes no tensor of any graph", hint=did_you_mean(kind, [DEFAULT, *known])
            )
