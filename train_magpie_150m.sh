#!/bin/bash
# A small depth-recurrent model; 1 node x 8 GPUs.
#SBATCH --partition=batch
#SBATCH --nodes=1
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --time=6:00:00
#SBATCH --job-name=train_magpie_150m
#SBATCH --output=train_magpie_150m_%j.out
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
cd "$(dirname "$0")" && [ -f scripts/env.sh ] || cd "${SLURM_SUBMIT_DIR:-.}" || exit 1  # sbatch runs a copy
source scripts/env.sh || exit 1
[ -z "${CLUSTER_PROFILE:-}" ] || source "$CLUSTER_PROFILE" || exit 1
source scripts/launch.sh
launch train_configs/magpie_150m_4k.toml "$@"
