"""Small diffusion models and what quantising costs them. May import `mllm`."""
