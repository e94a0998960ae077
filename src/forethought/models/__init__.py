"""Networks: loading, LoRA, teacher, compute copy, sharding, fused kernels, log-probabilities."""
