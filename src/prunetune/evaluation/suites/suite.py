"""The suite file, read and checked: tasks with their data, prompt, scorers and limits.

```yaml
root: data                      # where relative sources start; default: the suite's own folder
defaults: {limit: 200}          # of every task
tasks:
  overruling:
    data: legal/overruling/test.jsonl
    scorer: accuracy
    limits: {relative: 0.95, statistical: true}
```
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from prunetune.config.fields import merge_mappings, option, read_options, sources
from prunetune.config.yaml_file import read_yaml
from prunetune.errors import ConfigError, PrunetuneError
from prunetune.evaluation.suites.protocol import GenerationSettings
from prunetune.evaluation.suites.scorers import Permission, TaskScorer, is_reference_free, parse_scorers
from prunetune.utils.files import expand_path
from prunetune.utils.suggest import validate_name
from prunetune.utils.untrusted import short_repr

SUITE_KEYS = ("tasks", "defaults", "root", "level", "correction")
NON_OPTION_KEYS = ("name", "scorer", "limits")  # keys of a task that are no plain options
UNSET = float("-inf")  # no bound; YAML cannot express it, so no user can have asked for it
DEFAULT_SIGNIFICANCE = 0.05


@dataclass(frozen=True, kw_only=True)
class Bounds:
    """The limits on one metric, as a suite writes them."""

    min: float = option(UNSET, "Lowest allowed score.")
    max: float = option(UNSET, "Highest allowed score (perplexity, bits per byte).")
    relative: float = option(
        UNSET, "Lowest allowed share of the reference's score; inverted where lower is better.", gt=0
    )
    drop: float = option(UNSET, "Largest allowed loss against the reference, in the metric's own unit.", ge=0)
    statistical: float = option(
        UNSET, "Significance level of a paired test that the score is worse than the reference's.", gt=0, le=0.5
    )


@dataclass(frozen=True)
class SuiteLimit:
    """One limit on one metric of one task."""

    task: str
    metric: str
    kind: str  # min, max, relative, drop, statistical
    bound: float  # for statistical: the level


@dataclass(frozen=True, kw_only=True)
class TaskOptions:
    """The options of one task; each is a key in its mapping, beside `scorer` and `limits`."""

    data: tuple[str, ...] = sources("Sources of the rows: a file, a glob, a hub name, or `demo`.")
    split: Literal["test", "valid", "search", "train"] = option("test", "The part of a hub data set or of the demo.")
    limit: int = option(200, "Most rows, a fixed sample; 0: all.", ge=0)
    template: Literal["auto", "chat", "raw"] = option("auto", "As data.template of a recipe.")
    prompt: str = option("", "Jinja2 template of the prompt over a row's fields; default: its field prompt.")
    completion: str = option("", "The same of the right answer.")
    text: str = option("", "The same of a text whose perplexity is scored.")
    choices: str = option("", "Jinja2 expression of the list of choices, such as options.text.")
    answer: str = option("", "The same of the right choice: its index or its text.")
    likelihood: Literal["mean", "sum", "characters"] = option(
        "mean", "How choices are compared: log-likelihood per token, in all, or per character."
    )
    lettered: bool = option(False, "List the choices in the prompt and ask for a letter.")
    before: str = option(
        "", "With lettered: the end of the prompt that the list is put in front of; default: after the prompt."
    )
    heading: str = option("", "With lettered: a line above the list.")
    max_new_tokens: int = option(128, "Longest generated answer in tokens.", ge=1)
    stop: tuple[str, ...] = option((), "Texts that end a generated answer.", entry_name="text")
    lm_eval: str = option("", "A task of lm-eval by its name, instead of data and scorer.")
    fewshot: int = option(0, "With lm_eval: solved examples in the prompt.", ge=0)
    include: str = option("", "With lm_eval: a folder with your own task files; needs --allow-code.")


@dataclass(frozen=True)
class Task:
    """One task of a suite, checked; or the error that keeps it from being run."""

    name: str
    options: TaskOptions = field(default_factory=TaskOptions)
    scorers: tuple[TaskScorer, ...] = ()
    limits: tuple[SuiteLimit, ...] = ()
    root: str = ""
    error: str = ""  # why it cannot be run

    @property
    def generation_settings(self) -> GenerationSettings:
        """The template, length and stop texts of its requests."""
        return GenerationSettings(self.options.template, self.options.max_new_tokens, self.options.stop)

    @property
    def metrics(self) -> tuple[str, ...]:
        """The metrics of its scorers, the headline first; those of an lm-eval task are not known before it runs."""
        return tuple(metric for use in self.scorers for metric in use.metrics)

    @property
    def permissions(self) -> dict[Permission, str]:
        """What the user has to allow before anything of the task is opened -> the part of the task that needs it."""
        needed = {use.scorer.permission: f"scorer {use.scorer.metrics[0]}" for use in self.scorers}
        if self.options.include:  # task files of lm-eval can name functions in Python files beside them
            needed["code"] = "a task file in include"
        return {permission: part for permission, part in needed.items() if permission}

    @property
    def is_reference_free(self) -> bool:
        """Whether its rows may lack a right answer."""
        return all(is_reference_free(use) for use in self.scorers)


@dataclass(frozen=True)
class Suite:
    """Tasks in the order of their file."""

    tasks: tuple[Task, ...]
    level: float = DEFAULT_SIGNIFICANCE  # of all statistical limits together
    correction: Literal["holm", "none"] = "holm"
    source: str = ""

    @property
    def limits(self) -> tuple[SuiteLimit, ...]:
        """The limits of all tasks."""
        return tuple(limit for task in self.tasks for limit in task.limits)


def load_suite(path: Path | str, *, strict: bool = True, root: Path | str | None = None) -> Suite:
    """Read and check a suite file; `root` overrides its own. Raises `ConfigError`.

    Without `strict`, a task that cannot be run keeps its `error`, and the others can still be run.
    """
    path = expand_path(path)
    values = read_yaml(path, "the suite", "name a YAML file, see suites/")
    if root is not None and isinstance(values, Mapping):
        values = {**values, "root": str(expand_path(root).absolute())}
    suite = parse_suite(values, where=str(path), folder=path.parent)
    faulty = next((task for task in suite.tasks if task.error), None)
    if strict and faulty is not None:
        raise ConfigError(faulty.error)
    return suite


def parse_suite(values: Any, *, where: str = "suite", folder: Path = Path()) -> Suite:
    """The suite in a mapping; a task that cannot be run keeps its error. Raises `ConfigError` for all else."""
    if not isinstance(values, Mapping) or not values.get("tasks"):
        raise ConfigError(f"{where}: a suite has the key tasks, a list or a mapping of tasks; see suites/")
    for key in values:
        validate_name(str(key), SUITE_KEYS, f"{where}: key")
    level = values.get("level", DEFAULT_SIGNIFICANCE)
    if not isinstance(level, float) or not 0 < level <= 0.5:
        raise ConfigError(f"{where}: level must lie in (0, 0.5], got {short_repr(level)}")
    root = str(folder / expand_path(str(values.get("root") or "").strip()))
    correction: Any = validate_name(str(values.get("correction", "holm")), ("holm", "none"), f"{where}: correction")
    defaults = values.get("defaults") or {}
    if not isinstance(defaults, Mapping):
        raise ConfigError(f"{where}: defaults map options of every task to values, got {short_repr(defaults)}")
    tasks = tuple(_task(name, task, defaults, root, level, where) for name, task in _entries(values["tasks"], where))
    names = [task.name for task in tasks]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ConfigError(f"{where}: two tasks are called {twice}; give one another name")
    return Suite(tasks, level, correction, where)


def _entries(tasks: Any, where: str) -> list[tuple[str, Any]]:
    """Every task as (name, options), from a mapping or a list."""
    if isinstance(tasks, Mapping):
        return [(str(name), task) for name, task in tasks.items()]
    if not isinstance(tasks, Sequence) or isinstance(tasks, str):
        raise ConfigError(f"{where}: tasks is a list or a mapping of tasks, got {short_repr(tasks)}")
    names = [(task.get("name") or task.get("lm_eval")) if isinstance(task, Mapping) else None for task in tasks]
    return [
        (str(name or f"task-{number}"), task) for number, (name, task) in enumerate(zip(names, tasks, strict=True), 1)
    ]


def _task(name: str, value: Any, defaults: Any, root: str, level: float, where: str) -> Task:
    where = f"{where}: task {name}"
    try:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{where}: a task maps options to values, got {short_repr(value)}")
        keys = merge_mappings(defaults, value)
        plain = {key: item for key, item in keys.items() if key not in NON_OPTION_KEYS}
        options = read_options(TaskOptions, plain, where=where)
        if options.lm_eval:
            return Task(name, options, (), parse_limits(keys.get("limits"), name, (), level, where), root)
        if "" in options.stop:
            raise ConfigError(f"{where}: stop has an empty text, which would end every answer at once; leave it out")
        if not options.data:
            raise ConfigError(f"{where} names no data; give a file, a glob, a hub data set, or lm_eval")
        if "scorer" not in keys:
            raise ConfigError(f"{where} names no scorer; give one, such as accuracy, rouge or perplexity")
        task = Task(name, options, parse_scorers(keys["scorer"], where), root=root)
        return replace(task, limits=parse_limits(keys.get("limits"), name, task.metrics, level, where))
    except PrunetuneError as error:
        return Task(name, root=root, error=str(error))


def parse_limits(value: Any, task: str, metrics: Sequence[str], level: float, where: str) -> tuple[SuiteLimit, ...]:
    """The limits in a task's `limits`: bounds of its first metric, or metric -> bounds; raises `ConfigError`.

    `metrics` are those that the task's scorers give; where none are known (lm-eval's), any name is accepted.
    """
    if value is None:
        return ()
    if not isinstance(value, Mapping):
        raise ConfigError(
            f"{where}: limits maps min, max, relative, drop or statistical to a bound, got {short_repr(value)}"
        )
    if any(isinstance(bounds, Mapping) for bounds in value.values()):
        by_metric = dict(value)
    elif metrics:
        by_metric = {metrics[0]: value}
    else:
        raise ConfigError(f"{where}: limits of an lm_eval task name their metric, such as acc: {{relative: 0.95}}")
    limits = []
    for name, bounds in by_metric.items():
        metric = validate_name(str(name), metrics, f"{where}: limits: metric") if metrics else str(name)
        of_metric = f"{where}: limits.{name}"
        if not isinstance(bounds, Mapping):
            raise ConfigError(
                f"{of_metric} maps min, max, relative, drop or statistical to a bound, got {short_repr(bounds)}"
            )
        given = dict(bounds)
        if given.get("statistical") is True:
            given["statistical"] = level
        elif given.get("statistical") is False:
            del given["statistical"]
        kinds = vars(read_options(Bounds, given, where=of_metric))
        limits += [SuiteLimit(task, metric, kind, bound) for kind, bound in kinds.items() if bound != UNSET]
    return tuple(limits)
