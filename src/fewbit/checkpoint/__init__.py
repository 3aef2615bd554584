"""GPTQ checkpoints on disk. docs/formats.md describes the format."""
