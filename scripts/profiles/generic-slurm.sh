# shellcheck shell=bash
# Any Slurm cluster of 4 or, with a copy of this file, another number of GPUs a node: `launch --profile generic-slurm
# --gpu h100-80 --sbatch=--partition=...`. It knows no card, no partition and no longest job. To make one for a cluster,
# copy it, and name the copy by its path: --profile ./ours.sh
#LAUNCH gpus_per_node=4

# Ranks of other nodes wait for the slowest disk at start; a set-up of its own on each node would be worse.
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE-1}  # compute nodes rarely have a way out; download the data set beforehand
