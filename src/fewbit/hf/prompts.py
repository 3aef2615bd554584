"""`fewbit.generate`: texts from prompts, with a quantized checkpoint or a model that is already loaded.

prompts ─ tokenizer of the checkpoint ─ one batch, padded on the left ─ `hf.generate` ─ texts
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, overload

from transformers import AutoTokenizer, PreTrainedModel

from ..config import Dtype
from ..context import resolve_device
from ..errors import ConfigError, ModelError
from . import generate as generation
from .load import load

# How tokens become text.
DECODING = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}


@overload
def generate(
    model: str | Path | PreTrainedModel,
    prompt: str,
    *,
    max_new_tokens: int = ...,
    temperature: float = ...,
    chat: bool = ...,
    tokenizer: Any = ...,
    device: str = ...,
    trust_remote_code: bool = ...,
) -> str: ...


@overload
def generate(
    model: str | Path | PreTrainedModel,
    prompt: list[str] | tuple[str, ...],
    *,
    max_new_tokens: int = ...,
    temperature: float = ...,
    chat: bool = ...,
    tokenizer: Any = ...,
    device: str = ...,
    trust_remote_code: bool = ...,
) -> list[str]: ...


def generate(
    model: str | Path | PreTrainedModel,
    prompt: str | list[str] | tuple[str, ...],
    *,
    max_new_tokens: int = 128,
    temperature: float = 0.0,
    chat: bool = False,
    tokenizer: Any = None,
    device: str = "auto",
    trust_remote_code: bool = False,
) -> str | list[str]:
    """Continue a prompt, or several in one batch.

    Args:
        model: a quantized checkpoint's folder or Hub id, which is loaded for this call, in bfloat16 on CPUs; or a
            model from `fewbit.load`, for several calls.
        prompt: a text, or several.
        max_new_tokens: maximum number of new tokens per prompt.
        temperature: 0 takes the likeliest token. Above 0 tokens are drawn with torch's random numbers
            (`torch.manual_seed`).
        chat: put each prompt into the model's chat template.
        tokenizer: by default the one of the checkpoint.
        device: "auto", "cpu", "cuda", "cuda:1", "xpu" or "mps"; ignored for a model that is loaded.
        trust_remote_code: run Python code that comes with the checkpoint.

    Returns:
        The new text without the prompt; a list of them if `prompt` is one.

    Raises:
        ConfigError: a prompt is empty.
        ModelError: the model cannot generate text, or has no tokenizer or no chat template.
        CheckpointError: the checkpoint cannot be loaded.
    """
    prompts = [prompt] if isinstance(prompt, str) else list(prompt)
    refuse_empty(prompts)
    if isinstance(model, PreTrainedModel):
        loaded, name = model, str(model.name_or_path)
    else:
        where, name = resolve_device(device), str(model)
        dtype: Dtype = "bfloat16" if where.type == "cpu" else "auto"
        loaded = load(model, where, dtype, trust_remote_code=trust_remote_code)
    refuse_other_models(loaded, name)
    tokenizer = tokenizer or load_tokenizer(name, trust_remote_code)
    inputs = encode(tokenizer, prompts, chat, name).to(loaded.device)
    options = {**sampling(temperature), "pad_token_id": tokenizer.pad_token_id}
    result = generation.generate(loaded, inputs, max_new_tokens, **options)
    texts = [str(tokenizer.decode(tokens, **DECODING)) for tokens in result.tokens]
    return texts[0] if isinstance(prompt, str) else texts


def refuse_empty(prompts: Sequence[str]) -> None:
    """Raise ConfigError if there is nothing to continue."""
    if not prompts or not all(prompts):
        raise ConfigError("the prompt is empty; give some text to go on from (-p TEXT)")


def refuse_other_models(model: PreTrainedModel, name: str) -> None:
    """Raise ModelError if `model` cannot generate text."""
    if not model.can_generate():
        raise ModelError(f"{name} is a {type(model).__name__}, which cannot generate text")


def sampling(temperature: float) -> dict[str, Any]:
    """Arguments of transformers' ``generate``."""
    return {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}


def load_tokenizer(checkpoint: str, trust_remote_code: bool, auto_class: Any = AutoTokenizer) -> Any:
    """The tokenizer of a checkpoint, or what another auto class of transformers loads.

    Raises:
        ModelError: it has none that transformers can load.
    """
    try:
        return auto_class.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{checkpoint} has no tokenizer that can be loaded: {reason} Copy the original model's "
            "tokenizer files into it"
        ) from error


def encode(tokenizer: Any, prompts: Sequence[str], chat: bool, checkpoint: str) -> Any:
    """All prompts in one batch, the shorter ones padded on the left."""
    if chat:
        return encode_chats(
            tokenizer, [[{"role": "user", "content": prompt}] for prompt in prompts], checkpoint
        )
    inputs = tokenizer(list(prompts), **_padding(tokenizer, len(prompts)))
    for prompt, mask in zip(prompts, inputs["attention_mask"], strict=True):
        if not mask.any():
            raise ConfigError(f"the tokenizer of {checkpoint} makes no token of the prompt {prompt!r}")
    return inputs


def encode_chats(tokenizer: Any, chats: Sequence[Sequence[Mapping[str, str]]], checkpoint: str) -> Any:
    """Conversations in the model's chat template, in one batch; each message has a ``role`` and a ``content``.

    Raises:
        ModelError: the tokenizer has no chat template.
    """
    if not tokenizer.chat_template:
        raise ModelError(f"{checkpoint} has no chat template; leave out chat (--chat)")
    options = _padding(tokenizer, len(chats))
    return tokenizer.apply_chat_template(
        list(map(list, chats)), add_generation_prompt=True, return_dict=True, **options
    )


def _padding(tokenizer: Any, count: int) -> dict[str, Any]:
    """Arguments that pad several texts on the left; the tokenizer gets a padding token if it has none."""
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token  # masked: any token will do
    tokenizer.padding_side = "left"
    return {"padding": count > 1, "return_tensors": "pt"}
