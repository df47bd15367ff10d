#!/bin/bash
# A small dense Llama is trained, made recurrent and trained on, beside what it is to be compared with: minutes on 2 CPU
# cores. Arguments override the TOML of the recurrent runs and that of the dense ones.
cd "$(dirname "$0")" || exit 1
source scripts/env.sh || exit 1
source scripts/launch.sh
source scripts/retrofit.sh
retrofit train_configs/retrofit_debug.toml "$@"
