"""What `push` sends: the model's own files, a card that the hub reads, a snippet that runs, and nothing private."""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
import torch
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError, RepositoryNotFoundError

from prunetune import RunResult, push_run
from prunetune.errors import ConfigError, ModelError, PrunetuneError, RunFolderError
from prunetune.evaluation.results import Evaluation
from prunetune.model import provenance
from prunetune.model.checksums import verify_checksums, write_checksums
from prunetune.pipeline import push
from support.finished_run import FOLDER, copied_run, finished_run

NAME = "me/support"


@pytest.fixture(scope="module")
def pushed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a dry run with the adapter."""
    folder = tmp_path_factory.mktemp("dry")
    push_run(finished_run(), NAME, dry_run=folder, adapter=True, languages=["en"])
    return folder / NAME


def snippets(card: Path) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", card.read_text(), re.MULTILINE | re.DOTALL)


def test_dry_run_writes_the_files_of_the_model_and_no_others(tmp_path: Path) -> None:
    run = copied_run(tmp_path)
    (run / "model" / "notes.txt").write_text("mine")
    (run / "model" / ".env").write_text("SECRET=1")
    result = push_run(run, NAME, dry_run=tmp_path / "dry")
    sent = {path.relative_to(tmp_path / "dry" / NAME).as_posix() for path in (tmp_path / "dry" / NAME).rglob("*.*")}
    listed = {line.split("  ")[1] for line in (run / "model" / "SHA256SUMS").read_text().splitlines()}
    assert sent - {"README.md", "kept.png"} == listed
    assert set(result.sizes) == {*sent, "SHA256SUMS"}
    assert result.sizes["model.safetensors"] == (run / "model" / "model.safetensors").stat().st_size
    assert "me/support (private)" in str(result)


def test_pushed_folder_passes_its_own_checksums_and_opens(pushed: Path) -> None:
    assert verify_checksums(pushed)
    weights = (finished_run() / "model" / "model.safetensors").read_bytes()
    assert (pushed / "model.safetensors").read_bytes() == weights


def test_card_is_read_by_huggingface_hub_with_the_scores_of_the_run(pushed: Path) -> None:
    card = ModelCard.load(pushed / "README.md")
    assert isinstance(card.data, ModelCardData)
    assert (card.data.language, card.data.library_name) == (["en"], "transformers")
    scores = Evaluation.from_json((finished_run() / "evaluation" / "pruned.json").read_text()).tasks
    shown = {(result.dataset_name, result.metric_type): result.metric_value for result in card.data.eval_results or ()}
    assert shown == {
        ("choice", "accuracy"): scores["choice"].scores["accuracy"].value,
        ("choice", "nll"): scores["choice"].scores["nll"].value,
        ("open", "rouge"): scores["open"].scores["rouge_l"].value,
        ("open", "nll"): scores["open"].scores["nll"].value,
    }
    assert card.data.base_model is None  # which is a folder
    assert ModelCard(str(card)).data.to_dict() == card.data.to_dict()


def test_snippet_runs_as_printed(
    pushed: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(pushed.parents[1])  # where OWNER/NAME is the folder
    code = snippets(pushed / "README.md")[0]
    assert "PATH" not in code
    scope: dict[str, Any] = {}
    exec(code, scope)
    assert capsys.readouterr().out
    expected = finished_run().model(device="cpu", dtype="float32")
    assert torch.equal(scope["model"](**scope["inputs"]).logits, expected(**scope["inputs"]).logits)


def test_snippet_without_a_chat_template_continues_a_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = copied_run(tmp_path)
    lines = (run / "model" / "SHA256SUMS").read_text().splitlines(keepends=True)
    (run / "model" / "SHA256SUMS").write_text("".join(line for line in lines if "chat_template" not in line))
    (run / "model" / "chat_template.jinja").unlink()
    push_run(run, NAME, dry_run=tmp_path)
    monkeypatch.chdir(tmp_path)
    code = snippets(tmp_path / NAME / "README.md")[0]
    assert "apply_chat_template" not in code
    exec(code, {})


@pytest.mark.filterwarnings("ignore::FutureWarning")  # PEFT reads a property that transformers deprecates
def test_adapter_is_that_of_the_run(pushed: Path) -> None:
    from peft import PeftModel

    run = finished_run()
    tuned = PeftModel.from_pretrained(run.model("dense", device="cpu", dtype="float32"), pushed, subfolder="adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    expected = run.model("tuned", device="cpu", dtype="float32")(ids).logits
    assert torch.allclose(tuned(ids).logits, expected, atol=1e-5)


def test_nothing_that_goes_names_a_place_a_row_or_the_user(pushed: Path) -> None:
    rows = [json.loads(line) for line in Path(FOLDER.name, "secret-rows.jsonl").read_text().splitlines()]
    hidden = [FOLDER.name, "secret-rows", str(Path.home()) + "/", *(row["prompt"] for row in rows)]
    for path in pushed.rglob("*.*"):
        content = path.read_bytes()
        assert [text for text in hidden if text.encode() in content] == [], path.name
    assert json.loads((pushed / "adapter" / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    (entry,) = json.loads((pushed / "history.json").read_text())
    assert entry["model"] == "a local model"


def test_hub_names_of_base_and_data_are_in_the_card(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = copied_run(tmp_path)
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["model"], values["data"]["train"] = "owner/base", ["owner/rows:small@train*2", "rows.jsonl"]
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    cards = {
        "owner/base": "---\nlicense: mit\nlanguage: [en, 'not a code!', de]\n---\n",
        "owner/rows": "---\nlicense: cc-by-4.0\n---\n",
    }

    def cached(name: str, file: str, kind: str = "model") -> Path | None:
        if name not in cards:
            return None
        path = tmp_path / f"{name.replace('/', '-')}-{file}"
        path.write_text(cards[name] if file == "README.md" else "{}")
        return path

    monkeypatch.setattr(provenance, "cached_hub_file", cached)
    head = {"license": "mit", "base_model": provenance.hub_model("owner/base"), "tags": ["prunetune"]}
    card = run / "model" / "README.md"
    card.write_text(f"---\n{yaml.safe_dump(head)}---\n" + card.read_text().split("---\n", 2)[2])
    push_run(run, NAME, dry_run=tmp_path, adapter=True)
    data = ModelCard.load(tmp_path / NAME / "README.md").data
    assert isinstance(data, ModelCardData)
    assert (data.base_model, data.license, data.language) == ("owner/base", "mit", ["en", "de"])
    assert data.datasets == ["owner/rows"]
    text = (tmp_path / NAME / "README.md").read_text()
    assert "- `owner/rows`, licence cc-by-4.0\n- rows that are not published" in text
    assert 'from_pretrained("owner/base")' in snippets(tmp_path / NAME / "README.md")[1]


def test_run_of_a_hub_model_goes_from_a_computer_without_that_model(tmp_path: Path) -> None:
    run = copied_run(tmp_path)
    values = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(values | {"model": "owner/base@main"}))
    manifest = run.manifest
    facts = replace(manifest, model=replace(manifest.model, identity={"commit": "1" * 40}))
    (run / "manifest.json").write_text(facts.to_json())
    card = run / "model" / "README.md"
    card.write_text(card.read_text().replace("---\n", "---\nbase_model: owner/base\n", 1))
    push_run(run, NAME, dry_run=tmp_path, adapter=True)
    assert 'from_pretrained("owner/base")' in snippets(tmp_path / NAME / "README.md")[1]


def test_card_that_the_user_edited_is_kept(tmp_path: Path) -> None:
    run = copied_run(tmp_path)
    card = run / "model" / "README.md"
    text = card.read_text().replace("library_name", "language: fr\nlibrary_name")
    card.write_text(re.sub("^# .*$", "# Ours", text, flags=re.MULTILINE) + "\n## Thanks\n\nTo all.\n")
    push_run(run, NAME, dry_run=tmp_path)
    sent = ModelCard.load(tmp_path / NAME / "README.md")
    assert sent.data.to_dict()["language"] == "fr"
    assert "# Ours" in sent.text
    assert "## Thanks" in sent.text
    assert "# support" not in sent.text


def rewritten(file: Path, text: str) -> None:
    """Another content, with its checksum."""
    file.write_text(text)
    write_checksums(file.parent)


def linked(file: Path) -> None:
    """Put a link to the same content in place of a file."""
    file.rename(file.with_name("moved"))
    file.symlink_to(file.with_name("moved"))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda run: (run / "model" / "README.md").write_text(f"see {run.resolve()}"), "which is on this computer"),
        (lambda run: (run / "model" / "README.md").write_text("---\n- a\n---\n"), "cannot be read as a model card"),
        (lambda run: (run / "model" / "README.md").write_text("---\na: [\n---\n"), "cannot be read as a model card"),
        (lambda run: (run / "model" / "README.md").unlink(), "cannot be read as a model card"),
        (lambda run: (run / "plan.json").unlink(), r"plan\.json is missing"),
        (lambda run: rewritten(run / "model" / "history.json", "[1]"), "put it back, or remove it"),
        (lambda run: rewritten(run / "tuned" / "adapter" / "adapter_config.json", "[1]"), "push without --adapter"),
        (lambda run: linked(run / "model" / "README.md"), "it is a link"),
        (lambda run: linked(run / "tuned" / "adapter" / "adapter_config.json"), "adapter_config.json is a link"),
        (lambda run: (run / "model" / "SHA256SUMS").unlink(), "has no SHA256SUMS"),
        (lambda run: (run / "model" / "model.safetensors").write_bytes(b"x"), "is not what was written"),
        (lambda run: (run / "tuned").rename(run / "gone"), "push without --adapter"),
        (lambda run: (run / "model").rename(run / "gone"), "no model yet"),
        (lambda run: (run / "config.yaml").unlink(), "is no run folder"),
    ],
)
def test_run_that_cannot_go_is_refused_before_anything_is_written(
    spoil: Callable[[RunResult], object], message: str, tmp_path: Path
) -> None:
    run = copied_run(tmp_path)
    spoil(run)
    with pytest.raises((ModelError, RunFolderError), match=message):
        push_run(run, NAME, dry_run=tmp_path / "dry", adapter=True)
    assert not (tmp_path / "dry").exists()


@pytest.mark.parametrize(
    "name", ["support", "a/b/c", "../up", "me/..", "me/--x", "me/sup port", "https://hub/me/x", ""]
)
def test_name_that_the_hub_would_refuse_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="write OWNER/NAME"):
        push_run(finished_run(), name, dry_run=tmp_path)


def test_folder_that_exists_and_a_wrong_language_are_refused(tmp_path: Path) -> None:
    (tmp_path / NAME).mkdir(parents=True)
    with pytest.raises(ConfigError, match="exists already"):
        push_run(finished_run(), NAME, dry_run=tmp_path)
    with pytest.raises(ConfigError, match="'English' is no code"):
        push_run(finished_run(), NAME, dry_run=tmp_path, languages=["English"])


# -- the hub, which is not there ---------------------------------------------------------------------------------------


def accepts(method: str, *arguments: Any, **named: Any) -> None:
    """Raise where the real method does not take these."""
    inspect.signature(getattr(huggingface_hub.hf_api.HfApi, method)).bind(None, *arguments, **named)


class FakeHub:
    """Stands in for `HfApi`; remembers what it was told."""

    def __init__(self, visibility: str = "", error: Exception | None = None) -> None:
        self.visibility, self.error, self.calls = visibility, error, list[Any]()

    def __call__(self) -> FakeHub:
        return self

    def whoami(self) -> None:
        accepts("whoami")
        if self.error:
            raise self.error

    def model_info(self, name: str) -> Any:
        accepts("model_info", name)
        if not self.visibility:
            raise RepositoryNotFoundError("404", response=response(404))
        return SimpleNamespace(private=self.visibility == "private")

    def create_repo(self, name: str, *, private: bool) -> None:
        accepts("create_repo", name, private=private)
        self.calls.append(("create", name, private))

    def create_commit(self, name: str, operations: list[Any], *, commit_message: str) -> Any:
        accepts("create_commit", name, operations, commit_message=commit_message)
        self.calls.append(("commit", name, {it.path_in_repo: it.path_or_fileobj for it in operations}))
        return SimpleNamespace(commit_url=f"https://hub/{name}/commit/1")


def response(status: int) -> Any:
    import httpx2

    return httpx2.Response(status, request=httpx2.Request("GET", "https://hub"))


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Callable[..., FakeHub]:
    def make(*arguments: Any) -> FakeHub:
        fake = FakeHub(*arguments)
        monkeypatch.setattr(huggingface_hub, "HfApi", fake)
        monkeypatch.setattr(ModelCard, "validate", lambda card: fake.calls.append(("validate", str(card))))
        return fake

    return make


def test_push_makes_a_private_repository_and_one_commit_of_what_a_dry_run_shows(
    hub: Callable[..., FakeHub], pushed: Path
) -> None:
    fake = hub()
    result = push_run(finished_run(), NAME, adapter=True, languages=["en"])
    (validated, card), created, (committed, _, files) = fake.calls
    assert (validated, created, committed) == ("validate", ("create", NAME, True), "commit")
    sent = {name: it if isinstance(it, bytes) else Path(it).read_bytes() for name, it in files.items()}
    assert sent == {
        path.relative_to(pushed).as_posix(): path.read_bytes() for path in pushed.rglob("*") if path.is_file()
    }
    assert (result.where, result.is_public) == ("https://hub/me/support/commit/1", False)
    assert ModelCard(card).data.to_dict() == ModelCard.load(pushed / "README.md").data.to_dict()


def test_public_is_asked_for(hub: Callable[..., FakeHub]) -> None:
    fake = hub()
    assert push_run(finished_run(), NAME, public=True).is_public
    assert fake.calls[1] == ("create", NAME, False)
    fake = hub("public")
    with pytest.raises(ConfigError, match="is public on the hub: push with --public"):
        push_run(finished_run(), NAME)
    assert [call[0] for call in fake.calls] == ["validate"]
    assert push_run(finished_run(), NAME, public=True).is_public
    hub("private")
    assert not push_run(finished_run(), NAME, public=True).is_public  # its owner has made it private


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (LocalTokenNotFoundError("no token"), "without a token: log in with `hf auth login`"),
        (HfHubHTTPError("bad hf_secret", response=response(401)), "log in with `hf auth login`"),
        (HfHubHTTPError("no hf_secret", response=response(403)), "use a token that may write to me/support"),
        (ConnectionError("offline hf_secret"), "check the network, and push again"),
        (ValueError("the hub would not read the card: hf_secret"), "not pushed"),
    ],
)
def test_refusal_of_the_hub_is_one_line_without_the_token(
    error: Exception, message: str, hub: Callable[..., FakeHub], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    fake = hub("", error)
    with pytest.raises(PrunetuneError, match=message) as refused:
        push_run(finished_run(), NAME)
    assert "hf_secret" not in str(refused.value)
    assert fake.calls == []


def test_command_prints_what_would_go(say: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    code, out, err = say("push", finished_run(), NAME, "--dry-run", tmp_path, "--language", "en", "--language", "de")
    assert (code, err) == (0, "")
    assert re.search(r"kB  README\.md", out)
    assert out.endswith(f"me/support (private): {tmp_path / NAME}\n")
    assert ModelCard.load(tmp_path / NAME / "README.md").data.to_dict()["language"] == ["en", "de"]


def test_picture_is_the_same_for_the_same_plan(pushed: Path) -> None:
    assert (pushed / "kept.png").read_bytes().startswith(b"\x89PNG")
    assert push.kept_units_png(finished_run().plan) == (pushed / "kept.png").read_bytes()
