#!/bin/bash
# A small depth-recurrent model on the standard library's own prose: minutes on 2 CPU cores. Arguments override the TOML.
cd "$(dirname "$0")" || exit 1
source scripts/env.sh || exit 1
source scripts/launch.sh
launch train_configs/recurrent_debug.toml "$@"
