# shellcheck shell=bash
# Nodes of 4 MI250X, which are 8 GPUs of 64 GB to ROCm, on Slingshot (OLCF Frontier), as Huginn's launcher set them up. The
# account is the user's: --sbatch=--account=ABC123. What the environment has set stands.
#LAUNCH card=mi250x
#LAUNCH gpus_per_node=8
#LAUNCH sbatch=--partition=batch
#LAUNCH sbatch=--cpus-per-task=56
#LAUNCH minutes=1:120 92:360 184:720

# The interconnect's own settings, each with its reason. RCCL reads NCCL's variables.
# shellcheck disable=SC1091
source "$(dirname "${BASH_SOURCE[0]}")/slingshot.sh"

export MPICH_GPU_SUPPORT_ENABLED=${MPICH_GPU_SUPPORT_ENABLED-0}  # no MPI on GPUs here; MPICH would want its own library
export HSA_FORCE_FINE_GRAIN_PCIE=${HSA_FORCE_FINE_GRAIN_PCIE-1}  # lets RCCL write to peers' memory and to the network's
export FI_CXI_ATS=${FI_CXI_ATS-0}  # no address translation by the network card: it is not for GPU memory
export OMP_NUM_THREADS=${OMP_NUM_THREADS-7}  # cores a GPU that the system leaves to programs (56 of 64, 8 GPUs)
export TORCHINDUCTOR_FX_GRAPH_CACHE=${TORCHINDUCTOR_FX_GRAPH_CACHE-1}  # a requeued job finds what it compiled before
