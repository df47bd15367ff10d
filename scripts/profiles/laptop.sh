# shellcheck shell=bash
# This machine, without Slurm: `launch --profile laptop` runs the script in place of submitting it. launch.sh takes a rank
# for each GPU, or 2 on the CPU.
#LAUNCH scheduler=none

export OMP_NUM_THREADS=${OMP_NUM_THREADS-1}  # ranks share few cores, and waiting threads take them from each other
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME-lo}  # ranks meet here; a laptop's network may change its name or go
