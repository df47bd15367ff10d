#!/bin/bash
# The tests of this folder, with those that are too long for every change, and then the soak.
#   bash tests/chaos/nightly.sh [--minutes N]      minutes of the soak (30), and its other options
cd "$(dirname "$0")/../.." || exit 1
export PYTHONPATH=$PWD OMP_NUM_THREADS=1
python -m pytest -q tests/chaos || exit 1
exec python -m tests.chaos.soak "$@"
