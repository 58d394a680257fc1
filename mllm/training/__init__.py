"""Training a VLA by behaviour cloning: configuration, data, losses, optimisers, exact resume. May import `mllm`."""
