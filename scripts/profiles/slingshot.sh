# NCCL and gloo on HPE Slingshot (GH200 and MI250X systems), as the Neural Pile runs used it. Source it before `launch`, or
# set CLUSTER_PROFILE=scripts/profiles/slingshot.sh. What the environment has set already stands. Settings that every
# cluster wants are in scripts/launch.sh.
export NCCL_NET_GDR_LEVEL=${NCCL_NET_GDR_LEVEL-3}  # GPU-direct RDMA; if a run hangs in NCCL, try without it
export NCCL_CROSS_NIC=${NCCL_CROSS_NIC-1}
export NCCL_SOCKET_IFNAME=${NCCL_SOCKET_IFNAME-hsn}  # a prefix: hsn0 to hsn3; else NCCL may start on the management network
export GLOO_SOCKET_IFNAME=${GLOO_SOCKET_IFNAME-hsn0}  # gloo wants whole names
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE-1}  # compute nodes have no way out; download the data set beforehand
