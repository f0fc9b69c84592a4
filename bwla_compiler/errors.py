"""Every exception of the project. A message says what was found, where, and what to do."""


class BwlaError(Exception):
    """Base of all errors that the project raises on purpose."""


class RecipeError(BwlaError, ValueError):
    """A recipe, an override or a backend option is unknown, malformed or out of range."""


class SettingsError(BwlaError, ValueError):
    """An environment variable of the project has a value that is not known."""


class CaptureError(BwlaError, RuntimeError):
    """The model cannot be turned into the normal form."""


class ModelError(BwlaError, ValueError):
    """A model of an architecture cannot be made, or does not work before anything is done to it."""


class PlanError(BwlaError, ValueError):
    """The model has nothing to plan: no linears, or none that may be quantized."""


class WeightError(BwlaError, ValueError):
    """A weight is NaN, infinite, freed, or of a dtype that cannot be quantized."""


class CalibrationError(BwlaError, ValueError):
    """The calibration tokens are empty, too few, of a wrong shape or dtype."""


class ShapeError(BwlaError, ValueError):
    """A tensor has a shape that the function does not take."""


class CheckpointError(BwlaError, OSError):
    """A checkpoint is missing, corrupt, truncated or of an unknown format version."""


class BuildError(BwlaError, RuntimeError):
    """An emitted kernel does not compile or load; carries the compiler's own words."""


class GradientError(BwlaError, RuntimeError):
    """Gradients were asked through a quantized linear, which has none."""


class OutOfMemory(BwlaError, MemoryError):
    """What was asked for needs more memory than there is."""


class CacheError(BwlaError, ValueError):
    """Keys and values cannot be cached in the bits that were asked for."""


class DemoError(BwlaError, RuntimeError):
    """The embedded model cannot be built or found."""


class DeviceError(BwlaError, RuntimeError):
    """A device is not known, or the machine does not have it."""


class WorkerError(BwlaError, RuntimeError):
    """A worker process ended without a result."""


class HarnessError(BwlaError, RuntimeError):
    """The harness of the benchmarks is not beside the package."""


def first_line(error: Exception) -> str:
    """Return the first line of an error of another library, or its type where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__
