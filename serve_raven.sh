#!/bin/bash
# Serves an exported raven by OpenAI's HTTP interface (docs/serving.md): bash serve_raven.sh DIR [--depth 16 ...]
# VLLM_PYTHON names the Python that has vLLM, in an environment of its own.
_root=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export PYTHONPATH=$_root${PYTHONPATH:+:$PYTHONPATH}
exec "${VLLM_PYTHON:-python}" -m torchtitan_rd_vllm "$@"
