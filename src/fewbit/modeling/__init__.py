"""What a model looks like: its layers, experts, parts and files. Knows nothing of quantization."""
