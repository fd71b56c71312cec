"""No file from somebody else runs code without its flag: hostile files of every kind, each opened as commands do.

Each artefact holds a payload that writes a marker file. Opening it ends well or in one line; the marker is never there.
"""

from __future__ import annotations

import json
import pickle
import re
import shutil
import sqlite3
import sys
import zipfile
from collections.abc import Callable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from gguf import GGUFWriter

from prunetune.bench.llamacpp import gguf_context_length
from prunetune.bench.models import resolve_models
from prunetune.bench.options import BenchOptions
from prunetune.compare.methods import read_variants
from prunetune.config.recipe import DataConfig, RunConfig, load_recipe
from prunetune.cost.latency_table import LatencyTable
from prunetune.data.encoding import encode_prompts
from prunetune.data.records import Message
from prunetune.data.sources import read_records
from prunetune.errors import ModelError, PrunetuneError
from prunetune.evaluation.suites import evaluate_suite, load_suite
from prunetune.evaluation.suites.cache import AnswerStore, CachedBackend
from prunetune.evaluation.suites.open_model import check_can_open, dense_model_of_run, open_backend, resolve_checkpoint
from prunetune.evaluation.suites.options import EvalOptions
from prunetune.export.source import ExportSource
from prunetune.model import gguf_import
from prunetune.model.checksums import CHECKSUM_FILE, verify_checksums, write_checksums
from prunetune.model.loading import load_meta_model, load_model_and_tokenizer, open_safetensors
from prunetune.plan import Plan
from prunetune.runs.diff import load_compared_run
from prunetune.runs.history import list_runs
from prunetune.train.checkpoints import Checkpoints, TrainingState
from prunetune.utils.files import sha256
from support.data import subwords, write_lines
from support.evaluation import question
from support.export import run_folder
from support.suites import ScriptedBackend, model_folder, open_rows

pytestmark = pytest.mark.filterwarnings("default")  # lm-eval's and transformers' own
SOURCE = Path(__file__).parents[1] / "src"
CHAT = question(0, kind="chat", messages=(Message("user", "Where?"),))


class Payload:
    """Unpickled, it writes the marker."""

    def __init__(self, code: str) -> None:
        self.code = code

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return exec, (self.code,)


@dataclass
class Place:
    """A folder with a tiny model, a per-layer run and rows; and payloads that write a marker."""

    folder: Path
    templates: Path

    @property
    def marker(self) -> Path:
        return self.folder / "marker"

    @property
    def code(self) -> str:
        return f"open({str(self.marker)!r}, 'w').close()\n"

    @property
    def pickled(self) -> bytes:
        return pickle.dumps(Payload(self.code), protocol=2)

    @property
    def torch_pickled(self) -> bytes:
        """As `torch.save` would write it."""
        file = self.folder / "payload.pt"
        torch.save({"model.norm.weight": Payload(self.code)}, file)
        return file.read_bytes()

    @property
    def tag(self) -> str:
        """A YAML tag that calls a function."""
        return f"!!python/object/apply:builtins.exec [{json.dumps(self.code)}]"

    def write(self, name: str, content: str | bytes | dict[str, Any]) -> Path:
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if isinstance(content, bytes):
            path.write_bytes(content)
        else:
            path.write_text(json.dumps(content) if isinstance(content, dict) else content, encoding="utf-8")
        return path

    def edit(self, name: str, **changes: Any) -> None:
        self.write(name, json.loads((self.folder / name).read_text()) | changes)

    def model(self, *, evil: bool = True, **config: Any) -> Path:
        """A model folder, with `evil.py`, and changes of its config.json."""
        folder = self.folder / "model"
        shutil.copytree(self.templates / "model", folder)
        self.edit("model/config.json", **config)
        if evil:
            self.write("model/evil.py", self.code + "class Evil: pass\n")
        return folder

    def run(self, **config: Any) -> Path:
        """A per-layer run folder, whose model's config.json is changed."""
        folder = self.folder / "run"
        shutil.copytree(self.templates / "run", folder)
        self.edit("run/model/config.json", **config)
        for name in ("modeling_pruned.py", "configuration_pruned.py"):
            self.write(f"run/model/{name}", self.code + (folder / "model" / name).read_text())
        write_checksums(folder / "model")
        return folder

    def suite(self, text: str) -> None:
        """Evaluate a suite of this text on a backend that answers at once."""
        write_lines(self.folder / "rows.jsonl", *open_rows(1))
        suite = load_suite(self.write("suite.yaml", text), strict=False)
        evaluation = evaluate_suite(ScriptedBackend(), suite)
        if error := next((result.error for result in evaluation.tasks.values() if result.error), ""):
            raise PrunetuneError(error)

    def data(self, name: str) -> None:
        """Read a data file."""
        read_records([name], DataConfig(root=str(self.folder), train=(name,)), "train")


def load(folder: Path | str, **options: Any) -> None:
    """Load a model as every command does, encode a chat by its template, and run it."""
    loaded = load_model_and_tokenizer(str(folder), device=torch.device("cpu"), dtype=torch.float32, **options)
    ids = encode_prompts([CHAT], loaded.tokenizer, "auto")[0]
    loaded.model(torch.tensor([list(ids)[:8] or [1]]))


ARTEFACTS: dict[str, Callable[[Place], Any]] = {}


def artefact(open_it: Callable[[Place], Any]) -> Callable[[Place], Any]:
    """Add a function that writes a hostile file and opens it."""
    ARTEFACTS[open_it.__name__.replace("_", " ")] = open_it
    return open_it


# -- model folders ---------------------------------------------------------------------------------------------------


@artefact
def auto_map_of_the_configuration(place: Place) -> None:
    load(place.model(auto_map={"AutoConfig": "evil.Evil"}))


@artefact
def auto_map_of_the_model(place: Place) -> None:
    load(place.model(auto_map={"AutoModelForCausalLM": "evil.Evil"}))


@artefact
def auto_map_of_an_unknown_type(place: Place) -> None:
    load(place.model(model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}))


@artefact
def auto_map_of_another_folder(place: Place) -> None:
    other = place.write("other/evil.py", place.code + "class Evil: pass\n").parent
    load(place.model(model_type="evil", auto_map={"AutoConfig": f"{other}--evil.Evil"}))


@artefact
def auto_map_in_a_dry_run(place: Place) -> None:
    load_meta_model(str(place.model(auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})))


@artefact
def auto_map_of_the_tokenizer(place: Place) -> None:
    folder = place.model()
    place.edit("model/tokenizer_config.json", auto_map={"AutoTokenizer": ["evil.Evil", "evil.Evil"]})
    load(folder)


@artefact
def tokenizer_class_of_the_folder(place: Place) -> None:
    folder = place.model()
    place.edit("model/tokenizer_config.json", tokenizer_class="Evil", auto_map={"AutoTokenizer": [None, "evil.Evil"]})
    load(folder)


@artefact
def auto_map_of_a_processor(place: Place) -> None:
    folder = place.model()
    place.write("model/processor_config.json", {"auto_map": {"AutoProcessor": "evil.Evil"}})
    load(folder)


@artefact
def trust_in_the_configuration(place: Place) -> None:
    load(place.model(trust_remote_code=True, model_type="evil", auto_map={"AutoConfig": "evil.Evil"}))


@artefact
def trust_in_the_tokenizer_configuration(place: Place) -> None:
    folder = place.model()
    auto_map = {"AutoTokenizer": ["evil.Evil", None]}
    place.edit("model/tokenizer_config.json", trust_remote_code=True, tokenizer_class="Evil", auto_map=auto_map)
    load(folder)


@artefact
def generation_code(place: Place) -> None:
    folder = place.model()
    place.write("model/custom_generate/generate.py", place.code + "def generate(*a, **k): pass\n")
    place.edit("model/generation_config.json", custom_generate=str(folder), trust_remote_code=True)
    load(folder)


@artefact
def pickled_weights(place: Place) -> None:
    folder = place.model()
    (folder / "model.safetensors").unlink()
    place.write("model/pytorch_model.bin", place.torch_pickled)
    load(folder)


@artefact
def bare_pickle_as_weights(place: Place) -> None:
    folder = place.model()
    (folder / "model.safetensors").unlink()
    place.write("model/pytorch_model.bin", place.pickled)
    load(folder)


@artefact
def pickled_weights_beside_safetensors(place: Place) -> None:
    folder = place.model(use_safetensors=False)
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "optimizer.pt", "model.bin"):
        place.write(f"model/{name}", place.torch_pickled)
    load(folder)


@artefact
def pickle_called_safetensors(place: Place) -> None:
    folder = place.model()
    place.write("model/model.safetensors", place.torch_pickled)
    load(folder)


@artefact
def pickle_named_by_the_index(place: Place) -> None:
    folder = place.model()
    (folder / "model.safetensors").unlink()
    place.write("outside.bin", place.torch_pickled)
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "../outside.bin"}}
    place.write("model/pytorch_model.bin.index.json", index)
    load(folder)


@artefact
def pickle_named_by_the_index_of_safetensors(place: Place) -> None:
    folder = place.model()
    (folder / "model.safetensors").unlink()
    place.write("model/x.safetensors", place.pickled)
    index = {"metadata": {"total_size": 1}, "weight_map": {"model.norm.weight": "x.safetensors"}}
    place.write("model/model.safetensors.index.json", index)
    load(folder)


@artefact
def pickled_weights_read_layer_by_layer(place: Place) -> None:
    folder = place.model()
    place.write("model/model.safetensors", place.pickled)
    open_safetensors(str(folder))


@artefact
def pickled_vocabulary(place: Place) -> None:
    folder = place.model()
    (folder / "tokenizer.json").unlink()
    place.write("model/tokenizer.model", place.pickled)
    load(folder)


@artefact
def adapter_of_another_base(place: Place) -> None:
    base = place.write("base/evil.py", place.code + "class Evil: pass\n").parent
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    place.write("base/config.json", {"model_type": "evil", "auto_map": auto_map})
    folder = place.model()
    mapping = {"base_model_class": "Evil", "parent_library": "evil"}
    adapter = {"peft_type": "LORA", "base_model_name_or_path": str(base), "auto_mapping": mapping}
    place.write("model/adapter_config.json", adapter)
    place.write("model/adapter_model.bin", place.torch_pickled)
    load(folder)


@artefact
def adapter_in_an_exported_folder(place: Place) -> None:
    folder = place.model()
    place.write("model/adapter_config.json", {"peft_type": "LORA", "base_model_name_or_path": str(folder)})
    ExportSource.open(folder)


@artefact
def code_as_a_number(place: Place) -> None:
    load(place.model(head_dim=f"exec({place.code!r})", rope_theta=f"exec({place.code!r})"))


@artefact
def attention_of_a_repository(place: Place) -> None:
    load(place.model(attn_implementation="evil/kernel", _attn_implementation="evil/kernel"))


@artefact
def quantiser_of_its_own(place: Place) -> None:
    load(place.model(quantization_config={"quant_method": "evil", "modules": "evil", "backend": "evil.Evil"}))


def with_chat_template(place: Place, template: str) -> None:
    folder = place.model()
    place.write("model/chat_template.jinja", template)
    load(folder)


@artefact
def chat_template_with_subclasses(place: Place) -> None:
    subclasses = "''.__class__.__mro__[-1].__subclasses__()"
    with_chat_template(place, f"{{% for c in {subclasses} %}}{{{{ c.__init__.__globals__ }}}}{{% endfor %}}")


@artefact
def chat_template_with_globals(place: Place) -> None:
    with_chat_template(place, f"{{{{ cycler.__init__.__globals__.__builtins__.exec({place.code!r}) }}}}")


@artefact
def chat_template_with_format(place: Place) -> None:
    with_chat_template(place, "{{ '{0.__init__.__globals__}'.format(raise_exception) }}")


@artefact
def chat_template_with_a_file(place: Place) -> None:
    place.write("model.jinja", "{{ 1 }}")
    with_chat_template(place, "{% import '../model.jinja' as x %}{% include '/etc/hostname' %}")


# -- run folders -----------------------------------------------------------------------------------------------------


@artefact
def changed_modules_of_a_run(place: Place) -> None:
    load(resolve_checkpoint(str(place.run())))


@artefact
def changed_modules_of_a_model_folder(place: Place) -> None:
    load(place.run() / "model")


@artefact
def changed_modules_without_checksums(place: Place) -> None:
    run = place.run()
    (run / "model" / CHECKSUM_FILE).unlink()
    check_can_open(str(run), EvalOptions(device="cpu"))
    load(run / "model")


@artefact
def changed_modules_in_bench(place: Place) -> None:
    run = place.run()
    place.write("run/config.yaml", f"model: {place.model()}\nlayout: per-layer\n")
    for spec in resolve_models([str(run)], BenchOptions(prompt=4, generate=4)):
        load(spec.source, trust_remote_code=spec.trust_remote_code)


@artefact
def changed_modules_in_export(place: Place) -> None:
    source = ExportSource.open(place.run())
    source.load_model()
    (place.folder / "export").mkdir()
    source.copy_other_files(place.folder / "export")
    for name in ("modeling_pruned.py", "configuration_pruned.py"):
        written = (place.folder / "export" / name).read_text()
        assert written == (place.templates / "run" / "model" / name).read_text()


@artefact
def other_modules_of_a_run(place: Place) -> None:
    auto_map = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    run = place.run(auto_map=auto_map)
    place.write("run/model/evil.py", place.code + "class Evil: pass\n")
    write_checksums(run / "model")
    load(run / "model")
    (place.folder / "export").mkdir()
    ExportSource.open(run).copy_other_files(place.folder / "export")
    assert not (place.folder / "export" / "evil.py").exists()
    assert "evil" not in (place.folder / "export" / "config.json").read_text()


@artefact
def modules_of_another_folder(place: Place) -> None:
    other = place.write("other/evil.py", place.code + "class Evil: pass\n").parent
    load(place.run(auto_map={"AutoConfig": f"{other}--evil.Evil", "AutoModelForCausalLM": f"{other}--evil.Evil"}))


@artefact
def per_layer_family_that_nobody_knows(place: Place) -> None:
    load(place.run(model_type="pruned_evil") / "model")


@artefact
def code_as_a_width(place: Place) -> None:
    widths = {
        "num_attention_heads": f"exec({place.code!r})",
        'skip"]; import evil': 1,
        "skip": [f"exec({place.code!r})"],
    }
    load(place.run(per_layer_config={"00": widths, "01": widths}) / "model")


@artefact
def generation_code_of_a_run(place: Place) -> None:
    run = place.run()
    place.write("run/model/custom_generate/generate.py", place.code + "def generate(*a, **k): pass\n")
    load(run / "model")


@artefact
def plan_that_is_a_pickle(place: Place) -> None:
    run = place.run()
    place.write("run/plan.json", place.pickled)
    load_compared_run(run)


@artefact
def plan_with_code_as_a_name(place: Place) -> None:
    place.write("plan.json", {"format": 1, "sites": {f"exec({place.code!r})": {"units": 2, "kept": [0]}}})
    Plan.load(place.folder / "plan.json")


@artefact
def recipe_of_a_run_with_a_tag(place: Place) -> None:
    run = place.run()
    place.write("run/config.yaml", f"model: {place.tag}\n")
    open_backend(str(run), EvalOptions(device="cpu"))


@artefact
def recipe_of_a_run_that_trusts_another_model(place: Place) -> None:
    dense = place.model(model_type="evil", auto_map={"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"})
    run = place.run()
    place.write("run/config.yaml", f"model: {dense}\ntrust_remote_code: true\n")
    check_can_open(dense_model_of_run(str(run)), EvalOptions(device="cpu"))


@artefact
def scores_of_a_run_that_are_a_pickle(place: Place) -> None:
    run = place.run()
    place.write("run/evaluation/pruned.json", place.pickled)
    load_compared_run(run)


@artefact
def checksums_of_files_elsewhere(place: Place) -> None:
    folder = place.model(evil=False)
    place.write(f"model/{CHECKSUM_FILE}", f"{'0' * 64}  ../../../../../../proc/self/environ\n")
    load(folder)


@artefact
def pickled_checkpoint(place: Place) -> None:
    Checkpoints(place.folder / "checkpoints").save(TrainingState(1, tensors={"adapters": {"a": torch.zeros(1)}}))
    file = place.write("checkpoints/step-0000001/adapters.safetensors", place.torch_pickled)
    place.edit("checkpoints/step-0000001/state.json", sha256={file.name: sha256(file)})
    Checkpoints(place.folder / "checkpoints").latest()


# -- suites ----------------------------------------------------------------------------------------------------------

LM_EVAL_TASK = (
    "task: evil\ndataset_path: json\noutput_type: generate_until\nprocess_docs: !function evilutils.process\n"
)


def with_lm_eval_task(place: Place, suite: str) -> None:
    place.write("evil.yaml", LM_EVAL_TASK)
    place.write("evilutils.py", place.code + "def process(docs): return docs\n")
    place.suite(suite)


@artefact
def lm_eval_task_in_include(place: Place) -> None:
    with_lm_eval_task(place, "tasks: {evil: {lm_eval: evil, include: ., limit: 1}}")


@artefact
def lm_eval_task_in_include_of_the_defaults(place: Place) -> None:
    with_lm_eval_task(place, "defaults: {include: .}\ntasks: [{lm_eval: evil}]")


@artefact
def lm_eval_task_of_a_class(place: Place) -> None:
    place.write("evil.yaml", "task: evil\nclass: !function evilutils.Evil\n")
    place.write("evilutils.py", place.code + "class Evil: pass\n")
    place.suite("tasks: {evil: {lm_eval: evil, include: .}}")


@artefact
def lm_eval_task_by_its_path(place: Place) -> None:
    with_lm_eval_task(place, f"tasks: {{evil: {{lm_eval: {place.folder / 'evil.yaml'}}}}}")


@artefact
def scorer_in_python(place: Place) -> None:
    place.write("evilscorer.py", place.code)
    place.suite("tasks: {t: {data: rows.jsonl, scorer: {python: {function: 'evilscorer:score'}}}}")


@artefact
def scorer_in_python_among_others(place: Place) -> None:
    function = "builtins:exec"
    place.suite(f"tasks: {{t: {{data: rows.jsonl, scorer: [rouge, {{python: {{function: '{function}'}}}}]}}}}")


def with_template(place: Place, key: str, text: str) -> None:
    values = {"data": "rows.jsonl", "scorer": "accuracy" if key == "choices" else "rouge", key: text}
    place.suite(json.dumps({"tasks": {"t": values}}))


@artefact
def prompt_with_subclasses(place: Place) -> None:
    with_template(place, "prompt", "{{ prompt.__class__.__mro__[-1].__subclasses__() }}")


@artefact
def prompt_with_globals(place: Place) -> None:
    with_template(place, "prompt", f"{{{{ cycler.__init__.__globals__.__builtins__.exec({place.code!r}) }}}}")


@artefact
def prompt_with_lipsum(place: Place) -> None:
    with_template(place, "prompt", f"{{{{ lipsum.__globals__['os'].system('touch {place.marker}') }}}}")


@artefact
def prompt_with_a_file(place: Place) -> None:
    with_template(place, "prompt", "{% include 'rows.jsonl' %}{% from 'rows.jsonl' import x %}")


@artefact
def prompt_with_attr_filter(place: Place) -> None:
    with_template(place, "completion", "{{ (prompt|attr('__class__')|attr('__base__')).__subclasses__() }}")


@artefact
def choices_with_globals(place: Place) -> None:
    with_template(place, "choices", f"namespace.__init__.__globals__['__builtins__']['exec']({place.code!r})")


@artefact
def suite_with_a_tag(place: Place) -> None:
    place.suite(f"tasks: {place.tag}")


@artefact
def suite_with_the_tag_of_a_name(place: Place) -> None:
    place.write("evilname.py", place.code)
    place.suite("tasks: {t: {data: rows.jsonl, scorer: !!python/name:evilname.score }}")


@artefact
def saved_scores_that_are_a_pickle(place: Place) -> None:
    open_backend(str(place.write("scores.json", place.pickled)), EvalOptions())


# -- recipes, variants -----------------------------------------------------------------------------------------------


@artefact
def recipe_with_a_tag(place: Place) -> None:
    load_recipe(place.write("recipe.yaml", f"model: demo\nseed: {place.tag}\n"))


@artefact
def recipe_with_the_tag_of_an_object(place: Place) -> None:
    load_recipe(place.write("recipe.yaml", "model: !!python/object/new:os._wrap_close {}\n"))


@artefact
def recipe_with_a_tracker_of_its_own(place: Place) -> None:
    place.write("eviltracker.py", place.code)
    load_recipe(place.write("recipe.yaml", "model: demo\nreport_to: [eviltracker]\ndata: {train: [demo]}\n"))


@artefact
def variants_with_a_tag(place: Place) -> None:
    read_variants(place.write("variants.yaml", f"small: {place.tag}\n"), RunConfig(model="demo"))


@artefact
def variant_called_as_a_path(place: Place) -> None:
    read_variants(place.write("variants.yaml", f"{place.marker}: {{lora: {{rank: 8}}}}\n"), RunConfig(model="demo"))


# -- data, caches, history -------------------------------------------------------------------------------------------


@artefact
def rows_in_a_pickle(place: Place) -> None:
    place.write("rows.pkl", place.pickled)
    place.data("rows.pkl")


@artefact
def pickle_called_parquet(place: Place) -> None:
    place.write("rows.parquet", place.pickled)
    place.data("rows.parquet")


@artefact
def parquet_with_a_pickled_type(place: Place) -> None:
    hidden = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": place.pickled}
    schema = pa.schema([pa.field("prompt", pa.string(), metadata=hidden), pa.field("completion", pa.string())])
    pq.write_table(pa.table({"prompt": ["a"], "completion": ["b"]}, schema=schema), place.folder / "rows.parquet")
    place.data("rows.parquet")


@artefact
def parquet_with_pickled_cells(place: Place) -> None:
    table = pa.table({"prompt": [place.pickled], "completion": [place.pickled]})
    pq.write_table(table, place.folder / "rows.parquet")
    place.data("rows.parquet")


@artefact
def data_set_with_a_script(place: Place) -> None:
    place.write("rows/rows.py", place.code)
    place.data("rows")
    place.data("rows/rows.py")


@artefact
def answers_that_are_pickles(place: Place) -> None:
    store = AnswerStore(place.folder / "answers.sqlite")
    store.put("files", [("a", "b")])
    with closing(sqlite3.connect(store.path)) as base, base:
        base.execute("CREATE TRIGGER t AFTER INSERT ON answers BEGIN SELECT load_extension('evil'); END")
        base.execute("CREATE TRIGGER f AFTER INSERT ON files BEGIN SELECT writefile('marker', 'x'); END")
        base.execute("CREATE VIEW v AS SELECT 1")
    CachedBackend(ScriptedBackend(), store).store.put("answers", [("k", "1")])
    store.get("answers", ["k"])


@artefact
def history_with_triggers_and_views(place: Place) -> None:
    with closing(sqlite3.connect(place.folder / "runs.sqlite")) as base, base:
        base.execute("CREATE TABLE hidden (path TEXT)")
        base.execute("CREATE VIEW runs AS SELECT path, load_extension('evil') AS status FROM hidden")
        base.execute("INSERT INTO hidden VALUES ('x')")
    list_runs(place.folder)


@artefact
def latency_table_that_is_a_pickle(place: Place) -> None:
    LatencyTable.load(place.write("table.json", place.pickled), {})


@artefact
def latency_table_with_code(place: Place) -> None:
    table = {"format": 1, "header": {"device": place.tag}, "rest": f"exec({place.code!r})", "layers": {"host": {}}}
    LatencyTable.load(place.write("table.json", table), {})


# -- GGUF ------------------------------------------------------------------------------------------------------------


def with_gguf(place: Place, architecture: str = "llama", **metadata: str) -> None:
    file = place.folder / "model.gguf"
    writer = GGUFWriter(file, architecture)
    sizes = {"context": 16, "embedding": 8, "feed_forward": 8}  # what a file leaves out becomes a model of gigabytes
    for key, size in sizes.items():
        writer.add_uint32(f"{architecture}.{key}_length", size)
    for key in ("block_count", "attention.head_count", "attention.head_count_kv"):
        writer.add_uint32(f"{architecture}.{key}", 1)
    writer.add_uint32(f"{architecture}.vocab_size", 16)
    for key, value in metadata.items():
        writer.add_string(key.replace("__", "."), value)
    for write in (
        writer.write_header_to_file,
        writer.write_kv_data_to_file,
        writer.write_tensors_to_file,
        writer.close,
    ):
        write()
    gguf_context_length(file)
    with suppress(PrunetuneError):
        place.model()  # beside the file, as transformers is given its folder
        shutil.copytree(place.folder / "model", place.folder, dirs_exist_ok=True)
    load(file)


@artefact
def gguf_of_an_architecture_that_is_a_path(place: Place) -> None:
    with_gguf(place, "../../evil", general__name="../../../marker")


@artefact
def gguf_with_a_chat_template(place: Place) -> None:
    template = f"{{{{ cycler.__init__.__globals__.__builtins__.exec({place.code!r}) }}}}"
    with_gguf(place, tokenizer__chat_template=template, tokenizer__ggml__model="../evil")


@artefact
def gguf_beside_a_folder_with_code(place: Place) -> None:
    auto_map = {"AutoConfig": "evil.Evil", "AutoTokenizer": ["evil.Evil", None]}
    for name in ("config.json", "tokenizer_config.json"):
        place.write(name, {"model_type": "evil", "tokenizer_class": "Evil", "auto_map": auto_map})
    place.write("evil.py", place.code + "class Evil: pass\n")
    with_gguf(place, tokenizer__ggml__model="gpt2")


@artefact
def gguf_that_is_a_pickle(place: Place) -> None:
    load(place.write("model.gguf", place.pickled))


@artefact
def gguf_that_is_an_archive(place: Place) -> None:
    with zipfile.ZipFile(place.folder / "model.gguf", "w") as archive:
        archive.writestr("../marker", "")
    gguf_context_length(place.folder / "model.gguf")


# --------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def templates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model folder and a per-layer run folder, which artefacts copy and change."""
    folder = tmp_path_factory.mktemp("templates")
    model_folder(folder / "model")
    (folder / "model" / "chat_template.jinja").write_text("{{ messages[0]['content'] }}")
    run_folder(folder / "run", subwords())
    return folder


@pytest.fixture
def place(tmp_path: Path, templates: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    def asked(*_: Any) -> str:
        raise AssertionError("a question at the terminal whether to run code")

    def index(include_path: str = "", **_: Any) -> SimpleNamespace:
        """As lm-eval's index: code beside the task files of an included folder may run. Its own takes long to read."""
        if include_path:
            exec((Path(include_path) / "evilutils.py").read_text())
        return SimpleNamespace(all_tasks=["arc_easy"])

    monkeypatch.setitem(sys.modules, "lm_eval.tasks", SimpleNamespace(TaskManager=index))
    monkeypatch.setattr("builtins.input", asked)
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(gguf_import, "cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    (tmp_path / "place").mkdir()
    monkeypatch.chdir(tmp_path / "place")
    monkeypatch.syspath_prepend(str(tmp_path / "place"))  # what an artefact names could be imported
    yield Place(tmp_path / "place", templates)
    for name in [name for name in sys.modules if name.startswith("evil")]:
        del sys.modules[name]


@pytest.mark.parametrize("name", ARTEFACTS)
def test_hostile_artefact_runs_nothing(name: str, place: Place) -> None:
    refusal = ""
    try:
        ARTEFACTS[name](place)
    except PrunetuneError as refused:
        refusal = str(refused)
    assert "\n" not in refusal
    assert not place.marker.exists()


def test_sixty_artefacts_are_tried() -> None:
    assert len(ARTEFACTS) >= 60


def test_payloads_are_live(place: Place) -> None:
    """Run or unpickled, each payload writes the marker, so its absence above says something."""
    exec(place.code)
    assert place.marker.exists()
    place.marker.unlink()
    pickle.loads(place.pickled)
    assert place.marker.exists()


def test_flags_run_what_they_allow(place: Place) -> None:
    folder = place.model(model_type="evil", auto_map={"AutoConfig": "evil.Evil"})
    with pytest.raises(ModelError):  # the payload's class is no configuration
        load(folder, trust_remote_code=True)
    assert place.marker.exists()
    place.marker.unlink()
    place.write("evilscorer.py", place.code + "def score(*_): return 1.0\n")
    write_lines(place.folder / "rows.jsonl", *open_rows(1))
    text = "tasks: {t: {data: rows.jsonl, scorer: {python: {function: 'evilscorer:score'}}}}"
    evaluate_suite(ScriptedBackend(), load_suite(place.write("suite.yaml", text)), allow={"code"})
    assert place.marker.exists()


def test_own_processes_import_nothing_from_the_working_folder() -> None:
    """A program text is given with -P, without which Python would look for modules in the working folder first."""
    texts = {path: path.read_text(encoding="utf-8") for path in SOURCE.rglob("*.py")}
    starts = [match for text in texts.values() for match in re.findall(r'\[sys\.executable, ("[^"]*")', text)]
    assert len(starts) >= 4
    assert set(starts) == {'"-P"'}


def test_trust_is_never_left_to_a_question() -> None:
    """Without the argument, transformers would ask at the terminal whether to run a folder's code."""
    opening = re.compile(r"\bAuto(?!Peft)\w+\.(?:from_pretrained|from_config)\(((?:[^()]|\([^()]*\))*)\)")
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        calls = [match for match in opening.findall(text) if not match.startswith(('"', "PATH"))]
        assert not [call for call in calls if "trust_remote_code" not in call], path


# -- checksums -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["flipped", "missing", "added"])
def test_changed_folder_is_refused_wherever_weights_are_read(change: str, place: Place) -> None:
    model = place.model(evil=False)
    write_checksums(model)
    load(model)
    if change == "flipped":
        content = bytearray((model / "model.safetensors").read_bytes())
        content[-1] ^= 1
        (model / "model.safetensors").write_bytes(content)
        named = "model.safetensors is not what was written"
    elif change == "missing":
        (model / "generation_config.json").unlink()
        named = "generation_config.json is missing"
    else:
        place.write("model/model-00002.safetensors", (model / "model.safetensors").read_bytes())
        named = "model-00002.safetensors was not written with the model"
    for read in (load, lambda folder: open_safetensors(str(folder)), ExportSource.open):
        with pytest.raises(ModelError, match=named) as refused:
            read(model)
        assert "\n" not in str(refused.value)


def test_folder_is_hashed_once_in_a_process(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(place.templates / "run" / "model", place.folder / "model")
    hashed: list[Path] = []
    monkeypatch.setattr("prunetune.model.checksums.sha256", lambda path: hashed.append(path) or sha256(path))
    assert verify_checksums(place.folder / "model")
    count = len(hashed)
    assert verify_checksums(place.folder / "model")
    assert len(hashed) == count > 3
    (place.folder / "model" / "LICENSE").write_text("a file that no loader reads\n")
    assert verify_checksums(place.folder / "model")
