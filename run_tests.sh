#!/bin/bash
# Runs the tests (2 CPU cores: under 12 minutes). `--all` adds the slow ones; other arguments go to pytest.
cd "$(dirname "$0")" || exit 1
export EXTRAS=dev
source scripts/env.sh
selection=(-m "not slow")
[ "${1:-}" != "--all" ] || { selection=(); shift; }
exec python -m pytest "${selection[@]}" "$@"
