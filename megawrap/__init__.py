"""megawrap fine-tunes GPT and encoder models with Megatron parallelism."""
