"""Options that several commands share.

`fewbit quantize` and `fewbit plan` have the same options: the signature of `quantize_arguments`. A command with the
decorator `with_options` takes all of them and receives the resulting `QuantizeArguments` as its first argument.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..config import (
    AUTO,
    EVALUATION_TOKENS,
    ActOrder,
    Dtype,
    Format,
    Method,
    Quality,
    QuantConfig,
    parse_overrides,
)
from ..engines import ENGINES

_ENGINES = [entry.name for entry in ENGINES]

# Groups of options in --help.
ACCURACY, CALIBRATION, OUTPUT, ADVANCED = "Accuracy", "Calibration", "Output", "Advanced"


def _known_engines(names: list[str] | None) -> list[str] | None:
    for name in names or ():
        if name not in _ENGINES:
            raise typer.BadParameter(f"{name!r} is none of {', '.join(_ENGINES)}")
    return names


Engines = Annotated[
    list[str] | None,
    typer.Option(
        "--for",
        metavar="ENGINE",
        callback=_known_engines,
        help=f"Can it load this? {', '.join(_ENGINES)}. Repeatable.",
    ),
]
ChosenFor = Annotated[
    list[str] | None,
    typer.Option(
        "--for",
        metavar="ENGINE",
        callback=_known_engines,
        help=f"Choose group size and format for it, where you do not, or refuse: {', '.join(_ENGINES)}. Repeatable.",
    ),
]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, xpu or mps.")]
ActivationDtype = Annotated[
    Dtype, typer.Option(help="Of the activations; auto: bfloat16 on CPU, else the checkpoint's.")
]
KernelName = Annotated[str, typer.Option(help="auto, or one that `fewbit inspect` lists.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Fuse = Annotated[
    bool, typer.Option(help="On the CPU: merged layers, norms, MLPs and attention in one call each.")
]
LmHeadRuntime = Annotated[
    Literal["auto", "8", "16"],
    typer.Option(help="Bits of the output layer while running; auto: 8 where that costs next to nothing."),
]
TrustRemoteCode = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model's own code.")]


def head_bits(choice: str) -> int | str:
    """`lm_head_runtime` of `fewbit.load` from the command line."""
    return int(choice) if choice.isdigit() else choice


@dataclass(frozen=True)
class QuantizeArguments:
    """The arguments of `fewbit.quantize` that the options describe.

    Attributes:
        model: folder, ``.gguf`` file or Hub id.
        config: settings of the run.
        keywords: keyword arguments: dataset, output, device and so on.
    """

    model: str
    config: QuantConfig
    keywords: dict[str, Any]

    @property
    def output(self) -> Path | None:
        output: Path | None = self.keywords["output"]
        return output


def quantize_arguments(
    model: Annotated[str, typer.Argument(help="A transformers folder, a .gguf file or a Hub id.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Folder to write; new, empty or interrupted.")
    ] = None,
    bits: Annotated[int, typer.Option(help="2, 3, 4 or 8.")] = 4,
    group_size: Annotated[
        int | None,
        typer.Option(
            help="Inputs that share a scale; -1: the whole row.",
            show_default="128, 64 or 32: the first that fits",
        ),
    ] = None,
    sym: Annotated[bool, typer.Option("--sym/--asym", help="Symmetric or asymmetric grids.")] = True,
    act_order: Annotated[
        ActOrder, typer.Option(help="Order of the columns; full writes a g_idx.", rich_help_panel=ACCURACY)
    ] = "group",
    damp: Annotated[
        float, typer.Option(help="Damping, as a fraction of mean(diag H).", rich_help_panel=ACCURACY)
    ] = 0.01,
    correction: Annotated[
        str,
        typer.Option(
            help="Move targets towards the full-precision outputs: 0 to 1, or auto.",
            metavar="A",
            rich_help_panel=ACCURACY,
        ),
    ] = "auto",
    quality: Annotated[
        Quality,
        typer.Option(
            help="fast: --fast. best: --tune --distill. What each costs: docs/choosing.md.",
            rich_help_panel=ACCURACY,
        ),
    ] = "default",
    fast: Annotated[
        bool,
        typer.Option(
            "--fast", help="Half the time: no full-precision path, no correction.", rich_help_panel=ACCURACY
        ),
    ] = False,
    target_bits: Annotated[
        float | None,
        typer.Option(
            help="Average stored bits per weight; bits and groups are then chosen per layer.",
            rich_help_panel=ACCURACY,
        ),
    ] = None,
    tune: Annotated[
        bool,
        typer.Option(
            "--tune",
            help="Also train rounding and scales block by block. Takes minutes.",
            rich_help_panel=ACCURACY,
        ),
    ] = False,
    tune_steps: Annotated[
        int, typer.Option(help="Steps per block with --tune.", rich_help_panel=ACCURACY)
    ] = 100,
    loss_aware: Annotated[
        bool,
        typer.Option(
            "--loss-aware",
            help="Weight outputs by the gradients of the model's loss. Less error, for one more backward pass.",
            rich_help_panel=ACCURACY,
        ),
    ] = False,
    rotate: Annotated[
        bool,
        typer.Option(
            "--rotate",
            help="First rotate the residual stream, folded into the weights. Less error, same speed.",
            rich_help_panel=ACCURACY,
        ),
    ] = False,
    distill: Annotated[
        bool,
        typer.Option(
            "--distill",
            help="Finally train the scales on the whole model's loss. Takes hours.",
            rich_help_panel=ACCURACY,
        ),
    ] = False,
    distill_tokens: Annotated[
        int, typer.Option(help="Tokens to train on with --distill.", rich_help_panel=ACCURACY)
    ] = 500_000,
    method: Annotated[
        Method,
        typer.Option(help="gptq, or rtn (round-to-nearest, no text needed).", rich_help_panel=ACCURACY),
    ] = "gptq",
    dataset: Annotated[
        str | None,
        typer.Option(
            help="wikitext2, c4, c4-new, a .txt, .jsonl or .parquet file, or - for stdin.",
        ),
    ] = None,
    num_samples: Annotated[
        int,
        typer.Option(
            "--num-samples", "--nsamples", help="Calibration sequences.", rich_help_panel=CALIBRATION
        ),
    ] = 128,
    seq_len: Annotated[
        int, typer.Option("--seq-len", "--seqlen", help="Tokens in each.", rich_help_panel=CALIBRATION)
    ] = 2048,
    batch_size: Annotated[
        int, typer.Option(help="Sequences in a forward pass.", rich_help_panel=CALIBRATION)
    ] = 1,
    device: Annotated[
        str, typer.Option(help="auto, cpu, cuda, cuda:1, xpu or mps.", rich_help_panel=ADVANCED)
    ] = "auto",
    dtype: Annotated[
        Dtype,
        typer.Option(
            help="Dtype of the model: for calibration and for weights that are not quantized; auto: its own, or "
            "float32 for calibration where a CPU is faster so.",
            rich_help_panel=ADVANCED,
        ),
    ] = "auto",
    ignore: Annotated[
        list[str] | None,
        typer.Option(help="REGEX of layers not to quantize. Repeatable.", rich_help_panel=ADVANCED),
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            help="'REGEX=bits:8,group_size:32' or 'REGEX=skip'. Repeatable.", rich_help_panel=ADVANCED
        ),
    ] = None,
    lm_head: Annotated[
        bool, typer.Option("--lm-head", help="Also quantize the output embedding.", rich_help_panel=ADVANCED)
    ] = False,
    mtp: Annotated[
        bool,
        typer.Option(
            "--mtp",
            help="Also round layers for multi-token prediction; otherwise they are copied.",
            rich_help_panel=ADVANCED,
        ),
    ] = False,
    format: Annotated[
        Format, typer.Option(help="gptq (v1) is read by everything.", rich_help_panel=OUTPUT)
    ] = "gptq",
    max_shard_size: Annotated[str, typer.Option(help="Largest weight file.", rich_help_panel=OUTPUT)] = "5GB",
    resume: Annotated[
        bool,
        typer.Option("--resume/--no-resume", help="Continue an interrupted run.", rich_help_panel=OUTPUT),
    ] = True,
    eval_dataset: Annotated[
        str | None,
        typer.Option(
            "--eval", help="Evaluate the result on this text, against the original.", rich_help_panel=OUTPUT
        ),
    ] = None,
    eval_tokens: Annotated[
        int, typer.Option(min=2, help="Tokens of that text at most.", rich_help_panel=OUTPUT)
    ] = EVALUATION_TOKENS,
    seed: Annotated[
        int, typer.Option(help="Chooses the calibration windows.", rich_help_panel=CALIBRATION)
    ] = 0,
    strict: Annotated[
        bool, typer.Option("--strict", help="Fail where a fallback would be used.", rich_help_panel=ADVANCED)
    ] = False,
    trust_remote_code: TrustRemoteCode = False,
    allow_pickle: Annotated[
        bool, typer.Option("--allow-pickle", help="Read .bin weight files.", rich_help_panel=ADVANCED)
    ] = False,
    offload_dir: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the activations of paused batches, instead of memory. Same result.",
            rich_help_panel=ADVANCED,
        ),
    ] = None,
) -> QuantizeArguments:
    """The arguments that the options describe; the signature defines the command line."""
    config = QuantConfig(
        bits=bits,
        group_size=AUTO if group_size is None else group_size,
        sym=sym,
        act_order=act_order,
        damp=damp,
        correction=_correction(correction),
        quality=quality,
        fast=fast,
        target_bits=target_bits,
        tune=tune,
        tune_steps=tune_steps,
        loss_aware=loss_aware,
        rotate=rotate,
        distill=distill,
        distill_tokens=distill_tokens,
        method=method,
        ignore=tuple(ignore or ()),
        override=parse_overrides(override or ()),
        lm_head=lm_head,
        mtp=mtp,
        format=format,
        num_samples=num_samples,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        dtype=dtype,
        strict=strict,
    )
    keywords = {
        "dataset": dataset,
        "output": output,
        "device": device,
        "resume": resume,
        "max_shard_size": max_shard_size,
        "trust_remote_code": trust_remote_code,
        "allow_pickle": allow_pickle,
        "offload_dir": offload_dir,
        "evaluate_on": eval_dataset,
        "evaluate_tokens": eval_tokens,
    }
    return QuantizeArguments(model, config, keywords)


def with_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command` with the options of `quantize_arguments` instead of its first parameter."""
    shared = inspect.signature(quantize_arguments, eval_str=True).parameters
    _, *own = inspect.signature(command, eval_str=True).parameters.values()

    def run(**given: Any) -> None:
        arguments = quantize_arguments(**{name: given.pop(name) for name in shared})
        command(arguments, **given)

    parameters = [*shared.values(), *own]
    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    run.__name__, run.__doc__ = command.__name__, command.__doc__
    return run


def _correction(text: str) -> Any:
    """A number if the text is one; QuantConfig checks the rest."""
    return float(text) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", text.lower()) else text
