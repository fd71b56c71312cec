"""The errors that users can correct. Each says in one line what was found, what is accepted and what to do next."""


class PrunetuneError(Exception):
    """An error that the user can correct; the command line prints it as one line and exits with `exit_code`."""

    exit_code = 2


class ConfigError(PrunetuneError):
    """A recipe, suite or flag cannot be used."""


class DataError(PrunetuneError):
    """A data file, or a row of it, cannot be used."""


class ModelError(PrunetuneError):
    """A model cannot be loaded, cut or written."""


class UnknownArchitecture(ModelError):
    """The coupled rows and columns of a model's architecture are not known."""


class PlanError(PrunetuneError):
    """A plan does not fit its model, or no plan can meet a budget."""


class RunFolderError(PrunetuneError):
    """A run folder cannot be made, opened or resumed."""


class MissingPackage(PrunetuneError):
    """An optional package that the job needs is not installed."""


class LimitBroken(PrunetuneError):
    """The job ran, and its result broke a limit."""

    exit_code = 1


class SelfCheckFailed(LimitBroken):
    """The written checkpoint does not equal the model that was trained."""


def gpu_fault_message(error: BaseException) -> str:
    """What a GPU said as it gave up: nothing more can be computed in its process. "" for any other error."""
    first = (str(error).strip().splitlines() or [""])[0]
    return first if type(error).__name__ == "AcceleratorError" and "out of memory" not in first else ""
