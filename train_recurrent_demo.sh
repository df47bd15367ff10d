#!/bin/bash
# A small depth-recurrent model that may stop thinking early: 13 minutes of CPU time, then a policy for leaving, a
# text and pictures. Arguments override the TOML.
cd "$(dirname "$0")" || exit 1
EXTRAS=plots source scripts/env.sh || exit 1
source scripts/launch.sh
source scripts/judge.sh
config=${CONFIG_FILE:-train_configs/recurrent_demo.toml}
launch "$config" "$@" && judge "$config" "$@"
