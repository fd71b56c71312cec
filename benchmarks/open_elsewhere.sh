#!/usr/bin/env bash
# A2: does a run's checkpoint open where prunetune is not installed, generate, and hold the plan's parameters?
#   benchmarks/open_elsewhere.sh RUN [RUN ...]
set -euo pipefail
here="$(cd "$(dirname "$0")/.." && pwd)"
venv="$(mktemp -d)/venv"
python3 -m venv "$venv"
"$venv/bin/pip" install -q -c "$here/constraints.txt" torch transformers
for run in "$@"; do
  "$venv/bin/python" - "$(realpath "$run")" <<'PY'
import importlib.util, json, sys

from transformers import AutoModelForCausalLM, AutoTokenizer

assert importlib.util.find_spec("prunetune") is None
run = sys.argv[1]
said = json.load(open(f"{run}/manifest.json"))["pruned"]
code = {"trust_remote_code": True} if said["needs_code"] else {}
model = AutoModelForCausalLM.from_pretrained(f"{run}/model", **code)
tokenizer = AutoTokenizer.from_pretrained(f"{run}/model", **code)
tokens = tokenizer("Diagnosis: Acute bronchitis\nICD-10-CM chapter:", return_tensors="pt")
answer = tokenizer.decode(model.generate(**tokens, max_new_tokens=4, do_sample=False)[0])
count = sum(parameter.numel() for parameter in model.parameters())
print(said["layout"], type(model).__name__, f"{count:,} parameters, plan says {said['params']:,};", repr(answer))
assert count == said["params"]
PY
done
