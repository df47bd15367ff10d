# NCCL on HPE Slingshot (GH200 and MI250X systems), as the Neural Pile runs used it. Source it before `launch`, or set
# CLUSTER_PROFILE=scripts/profiles/slingshot.sh.
export NCCL_NET_GDR_LEVEL=3  # GPU-direct RDMA; if a run hangs in NCCL, try without it
export NCCL_CROSS_NIC=1
export PYTORCH_CUDA_ALLOC_CONF="expandable_segments:True"
export HF_HUB_OFFLINE=${HF_HUB_OFFLINE:-1}  # compute nodes have no way out; download the data set beforehand
