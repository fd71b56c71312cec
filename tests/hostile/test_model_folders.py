"""No model folder and no GGUF file runs code without its flag: hostile ones, each opened as commands do."""

from __future__ import annotations

import shutil
import zipfile
from contextlib import suppress

import pytest
from gguf import GGUFWriter

from prunetune.bench.llamacpp import gguf_context_length
from prunetune.errors import PrunetuneError
from prunetune.export.source import ExportSource
from prunetune.model.loading import load_meta_model, open_safetensors
from support.hostile import Artefacts, Place, check_runs_nothing, load

pytestmark = pytest.mark.filterwarnings("default")  # lm-eval's and transformers' own
artefact = Artefacts()


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


@pytest.mark.parametrize("name", artefact)
def test_hostile_artefact_runs_nothing(name: str, place: Place) -> None:
    check_runs_nothing(artefact[name], place)
