"""Megatron <-> Hugging Face: converting, comparing and proving checkpoints, one tensor at a time and without a model."""
