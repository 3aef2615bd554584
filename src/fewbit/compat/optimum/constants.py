"""Constants that optimum's scripts import."""

from ...checkpoint.writer import QUANTIZE_CONFIG as GPTQ_CONFIG
from ...hf.blocks import BLOCK_PATTERNS
from ...hf.blocks import SEQLEN_KEYS as SEQLEN_KEYS_TRANSFORMERS

__all__ = ["BLOCK_PATTERNS", "GPTQ_CONFIG", "SEQLEN_KEYS_TRANSFORMERS"]
