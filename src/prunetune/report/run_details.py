"""Tables of a run's data, environment, timings and cost."""

from prunetune.manifest import DataFacts, Manifest
from prunetune.report import formatting
from prunetune.report.run_folder import RunFiles, get_number, lookup

SPLITS = ("train", "search", "texts", "guard", "valid", "test")


def split_summaries(data: DataFacts) -> list[tuple[str, str, str]]:
    """(name, rows, SHA-256) of the splits that the manifest names, in the order of their use."""
    named = data.counts.keys() | data.hashes.keys()
    return [
        (name, formatting.count(data.counts.get(name)), data.hashes.get(name, formatting.NOT_KNOWN))
        for name in (*(name for name in SPLITS if name in named), *sorted(named - set(SPLITS)))
    ]


def data_notes(data: DataFacts) -> list[str]:
    """How many rows were cut or left out, a sentence for each reason."""
    notes = []
    if data.too_long:
        notes.append(f"{formatting.count(data.too_long)} rows were longer than the limit and were cut or dropped.")
    if data.dropped:
        notes.append(f"{formatting.count(data.dropped)} rows that also stood in another split were dropped.")
    return notes


def environment_rows(run: RunFiles) -> list[tuple[str, str]]:
    """Model, device, packages and memory of the run, as (name, value)."""
    manifest, memory = run.manifest, run.manifest.peak_memory_mb
    if memory is None:
        memory = max(_logged_numbers(run, "memory_mb"), default=None)
    base = manifest.quantised  # the type in which it was tuned, and how far the written model is from the tuned one
    differs = (
        f"{base.scheme}; merged differs from it by {formatting.share(base.error, 2)} (root mean square of logits), "
        f"{formatting.share(base.same)} of most likely tokens equal"
    )
    times = (manifest.started, manifest.ended)  # "2026-11-30T08:15:02+00:00"
    started, ended = (f"{time[:16].replace('T', ' ')} UTC" if time else "" for time in times)
    seeds = [f"{name} {seed}" for name, seed in manifest.seeds.items() if seed is not None]
    recipe_seed = lookup(run.config, "seed")
    versions: dict[str, dict[str, None]] = {}  # of each package, in the order in which they worked on the run
    for environment in manifest.known_environments:
        for name, version in environment.versions.items():
            versions.setdefault(name, {})[version] = None
    rows = {
        "Model": run.model_name,
        "Result": ", ".join(filter(None, (manifest.pruned.class_name, manifest.pruned.layout))),
        "Started": started,
        "Ended": ended,
        "Host": manifest.host,
        "Device": manifest.device,
        "Arithmetic": manifest.dtype,
        "Base": "" if base.error is None or base.same is None else differs,
        "Seed": ", ".join(seeds) or ("" if recipe_seed is None else str(recipe_seed)),
        "Budgets": "; ".join(f"{budget.budget} {budget.words}" for budget in manifest.budgets),
        "Peak memory": None if memory is None else f"{formatting.count(memory)} MB",
        **{name: ", then ".join(used) for name, used in versions.items()},
    }
    return [(name, value) for name, value in rows.items() if value]


def timing_rows(manifest: Manifest) -> list[tuple[str, str]]:
    """How long each stage took, as (stage, duration), the total last."""
    known = {stage: seconds for stage, seconds in manifest.timings.items() if seconds is not None}
    rows = [(stage, formatting.duration(seconds)) for stage, seconds in known.items()]
    if len(known) > 1 and "total" not in known:
        rows.append(("total", formatting.duration(sum(known.values()))))
    return rows


def cost_rows(run: RunFiles) -> list[tuple[str, str]]:
    """Steps, chosen learning rate, speed, validation and memory of tuning, as (what, how much)."""
    validation, memory = run.manifest.validation, run.manifest.peak_memory_mb
    speeds, steps = sorted(_logged_numbers(run, "tokens_per_s")), _logged_numbers(run, "step")
    rows = {
        "Tuning steps": formatting.count(max(steps)) if steps else "",
        "Learning rate": run.manifest.learning_rate.description,
        "Tuning speed": f"{formatting.count(speeds[len(speeds) // 2])} tokens a second (median)" if speeds else "",
        "Validation": "",
        "Peak memory": f"{formatting.count(memory)} MB" if memory is not None else "",
    }
    if validation.share is not None:
        rows["Validation"] = (
            f"every {formatting.count(validation.every)} steps, {formatting.duration(validation.seconds)} in all, "
            f"{formatting.share(validation.share, 1)} of the tuning time"
        )
    return [(name, words) for name, words in rows.items() if words]


def _logged_numbers(run: RunFiles, key: str) -> list[float]:
    return [value for line in run.metrics if (value := get_number(line, key)) is not None]
