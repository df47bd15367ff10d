#!/bin/bash
# The loss of the 8B Llama of train_rodent_8B_131k.sh on held-out recordings; 1 node, 4 GPUs. Arguments go to eval loss.
#SBATCH --partition=batch
#SBATCH --nodes=1
#SBATCH --cpus-per-task=288
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --time=2:00:00
#SBATCH --job-name=evaluate_rodent_8b_131k
#SBATCH --output=evaluate_rodent_8b_131k_%j.out
cd "$(dirname "$0")" && [ -f scripts/env.sh ] || cd "${SLURM_SUBMIT_DIR:-.}" || exit 1  # sbatch runs a copy
source scripts/env.sh || exit 1
[ -z "${CLUSTER_PROFILE:-}" ] || source "$CLUSTER_PROFILE" || exit 1
CHECKPOINT=${CHECKPOINT:-outputs/rodent_8B_131k}  # a run's folder: its latest step
torchrun --standalone --nproc_per_node "${NPROC:-4}" -m torchtitan_rd eval loss train_configs/rodent_8b_131k.toml \
    "$CHECKPOINT" --split test --output eval_rodent_8b_131k.json "$@"
