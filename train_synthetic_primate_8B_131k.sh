#!/bin/bash
# The same from the weights of the synthetic run (checkpoint/step-0); 21 nodes x 4 GH200.
#SBATCH --partition=batch
#SBATCH --nodes=21
#SBATCH --cpus-per-task=288
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --time=6:00:00
#SBATCH --job-name=train_synthetic_primate_8b_131k
#SBATCH --output=train_synthetic_primate_8b_131k_%j.out
#SBATCH --requeue
#SBATCH --open-mode=append
#SBATCH --signal=B:TERM@300
cd "$(dirname "$0")" && [ -f scripts/env.sh ] || cd "${SLURM_SUBMIT_DIR:-.}" || exit 1  # sbatch runs a copy
source scripts/env.sh || exit 1
[ -z "${CLUSTER_PROFILE:-}" ] || source "$CLUSTER_PROFILE" || exit 1
source scripts/launch.sh
launch train_configs/synthetic_primate_8b_131k.toml "$@"
