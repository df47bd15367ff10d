#!/bin/bash
# Depth-recurrent 3.5B by the recipe of Huginn-0125; 1024 nodes x 4 GPUs.
#SBATCH --partition=batch
#SBATCH --nodes=1024
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --time=6:00:00
#SBATCH --job-name=train_raven_3.5b
#SBATCH --output=train_raven_3.5b_%j.out
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
cd "$(dirname "$0")" && [ -f scripts/env.sh ] || cd "${SLURM_SUBMIT_DIR:-.}" || exit 1  # sbatch runs a copy
source scripts/env.sh || exit 1
[ -z "${CLUSTER_PROFILE:-}" ] || source "$CLUSTER_PROFILE" || exit 1
source scripts/launch.sh
launch train_configs/raven_3.5b_4k.toml "$@"
