"""The figures that need a GPU, each part in minutes on one card: `bash benchmarks/gpu.sh`."""
