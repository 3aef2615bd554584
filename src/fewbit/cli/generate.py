"""``fewbit generate``: text from a quantized checkpoint, streamed."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .display import console, examples, quiet_libraries
from .options import ActivationDtype, Device, Fuse, KernelName, LmHeadRuntime, TrustRemoteCode, head_bits

if TYPE_CHECKING:
    from ..hf.generate import Generation


@examples(
    'fewbit generate ./SmolLM2-135M-4bit -p "The capital of France is"',
    "fewbit generate ./SmolLM2-135M-4bit --chat --temperature 0.7",
    'fewbit generate ./SmolLM2-135M-4bit --chat -p "Name three rivers." --max-new-tokens 60',
    'fewbit generate ./SmolLM2-135M-4bit -p "One" -p "Two, three" --lm-head-runtime 8',
)
def generate(
    checkpoint: Annotated[str, typer.Argument(help="A quantized checkpoint: a folder or a Hub id.")],
    prompt: Annotated[
        list[str] | None,
        typer.Option("-p", "--prompt", help="The text to go on from. Repeatable: all in one batch."),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Use the model's chat template. Without a prompt: a conversation.")
    ] = False,
    device: Device = "auto",
    dtype: ActivationDtype = "auto",
    kernel: KernelName = "auto",
    fuse: Fuse = True,
    lm_head_runtime: LmHeadRuntime = "auto",
    seed: Annotated[int, typer.Option(help="For temperatures above 0.")] = 0,
    trust_remote_code: TrustRemoteCode = False,
    verbose: Annotated[
        bool, typer.Option("-v", "--verbose", help="Also device, dtype and prompt tokens.")
    ] = False,
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only the new text and errors.")] = False,
) -> None:
    """Write text with a quantized checkpoint, token by token; its speed goes to stderr.

    The texts of several prompts follow each other in their order, with an empty line between. Each begins with its
    prompt, unless --chat or --quiet is set. `--chat` without a prompt reads your messages until Ctrl-D.
    """
    import torch

    from ..context import resolve_device
    from ..hf import prompts
    from ..hf.load import kernels, load

    quiet_libraries()
    if prompt is not None or not chat:
        prompts.refuse_empty(prompt or ())
    where = resolve_device(device)
    wanted = "bfloat16" if dtype == "auto" and where.type == "cpu" else dtype
    faster: dict[str, Any] = {"fuse": fuse, "lm_head_runtime": head_bits(lm_head_runtime)}
    model = load(checkpoint, where, wanted, kernel, trust_remote_code, **faster)
    prompts.refuse_other_models(model, checkpoint)
    tokenizer = prompts.load_tokenizer(checkpoint, trust_remote_code)
    torch.manual_seed(seed)
    answer = partial(_answer, model, tokenizer, max_new_tokens, prompts.sampling(temperature))
    if not prompt:
        _converse(tokenizer, checkpoint, answer)
        return
    inputs, echo = prompts.encode(tokenizer, prompt, chat, checkpoint), not (chat or quiet)
    if len(prompt) == 1:
        print(prompt[0] if echo else "", end="", flush=True)
        result = answer(inputs)
    else:  # transformers streams one text; several are written when all are complete
        result = answer(inputs, streamed=False)
        texts = [tokenizer.decode(row, **prompts.DECODING) for row in result.tokens]
        print("\n\n".join(map(str.__add__, prompt, texts) if echo else texts))
    if quiet:
        return
    for line in (*_speed(result), *kernels(model)):
        console.print(line, markup=False, highlight=False)
    if verbose:
        console.print(f"on {where} in {str(model.dtype).removeprefix('torch.')}")


def _answer(
    model: Any,
    tokenizer: Any,
    max_new_tokens: int,
    sampling: dict[str, Any],
    inputs: Any,
    streamed: bool = True,
) -> Generation:
    """Generate from encoded prompts; `streamed` writes a single text while it comes."""
    from transformers import TextStreamer

    from ..hf import prompts
    from ..hf.generate import generate as write

    streamer = TextStreamer(tokenizer, skip_prompt=True, **prompts.DECODING) if streamed else None
    options = {**sampling, "pad_token_id": tokenizer.pad_token_id}
    return write(model, inputs.to(model.device), max_new_tokens, streamer=streamer, **options)


def _converse(tokenizer: Any, checkpoint: str, answer: Callable[[Any], Generation]) -> None:
    """Answer messages from the standard input, each with all that was said before."""
    from ..hf import prompts

    said: list[dict[str, str]] = []
    while True:
        try:
            text = console.input("[bold]> [/]")
        except EOFError:
            return
        if not text.strip():
            continue
        said.append({"role": "user", "content": text})
        tokens = answer(prompts.encode_chats(tokenizer, [said], checkpoint)).tokens[0]
        said.append({"role": "assistant", "content": tokenizer.decode(tokens, **prompts.DECODING)})


def _speed(result: Generation) -> list[str]:
    count, texts = sum(map(len, result.tokens)), len(result.tokens)
    speed = (
        f"prompt: {result.prompt_tokens} tokens in {result.prefill_seconds:.2f} s; "
        f"then {count} tokens{f' in {texts} texts' if texts > 1 else ''}"
        + (f": {result.decode_rate:.1f} tokens/s" if result.steps > 1 else "")
    )
    return [speed, f"key-value cache: {result.cache}"]
