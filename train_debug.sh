#!/bin/bash
# A small Llama on the standard library's own prose: minutes on 2 CPU cores. Arguments override train_configs/debug.toml.
cd "$(dirname "$0")" || exit 1
source scripts/env.sh || exit 1
source scripts/launch.sh
launch train_configs/debug.toml "$@"
