"""Every decoder class of the installed transformers, made small: which open, are cut and are written rightly.

`python benchmarks/architectures.py` writes docs/reference/architectures.md and exits with 1 if a class fails in another
way than by a refusal. With names of architectures, it only prints their rows.
"""

from __future__ import annotations

import argparse
import logging
import re
import resource
import shutil
import tempfile
import time
import traceback
import warnings
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from rows import give
from tokenizers import Tokenizer, models
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from prunetune import cut, find_sites, masked
from prunetune.errors import PrunetuneError
from prunetune.export.checkpoint import kv_groups_validator, write_checkpoint
from prunetune.model.loading import load_meta_model
from prunetune.pipeline.plan_constraints import check_layout
from prunetune.pruning.families import FAMILIES
from prunetune.pruning.sites import unprunable_kinds
from prunetune.pruning.tiny_models import tiny_config, tiny_model
from prunetune.pruning.units import KIND_BY_NAME, UnitKind
from prunetune.search.plan_rules import PlanConstraints
from prunetune.search.select import select

TARGET = Path(__file__).parents[1] / "docs" / "reference" / "architectures.md"
TOLERANCE = 1e-5
MEMORY = 8 << 30  # bytes of address space; a class that asks for more fails alone
USUAL = ("kv-groups", "mlp-channels")
OF_MIXTURES = ("kv-groups", "expert-channels")
TYPES = ["mamba", "mamba", "attention", "mamba", "attention", "mamba"]
# Values where the class's own defaults are None, or are no model that runs.
UNSET = {"head_dim": 16, "n_routed_experts": 4, "num_key_value_heads": 2, "n_group": 1, "topk_group": 1}
OWN: dict[str, dict[str, Any]] = {
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention"] * 2, "num_hidden_layers": 6},
    "bamba": {"attn_layer_indices": [2, 4], "num_hidden_layers": 6},
    "deepseek_v2": {"num_experts_per_tok": 2, "n_routed_experts": 4, "moe_layer_freq": 1},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "granitemoehybrid": {"layer_types": TYPES, "num_hidden_layers": 6},
}
PATH = re.compile(r" ?\(?(?<!\w)(/[\w.+-]+){2,}\)?")  # of this machine, in the text of an ImportError
INTRODUCTION = """\
<!-- Written by benchmarks/architectures.py. -->
# Architectures

Every `*ForCausalLM` class of transformers {version}, made small with random weights: {held} of {total} open, and hold
what a run needs. Masked equals cut to 1e-5, and the written model, opened again, equals the cut one.

"Checked" ones have no entry in `families.py`: when such a model is opened, a small one of its own configuration is cut
first, and only kinds of units for which masked equals cut are offered. The others are refused with the line shown.

| class | model_type | known by | kinds of units | uniform | per-layer |
|---|---|---|---|---|---|
"""


@dataclass(frozen=True)
class Row:
    """What became of one class."""

    causal_class: str
    model_type: str
    kinds: tuple[str, ...] = ()
    layouts: tuple[str, str] = ("", "")  # uniform, per-layer: "yes", or why not
    refusal: str = ""
    fault: str = ""  # a crash, or a wrong result

    @property
    def holds(self) -> bool:
        return not self.fault and "yes" in self.layouts

    def line(self) -> str:
        names = f"| {self.causal_class} | {self.model_type} |"
        if self.holds:
            known = "entry" if self.model_type in FAMILIES else "checked"
            uniform, per_layer = ("yes" if layout == "yes" else "no" for layout in self.layouts)
            return f"{names} {known} | {', '.join(self.kinds)} | {uniform} | {per_layer} |"
        refusal = PATH.sub("", self.fault or self.refusal).replace("\n", " ").replace("|", "\\|")
        return f"{names} | {refusal} | | |"


def classes() -> dict[str, list[str]]:
    """{class: its model types}, of the classes with a language model's head and no other part."""
    found: dict[str, list[str]] = {}
    for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items():
        if name.endswith("ForCausalLM"):
            found.setdefault(name, []).append(model_type)
    return found


def example_config(model_type: str) -> Any:
    """A configuration of the class, of its default sizes."""
    config = CONFIG_MAPPING[model_type](**OWN.get(model_type, {}))
    for name, value in UNSET.items():
        if config.to_dict().get(name, 0) is None:
            setattr(config, name, value)
    return config


def survey(model_type: str) -> Row:
    """Open, cut and write a small model of one architecture."""
    name = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type]
    try:
        model = tiny_model(tiny_config(example_config(model_type)))
    except Exception as error:  # each class refuses in its own way
        return Row(name, model_type, refusal=f"no small model of the class's defaults: {str(error).splitlines()[0]}")
    folder = Path(tempfile.mkdtemp())
    try:
        return check(name, model_type, model, folder)
    except PrunetuneError as refusal:
        return Row(name, model_type, refusal=str(refusal).removeprefix(f"model {folder / 'dense'}: "))
    except Exception as error:
        logging.getLogger(__name__).info("%s", traceback.format_exc())
        return Row(name, model_type, fault=f"FAULT {type(error).__name__}: {str(error)[:200]}")
    finally:
        shutil.rmtree(folder)


def check(name: str, model_type: str, model: Any, folder: Path) -> Row:
    """Raises `PrunetuneError` for a model that is refused."""
    model.save_pretrained(folder / "dense")
    dense = load_meta_model(str(folder / "dense"))
    unprunable = unprunable_kinds(dense, tuple(KIND_BY_NAME))
    kinds = tuple(name for name, kind in KIND_BY_NAME.items() if kind not in unprunable)
    units = [kind for kind in (USUAL if UnitKind.MLP_CHANNEL not in unprunable else OF_MIXTURES) if kind in kinds]
    sites = find_sites(dense, units)
    layouts = []
    torch.manual_seed(0)
    for layout in ("uniform", "per-layer"):
        model = AutoModelForCausalLM.from_pretrained(folder / "dense").eval().requires_grad_(False)
        scores = {site.name: torch.rand(site.units) for site in sites}
        try:
            rules = PlanConstraints(layout, align=8, allows_groups=kv_groups_validator(model.config))
            plan = select(scores, sites, 0.7, rules)
            with masked(model, plan, sites=sites):
                expected = logits(model)
            result = relative(logits(cut(model, plan, sites=sites)), expected)
            if not result <= TOLERANCE:
                return Row(name, model_type, kinds, fault=f"FAULT cut and masked differ by {result:.1e}")
            written = write_checkpoint(model, tokenizer(), plan, sites, folder / layout, layout=layout, card="")
            loaded = AutoModelForCausalLM.from_pretrained(folder / layout, trust_remote_code=written.needs_code).eval()
            if not relative(logits(loaded), expected) <= TOLERANCE:
                raise RuntimeError(f"written {layout} and opened, it is another model")
        except Exception as error:
            try:
                if not isinstance(error, PrunetuneError):
                    check_layout(model.config, units, layout)  # refuses it before training
                    raise error
            except PrunetuneError as refusal:
                error = refusal
            layouts.append(str(error))
            continue
        layouts.append("yes")
    return Row(name, model_type, kinds, (layouts[0], layouts[1]), "; ".join(layouts))


def logits(model: Any) -> torch.Tensor:
    tokens = torch.arange(24).view(2, 12) * 5 % 113 + 3
    with torch.no_grad():
        return model(tokens, use_cache=False).logits


def relative(result: torch.Tensor, expected: torch.Tensor) -> float:
    return float((result - expected).abs().max() / expected.abs().max())


def tokenizer() -> Any:
    words = {"<pad>": 0, "<s>": 1, "</s>": 2}
    return PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(words, "<pad>")), eos_token="</s>")


def best_row(types: list[str]) -> Row:
    """Of the configurations of one class, the first that holds, else the last."""
    for model_type in types:
        row = survey(model_type)
        if row.holds:
            break
    return row


def set_up(verbose: bool) -> None:
    warnings.simplefilter("ignore")
    logging.basicConfig(level=logging.INFO if verbose else logging.ERROR, format="%(message)s")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("types", nargs="*", help="model types; all if none is named")
    parser.add_argument("--out", type=Path, help="append a row of results.jsonl to this file")
    parser.add_argument("--jobs", type=int, default=1, help="processes")
    options = parser.parse_args()
    started, rows = time.monotonic(), []
    with ProcessPoolExecutor(options.jobs, initializer=set_up, initargs=(bool(options.types),)) as pool:
        for row in pool.map(best_row, [[name] for name in options.types] or classes().values()):
            rows.append(row)
            print(row.line(), *(layout for layout in row.layouts if layout not in ("yes", "")), flush=True)
    held, faults = sum(row.holds for row in rows), [row for row in rows if row.fault]
    print(f"{held} of {len(rows)} hold, {len(faults)} faults, {time.monotonic() - started:.0f} s")
    if not options.types:
        head = INTRODUCTION.format(version=transformers.__version__, held=held, total=len(rows))
        order = sorted(rows, key=lambda row: (not row.holds, row.causal_class.lower()))
        TARGET.write_text(head + "".join(f"{row.line()}\n" for row in order), encoding="utf-8")
        case = f"decoder classes of transformers {transformers.__version__} that open and hold"
        give(
            {
                "bar": "T3", "case": f"{case}, of {len(rows)}; {len(faults)} crash or are cut wrongly",
                "value": held, "target": ">= 70",
                "met": held >= 70 and not faults, "unit": "classes", "device": "1 core",
                "command": "python benchmarks/architectures.py",
            },
            options.out,
        )  # fmt: skip
    return int(bool(faults))


if __name__ == "__main__":
    raise SystemExit(main())
