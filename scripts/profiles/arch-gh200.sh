# shellcheck shell=bash
# Nodes of 4 GH200 (96 GB) on HPE Slingshot, as the 131072-token runs used them: `launch --profile arch-gh200`, or
# CLUSTER_PROFILE=scripts/profiles/arch-gh200.sh for the train_*.sh scripts. What the environment has set stands.
#LAUNCH card=gh200-96
#LAUNCH gpus_per_node=4
#LAUNCH sbatch=--partition=batch
#LAUNCH sbatch=--cpus-per-task=288
#LAUNCH minutes=1:360

# The interconnect's own settings, each with its reason.
# shellcheck disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/slingshot.sh"

export NCCL_NET=${NCCL_NET-ofi}  # fail if the Slingshot plugin is missing; NCCL would go on over TCP, many times slower
export FI_PROVIDER=${FI_PROVIDER-cxi}  # libfabric's provider for Slingshot; it may pick tcp otherwise
