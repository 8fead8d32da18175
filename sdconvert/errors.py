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


class UnsupportedAttentionProcessorError(UnsupportedModelError):
    """An attention's processor is none that a rewrite is registered for."""


class UnsupportedLayerError(UnsupportedModelError):
    """A layer that attends is of a class that nothing is registered for."""


class UnsupportedSchedulerError(UnsupportedModelError):
    """A sampler is of a class, or has an option, that no table of coefficients expresses."""


class AmbiguousAdapterError(UnsupportedModelError):
    """A class descends from two registered ones, and nothing says which of them it is."""


class RegistrationError(UsageError):
    """Something is registered twice, or for a registry that it does not fit."""


class ExtensionError(UsageError):
    """A package that extends sdconvert through an entry point cannot be imported."""


class CapabilityError(UsageError):
    """A model family cannot do what the recipe asks of it; all such requests are named."""


class UnitError(UsageError):
    """A pipeline unit's declaration, inputs or outputs contradict each other."""


class MissingModelError(UsageError):
    """A pipeline was asked for what only a model that is not loaded can do."""


class ResidencyError(UsageError):
    """A model was called while its weights were not there to compute with, or cannot be managed as asked."""


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


class DeviceLostError(DeviceError):
    """The connection to a device broke; whether its work went on is not known."""


class DeviceTimeoutError(DeviceError):
    """A device did not answer in time."""


class DeviceFullError(DeviceError):
    """A device has no room for what is to be stored there."""
