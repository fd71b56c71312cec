"""The errors that users can correct. Each says in one line what was found, what is accepted and what to do next."""

HIDDEN = "[hidden]"  # begins what stands in place of a text of a row that is not shown


class PrunetuneError(Exception):
    """An error that the user can correct; the command line prints it as one line and exits with `exit_code`.

    `quoted` is the part of the text that quotes rows or answers; `unquoted` is the text without it. See `Redaction`.
    """

    exit_code = 2

    def __init__(self, text: str = "", *, quoted: str = "") -> None:
        super().__init__(text)
        self.unquoted = text.replace(quoted, HIDDEN) if quoted else text

    def __str__(self) -> str:
        text = super().__str__().replace("\n", " ")  # names and values of users may hold anything
        return text if len(text) <= 3000 else f"{text[:2997]}..."


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
