"""GPTQ checkpoints on disk: `layout` (codes ↔ packed words), `quantization` (the config's words),
`reader`, `writer`, `verify` and `convert`. The format itself is described in docs/formats.md.
"""
