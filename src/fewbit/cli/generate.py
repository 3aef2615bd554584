"""``fewbit generate``: text from a quantized checkpoint, streamed."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from .display import console, examples, quiet_libraries
from .options import ActivationDtype, Device, Fuse, KernelName, LmHeadRuntime, TrustRemoteCode, head_bits

if TYPE_CHECKING:
    from ..hf.generate import Generation


@examples(
    'fewbit generate ./SmolLM2-135M-4bit -p "The capital of France is"',
    'fewbit generate ./SmolLM2-135M-4bit --chat -p "Name three rivers." --max-new-tokens 60 --temperature 0.7',
    'fewbit generate ./SmolLM2-135M-4bit -p "One" -p "Two, three" --lm-head-runtime 8',
)
def generate(
    checkpoint: Annotated[str, typer.Argument(help="A quantized checkpoint: a folder or a Hub id.")],
    prompt: Annotated[
        list[str],
        typer.Option("-p", "--prompt", help="The text to go on from. Repeatable: all in one batch."),
    ],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0: always the likeliest token.")] = 0.0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")
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
    quiet: Annotated[bool, typer.Option("-q", "--quiet", help="Only the text and errors.")] = False,
) -> None:
    """Write text with a quantized checkpoint, token by token; its speed goes to stderr.

    The texts of several prompts follow each other in their order, with an empty line between.
    """
    import torch
    from transformers import TextStreamer

    from ..context import resolve_device
    from ..hf import prompts
    from ..hf.generate import generate as write
    from ..hf.load import kernels, load

    quiet_libraries()
    prompts.refuse_empty(prompt)
    where = resolve_device(device)
    wanted = "bfloat16" if dtype == "auto" and where.type == "cpu" else dtype
    faster: dict[str, Any] = {"fuse": fuse, "lm_head_runtime": head_bits(lm_head_runtime)}
    model = load(checkpoint, where, wanted, kernel, trust_remote_code, **faster)
    prompts.refuse_other_models(model, checkpoint)
    tokenizer = prompts.load_tokenizer(checkpoint, trust_remote_code)
    inputs = prompts.encode(tokenizer, prompt, chat, checkpoint).to(where)
    torch.manual_seed(seed)
    decoding = prompts.DECODING
    # transformers streams one text; several are written when all are complete.
    streamer = TextStreamer(tokenizer, skip_prompt=True, **decoding) if len(prompt) == 1 else None
    options = {**prompts.sampling(temperature), "pad_token_id": tokenizer.pad_token_id}
    result = write(model, inputs, max_new_tokens, streamer=streamer, **options)
    if streamer is None:
        sys.stdout.write("\n\n".join(tokenizer.decode(row, **decoding) for row in result.tokens) + "\n")
    if quiet:
        return
    for line in (*_speed(result), *kernels(model)):
        console.print(line, markup=False, highlight=False)
    if verbose:
        console.print(f"on {where} in {str(model.dtype).removeprefix('torch.')}")


def _speed(result: Generation) -> list[str]:
    count, texts = sum(map(len, result.tokens)), len(result.tokens)
    speed = (
        f"prompt: {result.prompt_tokens} tokens in {result.prefill_seconds:.2f} s; "
        f"then {count} tokens{f' in {texts} texts' if texts > 1 else ''}"
        + (f": {result.decode_rate:.1f} tokens/s" if result.steps > 1 else "")
    )
    return [speed, f"key-value cache: {result.cache}"]
