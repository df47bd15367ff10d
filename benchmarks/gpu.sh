#!/bin/bash
# The figures that need a GPU, each part under 9 minutes on one card: JSON and Markdown tables in benchmarks/gpu/.
#   bash benchmarks/gpu.sh [tests|attention|train|long|raven|checkpoint|all] [--tiny] [--wheels DIR] [--output DIR]
# What stands is not measured again: the same command goes on after an interruption. Status 75: a part is not at its end.
#   --tiny         sizes for a CPU: tries the program
#   --wheels DIR   installs packages that the active environment lacks from this folder alone, without a network
cd "$(dirname "$0")/.." || exit 1

parts=() arguments=() wheels=
while [ $# -gt 0 ]; do
    case "$1" in
        all) parts=(tests attention train long raven checkpoint) ;;
        tests | attention | train | long | raven | checkpoint) parts+=("$1") ;;
        --tiny) arguments+=(--tiny) ;;
        --output) arguments+=(--output "${2:?--output wants a folder}"); shift ;;
        --wheels) wheels=${2:?--wheels wants a folder}; shift ;;
        *) echo "gpu.sh: unknown argument '$1'; see the first lines of benchmarks/gpu.sh" >&2; exit 2 ;;
    esac
    shift
done
[ ${#parts[@]} -gt 0 ] || parts=(tests attention train long raven checkpoint)

python=${PYTHON:-python}
if [ -n "$wheels" ]; then
    # What pyproject.toml names and the environment lacks; torch is the machine's own.
    missing=$("$python" - <<'PY'
import importlib.metadata, re
text = open("pyproject.toml").read()
listed = re.search(r"^dependencies = \[(.*?)^\]", text, re.S | re.M)[1]
wanted = re.findall(r'^\s*"([\w-]+)', listed, re.M) + ["pytest", "pytest-timeout"]
there = {re.sub(r"[-_.]+", "-", one.metadata["Name"]).lower() for one in importlib.metadata.distributions()}
print(" ".join(name for name in wanted if name not in there and name != "torch"))
PY
    ) || exit 1
    # shellcheck disable=SC2086
    [ -z "$missing" ] || "$python" -m pip install --quiet --no-index --find-links "$wheels" $missing || exit 1
fi
export PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
export PYTORCH_ALLOC_CONF=${PYTORCH_ALLOC_CONF-expandable_segments:True}  # as scripts/launch.sh sets it for a run

worst=0
for part in "${parts[@]}"; do
    # The program ends by itself between two cases; a case that hangs is ended from here, and tried again by the next call.
    timeout 540 "$python" -m benchmarks.gpu "$part" "${arguments[@]}"; code=$?
    [ "$code" -ne 124 ] || code=75
    [ "$code" -eq 0 ] || { echo "gpu.sh: $part: status $code" >&2; worst=$code; }
done
exit "$worst"
