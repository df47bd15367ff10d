#!/bin/bash
# TinyLlama-1.1B made recurrent (arXiv 2511.07384), from checkpoint/step-0 as the TOML says. Arguments override the TOML.
cd "$(dirname "$0")" || exit 1
source scripts/env.sh || exit 1
source scripts/launch.sh
launch train_configs/retrofit_tinyllama_1.1b.toml "$@"
