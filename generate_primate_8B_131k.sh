#!/bin/bash
# Continues recordings with the 8B Llama of train_primate_8B_131k.sh; 1 node, 1 GPU. Arguments go to generate-spikes.
#SBATCH --partition=batch
#SBATCH --nodes=1
#SBATCH --cpus-per-task=72
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=1
#SBATCH --time=0:30:00
#SBATCH --job-name=generate_primate_8b_131k
#SBATCH --output=generate_primate_8b_131k_%j.out
cd "$(dirname "$0")" && [ -f scripts/env.sh ] || cd "${SLURM_SUBMIT_DIR:-.}" || exit 1  # sbatch runs a copy
source scripts/env.sh || exit 1
[ -z "${CLUSTER_PROFILE:-}" ] || source "$CLUSTER_PROFILE" || exit 1
CHECKPOINT=${CHECKPOINT:-outputs/primate_8B_131k}  # a run's folder: its latest step
python -m torchtitan_rd generate-spikes "$CHECKPOINT" --dataset primate --split test --dtype bfloat16 --raster "$@"
