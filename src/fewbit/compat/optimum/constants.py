"""Constants that optimum's scripts import."""

from ...checkpoint.writer import QUANTIZE_CONFIG as GPTQ_CONFIG
from ...gptq_arguments import BLOCK_PATTERNS
from ...gptq_arguments import SEQLEN_KEYS as SEQLEN_KEYS_TRANSFORMERS

__all__ = ["BLOCK_PATTERNS", "GPTQ_CONFIG", "SEQLEN_KEYS_TRANSFORMERS"]
