"""Names that optimum's scripts import."""

GPTQ_CONFIG = "quantize_config.json"

# Where transformers' models keep their list of blocks, the most specific first.
BLOCK_PATTERNS = (
    "transformer.h",
    "model.decoder.layers",
    "gpt_neox.layers",
    "model.layers",
    "model.language_model.layers",
    "h",
    "decoder.layers",
    "layers",
)

# What a model's configuration calls its longest sequence.
SEQLEN_KEYS_TRANSFORMERS = ("max_position_embeddings", "seq_length", "n_positions")
