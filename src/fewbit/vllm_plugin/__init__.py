"""vLLM serves GPTQ checkpoints on CPUs with fewbit's kernels; vLLM finds `register` through its entry point.

    config.json ─ FewbitConfig: which layers, how ─ a method per layer: collect tensors, pack, multiply

vLLM loads the plugin in each of its processes. Nothing else in fewbit imports vLLM or this folder.
"""

from __future__ import annotations


def register() -> None:
    """Tell vLLM that there is a quantization method called "fewbit". Calling it again changes nothing."""
    from vllm.model_executor.layers.quantization import register_quantization_config

    from .vllm_config import NAME, FewbitConfig

    register_quantization_config(NAME)(FewbitConfig)
