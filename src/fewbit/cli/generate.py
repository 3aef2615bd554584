"""``fewbit generate``: text from a quantized checkpoint, streamed."""

from __future__ import annotations

import time
from enum import Enum
from typing import Annotated, Any

import typer

from ..errors import ConfigError, ModelError
from .display import console, quiet_libraries


class Dtype(str, Enum):
    """See `fewbit.config.DTYPES`."""

    auto = "auto"
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


_EXAMPLES = """
Examples:

  fewbit generate ./SmolLM2-135M-4bit -p "The capital of France is"

  fewbit generate ./SmolLM2-135M-4bit --chat -p "Name three rivers." --max-new-tokens 60 --temperature 0.7
"""


def generate(
    checkpoint: Annotated[str, typer.Argument(help="A quantized checkpoint: a folder or a Hub id.")],
    prompt: Annotated[str, typer.Option("-p", "--prompt", help="The text to go on from.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
    ] = False,
    device: Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, xpu or mps.")] = "auto",
    dtype: Annotated[
        Dtype, typer.Option(help="Of the activations; auto: bfloat16 on CPU, else the checkpoint's.")
    ] = Dtype.auto,
    kernel: Annotated[str, typer.Option(help="auto, or one that `fewbit inspect` lists.")] = "auto",
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="Run the model's own code.")
    ] = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Also device, dtype and prompt tokens.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only the text and errors.")] = False,
) -> None:
    """Write text with a quantized checkpoint; tokens per second go to stderr."""
    import torch
    from transformers import TextStreamer

    from ..preparation import resolve_device
    from ..runtime.load import kernels, load

    quiet_libraries()
    if not prompt:
        raise ConfigError("the prompt is empty; give some text to go on from: -p TEXT")
    place = resolve_device(device)
    wanted = "bfloat16" if dtype is Dtype.auto and place.type == "cpu" else dtype.value
    model = load(checkpoint, place, wanted, kernel, trust_remote_code)
    if not model.can_generate():
        raise ModelError(f"{checkpoint} is a {type(model).__name__}, which cannot generate text")
    tokenizer = _tokenizer(checkpoint, trust_remote_code)
    inputs = _encode(tokenizer, prompt, chat, checkpoint).to(place)
    torch.manual_seed(seed)
    is_encoder_decoder = bool(model.config.is_encoder_decoder)
    sampling = {"do_sample": True, "temperature": temperature} if temperature else {"do_sample": False}
    start = time.perf_counter()
    tokens = model.generate(
        **inputs,
        max_new_tokens=max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=not is_encoder_decoder, skip_special_tokens=True),
        **sampling,
    )
    seconds = time.perf_counter() - start
    if quiet:
        return
    count = tokens.shape[1] - (1 if is_encoder_decoder else inputs["input_ids"].shape[1])
    console.print(f"{count} tokens in {seconds:.1f} s: {count / seconds:.1f} tokens/s, prompt included")
    for line in kernels(model):
        console.print(line, markup=False, highlight=False)
    if verbose:
        console.print(f"on {place} in {str(model.dtype).removeprefix('torch.')}")
        console.print(f"prompt: {inputs['input_ids'].shape[1]} tokens")


generate.__doc__ = f"{generate.__doc__}\n{_EXAMPLES}"


def _tokenizer(checkpoint: str, trust_remote_code: bool) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=trust_remote_code)
    except (ValueError, OSError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ModelError(
            f"{checkpoint} has no tokenizer that can be loaded: {reason} Copy the original model's "
            "tokenizer files into it"
        ) from error


def _encode(tokenizer: Any, prompt: str, chat: bool, checkpoint: str) -> Any:
    if not chat:
        inputs = tokenizer(prompt, return_tensors="pt")
        if not inputs["input_ids"].numel():
            raise ConfigError(f"the tokenizer of {checkpoint} makes no token of the prompt {prompt!r}")
        return inputs
    if not tokenizer.chat_template:
        raise ModelError(f"{checkpoint} has no chat template; leave out --chat")
    messages = [{"role": "user", "content": prompt}]
    return tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
