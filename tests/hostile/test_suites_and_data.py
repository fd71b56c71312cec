"""No suite, recipe, data file, cache or history runs code without its flag; and what holds for all hostile files."""

from __future__ import annotations

import hashlib
import json
import pickle
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from prunetune.compare.methods import read_variants
from prunetune.config.recipe import RunConfig, load_recipe
from prunetune.cost.latency_table import LatencyTable
from prunetune.data.records import Record
from prunetune.errors import ModelError
from prunetune.evaluation.suites import evaluate_suite, load_suite
from prunetune.evaluation.suites.cache import AnswerStore, CachedBackend
from prunetune.evaluation.suites.open_model import open_backend
from prunetune.evaluation.suites.options import EvalOptions
from prunetune.evaluation.suites.protocol import GenerationSettings
from prunetune.evaluation.suites.score_history import history_file, read_scores
from prunetune.runs.history import list_runs
from support.data import write_lines
from support.hostile import Artefacts, Place, check_runs_nothing, load
from support.suites import ScriptedBackend, open_rows

pytestmark = pytest.mark.filterwarnings("default")  # lm-eval's and transformers' own
artefact = Artefacts()
SOURCE = Path(__file__).parents[2] / "src"


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
    store, backend = AnswerStore(place.folder / "answers"), ScriptedBackend()
    store.folder.mkdir()
    name = hashlib.sha256(json.dumps(backend.fingerprint).encode()).hexdigest()
    for file in (f"{name}.jsonl", "files.jsonl"):
        (store.folder / file).write_bytes(place.pickled + b"\n" + json.dumps({"a": place.code}).encode())
    records = [Record(kind="completion", prompt="p", completion="c")]
    CachedBackend(backend, store).run_requests("generate", records, GenerationSettings(), print)
    store.get("files")


@artefact
def history_that_names_folders_of_others(place: Place) -> None:
    hostile = place.folder / "runs" / "x"
    hostile.mkdir(parents=True)
    (hostile / "config.yaml").write_text(f"model: {place.tag}", encoding="utf-8")
    (hostile / "manifest.json").write_bytes(place.pickled)
    list_runs(place.folder / "runs")


@artefact
def scores_of_suites_that_are_a_pickle(place: Place) -> None:
    suite = place.folder / "suite.yaml"
    suite.write_text("tasks: {}", encoding="utf-8")
    history_file().parent.mkdir(parents=True, exist_ok=True)
    history_file().write_bytes(place.pickled + b"\n" + json.dumps({"suite": str(suite), "tasks": place.code}).encode())
    read_scores(suite)


@artefact
def latency_table_that_is_a_pickle(place: Place) -> None:
    LatencyTable.load(place.write("table.json", place.pickled), {})


@artefact
def latency_table_with_code(place: Place) -> None:
    table = {"format": 1, "header": {"device": place.tag}, "rest": f"exec({place.code!r})", "layers": {"host": {}}}
    LatencyTable.load(place.write("table.json", table), {})


@pytest.mark.parametrize("name", artefact)
def test_hostile_artefact_runs_nothing(name: str, place: Place) -> None:
    check_runs_nothing(artefact[name], place)


def test_sixty_artefacts_are_tried() -> None:
    files = Path(__file__).parent.glob("test_*.py")
    assert sum(file.read_text(encoding="utf-8").count("\n@artefact\n") for file in files) >= 60


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
    assert len(starts) >= 3
    assert set(starts) == {'"-P"'}


def test_trust_is_never_left_to_a_question() -> None:
    """Without the argument, transformers would ask at the terminal whether to run a folder's code."""
    opening = re.compile(r"\bAuto(?!Peft)\w+\.(?:from_pretrained|from_config)\(((?:[^()]|\([^()]*\))*)\)")
    for path in SOURCE.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        calls = [match for match in opening.findall(text) if not match.startswith(('"', "PATH"))]
        assert not [call for call in calls if "trust_remote_code" not in call], path
