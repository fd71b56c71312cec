"""One family of errors. Each says what was found, what would do, and the next step, in one line."""


class PrunetuneError(Exception):
    """Something the user can correct: the command line prints it as one line and exits with `exit_code`."""

    exit_code = 2


class ConfigError(PrunetuneError):
    """A recipe or a flag that cannot be used."""


class DataError(PrunetuneError):
    """A data file, or a row of it, that cannot be used."""


class ModelError(PrunetuneError):
    """A model that cannot be loaded, cut or written."""


class UnknownArchitecture(ModelError):
    """A model whose coupled rows and columns are not known."""


class PlanError(PrunetuneError):
    """A plan that does not fit its model, or a budget that no plan can meet."""


class RunFolderError(PrunetuneError):
    """A run folder that cannot be made, opened or resumed."""


class MissingPackage(PrunetuneError):
    """An optional package that the job at hand needs."""


class LimitBroken(PrunetuneError):
    """The job ran, and its result broke a limit."""

    exit_code = 1


class SelfCheckFailed(LimitBroken):
    """The written checkpoint does not equal the model that was trained."""
