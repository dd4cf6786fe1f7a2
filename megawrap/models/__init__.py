"""Model architectures and the megatron-core modules built from them."""
