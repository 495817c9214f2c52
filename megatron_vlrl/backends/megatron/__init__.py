"""The model on megatron-core: CPU with gloo, CUDA with NCCL."""
