"""Every failure that a user can cause or meet, with what to do about it.

The exit code of the command line belongs to the class, the way out to the instance (`hint`).
"""


class SdconvertError(Exception):
    """Base of all expected failures.

    Args:
        message: What happened, to which thing, and what was found.
        hint: What to do next, printed as `hint: …`.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str = "") -> None:
        super().__init__(message)
        self.hint = hint

    def __str__(self) -> str:
        message = super().__str__()
        return f"{message}\nhint: {self.hint}" if self.hint else message


class UsageError(SdconvertError):
    """The request itself is wrong: arguments, recipe, or an input that is not what it should be."""

    exit_code = 2


class RecipeError(UsageError):
    """The recipe does not validate."""


class CheckpointError(UsageError):
    """A checkpoint is missing, damaged, or does not fit its config."""


class EncodingsError(UsageError):
    """An encodings file is malformed or does not fit its model."""


class PluginError(UsageError):
    """A plugin cannot be attached, removed or fused as asked."""


class UnsupportedModelError(UsageError):
    """No adapter covers a class that the model contains."""


class UnitError(UsageError):
    """A pipeline unit's declaration, inputs or outputs contradict each other."""


class MissingModelError(UsageError):
    """A pipeline was asked for what only a model that is not loaded can do."""


class PreconditionError(UsageError):
    """A stage was asked for before what it needs exists."""


class EnvironmentProblem(SdconvertError):
    """The machine lacks something: a package, disk space, a library."""

    exit_code = 3


class QualityGateError(SdconvertError):
    """A measured figure missed its gate."""

    exit_code = 4


class BudgetError(SdconvertError):
    """A plan does not fit the memory or disk budget."""

    exit_code = 5


class CompileError(SdconvertError):
    """The HTP compiler refused a graph, or its answer is not what was asked for."""

    exit_code = 6


class DeviceError(SdconvertError):
    """A phone or board did not do what was asked."""

    exit_code = 7
