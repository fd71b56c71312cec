"""Scores of suites over time (`prunetune history`): a line of JSON for each evaluation of `eval` and `check`.

Lines hold scores, and no text or id of a row. A line that is cut short or damaged is passed over.
"""

import json
import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path

from prunetune.errors import ConfigError, DataError
from prunetune.evaluation.results import Evaluation, headline_metric
from prunetune.model.gguf_import import cache_folder
from prunetune.utils.files import home_folder, sha256
from prunetune.utils.json_lines import JsonObject, append_json_line, read_json_lines
from prunetune.utils.tables import table_lines

log = logging.getLogger(__name__)
NAME = "suite_scores.jsonl"


@dataclass(frozen=True)
class ScoredVersion:
    """One version of a model, scored on one state of a suite's file; the items of `evaluation` are not kept."""

    time: str  # ISO 8601, UTC
    model: str  # as it was named
    version: str  # SHA-256 of its files; "" where it is not known, as of an endpoint
    suite_hash: str  # SHA-256 of the suite's file
    evaluation: Evaluation

    def to_dict(self) -> JsonObject:
        """JSON-ready."""
        facts = {"time": self.time, "model": self.model, "version": self.version, "suite_sha256": self.suite_hash}
        return {**facts, **json.loads(self.evaluation.to_json())}


def history_file() -> Path:
    """In $PRUNETUNE_HOME, or in the user's cache folder."""
    return (home_folder() or cache_folder()) / NAME


def record_scores(evaluation: Evaluation, suite: str, model: str, fingerprint: str) -> None:
    """Add scores of a suite's file to the history; where that cannot be written, a warning is logged."""
    path, file = Path(suite).absolute(), history_file()
    if not path.is_file():  # a suite that was made in Python
        return
    digests = re.findall(r"\b[0-9a-f]{64}\b", fingerprint)  # the rest are versions of packages
    scores = Evaluation({name: replace(result, items=(), error="") for name, result in evaluation.tasks.items()})
    now = datetime.now(UTC).isoformat(timespec="seconds")
    scored = ScoredVersion(now, model, digests[0] if digests else "", sha256(path), scores)
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        append_json_line(file, {"suite": str(path), **scored.to_dict()})
    except OSError as broken:
        log.warning("%s cannot be written (%s): prunetune history will not list these scores", file, broken)


def read_scores(suite: Path) -> list[ScoredVersion]:
    """What was scored on a suite's file, the newest first; of one version on one state of the file the newest only.

    Raises `ConfigError` where nothing was.
    """
    path, file = suite.absolute(), history_file()
    versions: dict[tuple[str, str, str], ScoredVersion] = {}
    for record in read_json_lines(file)[0] if file.is_file() else ():
        if record.get("suite") == str(path):
            try:
                evaluation = Evaluation.from_json(json.dumps(record))
            except DataError:
                continue
            time, model, version, suite_hash = (
                str(record.get(name, "")) for name in ("time", "model", "version", "suite_sha256")
            )
            versions[model, version, suite_hash] = ScoredVersion(time, model, version, suite_hash, evaluation)
    if not versions:
        raise ConfigError(f"{suite}: {file} has no scores of this suite; prunetune eval and check add them")
    return sorted(versions.values(), key=lambda scored: scored.time, reverse=True)


def render_history(suite: Path, versions: Sequence[ScoredVersion]) -> str:
    """A row for each version, with the headline score of every task, ± one standard error."""
    tasks = dict.fromkeys(task for scored in versions for task in scored.evaluation.tasks)
    now = sha256(suite) if suite.is_file() else ""
    rows = []
    for scored in versions:
        row = [scored.time[:16].replace("T", " "), scored.model, scored.version[:8] or "–"]
        row.append("now" if scored.suite_hash == now else scored.suite_hash[:8])
        for task in tasks:
            result = scored.evaluation.tasks.get(task)
            metric = headline_metric(result) if result else ""
            score = result.scores[metric] if result and metric else None
            row.append(f"{metric} {score.value:.3f} ±{score.se:.3f}" if score else "–")
        rows.append(row)
    return "\n".join(table_lines(("scored (UTC)", "model", "version", "suite", *(f">{task}" for task in tasks)), rows))
