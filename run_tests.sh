#!/bin/bash
# Runs the tests, a file at a time in each of 3 processes, as tests also wait (2 CPU cores: minutes; RESULTS.md has the
# figure).
#   --quick        the inner loop, under a minute: the files that start no process (ranks, programs, workers of a
#                  loader), compile nothing and import no library that takes seconds; tests/conftest.py has the rule
#   --all          adds the slow ones (those of tests/vllm where VLLM_PYTHON names a Python with vLLM, docs/serving.md)
#   --newest       runs them in .venv-newest with the newest version of every dependency that pyproject.toml allows,
#                  which it installs or upgrades first: some gigabytes and minutes
#   --mutations    shows instead that tests fail when they should: it makes small wrong edits in a copy and reports which
#                  of them no test notices (tests/mutations.py, to which other arguments go; for the night)
# Other arguments go to pytest: `-n 0` (one process, as a debugger needs it), `-m gpu` (on a machine with GPUs; with
# `-n 0`, since the rows share them), `--shuffle SEED` (another order).
cd "$(dirname "$0")" || exit 1
if [ "${1:-}" = "--newest" ]; then
    shift
    [ -x .venv-newest/bin/python ] || "${PYTHON:-python3}" -m venv .venv-newest || exit 1
    .venv-newest/bin/python -m pip install --quiet --upgrade --upgrade-strategy eager -e ".[dev]" || exit 1
    .venv-newest/bin/python -m pip freeze --exclude-editable
    source .venv-newest/bin/activate
fi
export EXTRAS=dev
source scripts/env.sh
if [ "${1:-}" = "--mutations" ]; then
    shift
    exec python tests/mutations.py --jobs 2 "$@"
fi
selection=(-m "not slow")
[ "${1:-}" != "--all" ] || { selection=(); shift; }
# Hundreds of programs start from these modules, and each would compile them anew.
unset PYTHONDONTWRITEBYTECODE
# The order is that of tests/conftest.py: the longest files first.
exec python -m pytest -n 3 --dist loadfile --no-loadscope-reorder "${selection[@]}" "$@"
