"""What quantization costs in quality: fewbit beside round-to-nearest, plain GPTQ and GPTQModel.

    python benchmarks/prepare.py
    python benchmarks/accuracy.py --bits 4 3 2 --rows rtn plain fast default --seeds 0 1 2
    python benchmarks/accuracy.py --table docs/accuracy.md

A cell is one model, row, bit width, group size, symmetry and seed. Its model is quantized in a process of
its own (seconds and peak memory are that process's) and scored in another, in float32, by the protocol of
fewbit.evaluation. All rows of a seed get exactly the same calibration tokens. Each cell's result is appended
to a file of JSON lines at once, and cells found there are not run again: a killed run goes on. The original's
logits are kept in benchmarks/data/logits (SmolLM2: 1.6 GB per text of 16 × 512 tokens).

The GPTQModel rows need --gptqmodel-python, the interpreter of an environment that has it, and are skipped
without.
"""

from __future__ import annotations

import argparse
import itertools
import json
import multiprocessing
import resource
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import accuracy_tables
import prepare

RESULTS = prepare.DATA / "accuracy.jsonl"


@dataclass(frozen=True)
class Row:
    """One way to quantize: the tool that does it and its options."""

    tool: str
    options: dict[str, Any] = field(default_factory=dict)


ROWS = {
    "rtn-minmax": Row("plain", {"calibrated": False}),
    "rtn": Row("fewbit", {"method": "rtn"}),
    "plain": Row("plain", {"act_order": False}),
    "plain-act-order": Row("plain", {"act_order": True}),
    "gptqmodel": Row("gptqmodel"),
    "gptqmodel-mse": Row("gptqmodel", {"mse": 2.4}),
    "fast": Row("fewbit", {"fast": True}),
    "fast-order-none": Row("fewbit", {"fast": True, "act_order": "none"}),
    "fast-order-full": Row("fewbit", {"fast": True, "act_order": "full"}),
    "default": Row("fewbit"),
    "order-none": Row("fewbit", {"act_order": "none"}),
    "order-full": Row("fewbit", {"act_order": "full"}),
    "tune": Row("fewbit", {"tune": True}),
}
WITHOUT_CALIBRATION = ("rtn-minmax", "rtn")


@dataclass(frozen=True)
class Protocol:
    """What all compared cells have in common. `texts`: names, with a comma between."""

    model: str
    calibration: str
    texts: str
    samples: int
    seq_len: int
    windows: int
    dtype: str


@dataclass(frozen=True)
class Cell:
    """One measurement."""

    row: str
    bits: int
    group_size: int
    sym: bool
    seed: int


@dataclass(frozen=True)
class Job:
    """Everything a child process needs beside the cell. `work` is a folder for the cell in progress."""

    protocol: Protocol
    model: Path
    calibration: Path
    texts: tuple[Path, ...]
    gptqmodel_python: Path | None
    say: bool
    work: Path = Path()
    ggml_folder: Path | None = None

    @property
    def output(self) -> Path:
        """Where the quantized model lies."""
        return self.work / "model"

    def logits(self, text: Path) -> Path:
        """Where the original's logits on a text are kept."""
        protocol = self.protocol
        name = f"{self.model.name}.{text.name}.{protocol.windows}x{protocol.seq_len}.pt"
        return prepare.DATA / "logits" / name


# Quantizing: each of these runs in a process of its own, and leaves a model in job.output.


def quantize_with_fewbit(job: Job, cell: Cell) -> dict[str, Any]:
    """The public API, as a user calls it."""
    import fewbit
    import fewbit.quantization

    protocol = job.protocol
    config = fewbit.QuantConfig(
        bits=cell.bits,
        group_size=cell.group_size,
        sym=cell.sym,
        num_samples=protocol.samples,
        seq_len=protocol.seq_len,
        seed=cell.seed,
        dtype=protocol.dtype,
        **ROWS[cell.row].options,
    )
    report = fewbit.quantize(job.model, config, dataset=str(job.calibration), output=job.output).to_dict()
    kept = ("seconds", "peak_memory_bytes", "bits_per_weight", "fallbacks")
    return {key: report[key] for key in kept if key in report}


def quantize_plainly(job: Job, cell: Cell) -> dict[str, Any]:
    """benchmarks/plain_gptq.py; the result is a dense model with the quantized values, in float32."""
    import plain_gptq
    import torch
    from transformers import AutoModelForCausalLM

    options = ROWS[cell.row].options
    started = time.perf_counter()
    dtype = getattr(torch, job.protocol.dtype)
    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=dtype).eval()
    recipe = plain_gptq.Recipe(cell.bits, cell.group_size, cell.sym, options.get("act_order", False))
    batches = calibration_batches(job, cell.seed) if options.get("calibrated", True) else []
    found = plain_gptq.quantize(model, batches, recipe)
    seconds, peak = time.perf_counter() - started, peak_memory()
    model.float()
    for name, W_hat in found.items():
        plain_gptq.set_weight_matrix(model.get_submodule(name), W_hat)
    model.save_pretrained(job.output)
    return {"seconds": seconds, "peak_memory_bytes": peak}


def quantize_with_gptqmodel(job: Job, cell: Cell) -> dict[str, Any]:
    """benchmarks/gptqmodel_baseline.py in the other tool's own environment; its refusals are results."""
    tokens = job.work / "tokens.json"
    batches = calibration_batches(job, cell.seed)
    tokens.write_text(json.dumps([ids.tolist() for batch in batches for ids in batch["input_ids"]]))
    options = [f"--{name}={value}" for name, value in ROWS[cell.row].options.items()]
    command = [job.gptqmodel_python, Path(__file__).with_name("gptqmodel_baseline.py")]
    command += [job.model.resolve(), tokens, job.output, "--dtype", job.protocol.dtype, *options]
    command += [f"--bits={cell.bits}", f"--group-size={cell.group_size}", *([] if cell.sym else ["--asym"])]
    # It writes a folder of logs where it is started.
    run = subprocess.run(list(map(str, command)), cwd=job.work, capture_output=True, text=True)
    if run.returncode:
        return {"error": (run.stderr.strip().splitlines() or ["no message"])[-1]}
    found = json.loads(run.stdout.strip().splitlines()[-1])
    return {key: found[key] for key in ("seconds", "peak_memory_bytes")}


TOOLS: dict[str, Callable[[Job, Cell], dict[str, Any]]] = {
    "fewbit": quantize_with_fewbit,
    "plain": quantize_plainly,
    "gptqmodel": quantize_with_gptqmodel,
}


def calibration_batches(job: Job, seed: int) -> list[dict[str, Any]]:
    """The batches that fewbit.quantize makes of the same text and seed."""
    from transformers import AutoTokenizer

    from fewbit.calibration import prepare as calibrate

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    protocol = job.protocol
    return calibrate(
        str(job.calibration), tokenizer, num_samples=protocol.samples, seq_len=protocol.seq_len, seed=seed
    ).batches


def peak_memory() -> int:
    """Bytes, of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


# Scoring, in a third process.


def score_original(job: Job) -> dict[str, Any]:
    """The original's own scores; its logits are kept for the comparisons."""
    import torch
    from transformers import AutoModelForCausalLM

    from fewbit.evaluation import evaluate

    model = AutoModelForCausalLM.from_pretrained(job.model, dtype=torch.float32).eval()
    scores = {}
    for text in job.texts:
        ids = evaluation_windows(job, text)
        with torch.no_grad():
            logits = torch.cat([model(window[None], use_cache=False).logits for window in ids])
        job.logits(text).parent.mkdir(exist_ok=True)
        torch.save(logits, job.logits(text))
        scores[name_of(text)] = evaluate(recorded(ids, logits), ids).to_dict()
    return {"texts": scores}


def score(job: Job, cell: Cell) -> dict[str, Any]:
    """Perplexity, and KL to the original, on every text."""
    import torch
    from transformers import AutoModelForCausalLM

    import fewbit
    from fewbit.evaluation import evaluate

    if ROWS[cell.row].tool == "plain":
        model = AutoModelForCausalLM.from_pretrained(job.output, dtype=torch.float32).eval()
    else:
        model = fewbit.load(job.output, dtype=torch.float32)
    scores = {}
    for text in job.texts:
        ids = evaluation_windows(job, text)
        original = recorded(ids, torch.load(job.logits(text), mmap=True))
        scores[name_of(text)] = evaluate(model, ids, against=original, batch_size=4).to_dict()
    result: dict[str, Any] = {"texts": scores}
    if job.say:
        result["continuation"] = continuation(job, model)
    return result


def recorded(ids: Any, logits: Any) -> Any:
    """A model that answers the windows `ids` with these logits, so that the original runs only once."""
    import torch
    from transformers.modeling_outputs import CausalLMOutput

    class Recorded(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.device = torch.nn.Parameter(torch.empty(0))
            self.rows = {tuple(window.tolist()): i for i, window in enumerate(ids)}

        def forward(self, input_ids: Any, use_cache: bool) -> CausalLMOutput:
            return CausalLMOutput(logits=logits[[self.rows[tuple(window.tolist())] for window in input_ids]])

    return Recorded().eval()


def continuation(job: Job, model: Any) -> str:
    """What the model says after the prompt, always taking its first choice."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    ids = tokenizer(accuracy_tables.PROMPT, return_tensors="pt").input_ids
    said = model.generate(ids, max_new_tokens=40, do_sample=False, pad_token_id=tokenizer.eos_token_id)
    return tokenizer.decode(said[0, ids.shape[1] :], skip_special_tokens=True)


def evaluation_windows(job: Job, text: Path) -> Any:
    from transformers import AutoTokenizer

    from fewbit.evaluation import windows

    tokenizer = AutoTokenizer.from_pretrained(job.model)
    return windows(str(text), tokenizer, seq_len=job.protocol.seq_len, num_windows=job.protocol.windows)


def name_of(text: Path) -> str:
    """wiki.test.txt → wiki."""
    return text.name.split(".")[0]


# The run.


def cells(arguments: argparse.Namespace) -> Iterator[Cell]:
    """All cells asked for. Rows without calibration have no seed."""
    for sym, group_size, bits, seed, row in itertools.product(
        [choice == "sym" for choice in arguments.symmetry],
        arguments.group_sizes,
        arguments.bits,
        arguments.seeds,
        arguments.rows,
    ):
        if row not in WITHOUT_CALIBRATION:
            yield Cell(row, bits, group_size, sym, seed)
        elif seed == arguments.seeds[0]:
            yield Cell(row, bits, group_size, sym, 0)


def run(job: Job, wanted: Iterator[Cell], results: Path) -> None:
    """Measure what is not in `results` yet, and append it."""
    done = {(Protocol(**r["protocol"]), Cell(**r["cell"])) for r in accuracy_tables.read(results)}
    original = Cell("original", 16, -1, True, 0)
    if (job.protocol, original) not in done or not all(job.logits(text).exists() for text in job.texts):
        append(results, job, original, in_child(score_original, job))
    for cell in wanted:
        if ROWS[cell.row].tool == "gptqmodel" and job.gptqmodel_python is None:
            print(f"{cell}: skipped, --gptqmodel-python was not given", flush=True)
        elif (job.protocol, cell) not in done:
            append(results, job, cell, measure(job, cell))


def measure(job: Job, cell: Cell) -> dict[str, Any]:
    """Quantize and score one cell."""
    with tempfile.TemporaryDirectory() as folder:
        job = replace(job, work=Path(folder))
        found = in_child(TOOLS[ROWS[cell.row].tool], job, cell)
        return found if "error" in found else found | in_child(score, job, cell)


def in_child(function: Callable[..., Any], *arguments: Any) -> Any:
    """Call in a fresh process, so that its memory is its own."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def append(results: Path, job: Job, cell: Cell, found: dict[str, Any]) -> None:
    """One JSON line, and a short one for whoever watches."""
    record = {"protocol": asdict(job.protocol), "cell": asdict(cell), **found}
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")
    scores = found.get("texts", {}).items()
    said = [f"{text} perplexity {s['perplexity']} KL {s['kl']}" for text, s in scores]
    print(f"{cell}: {'; '.join(said) or found['error']}", flush=True)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2", help="a folder in benchmarks/data, or a path")
    parser.add_argument("--calibration", type=Path, default=prepare.TRAIN)
    parser.add_argument("--texts", type=Path, nargs="+", default=[prepare.TEST, prepare.AUSTEN_TEST])
    parser.add_argument("--rows", nargs="+", choices=list(ROWS), default=list(ROWS))
    parser.add_argument("--bits", type=int, nargs="+", default=[4, 3, 2])
    parser.add_argument("--group-sizes", type=int, nargs="+", default=[64])
    parser.add_argument("--symmetry", nargs="+", choices=["sym", "asym"], default=["sym", "asym"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the calibration windows")
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--windows", type=int, default=16, help="per text")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float32"])
    parser.add_argument("--gptqmodel-python", type=Path)
    parser.add_argument(
        "--say", action="store_true", help=f"let each model go on after {accuracy_tables.PROMPT!r}"
    )
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--table", type=Path, metavar="FILE.md", help="only write the tables into this file")
    return parser.parse_args()


def main() -> None:
    arguments = read_arguments()
    if arguments.table:
        accuracy_tables.write(arguments.table, accuracy_tables.read(arguments.results))
        return
    missing = [p for p in (arguments.calibration, *arguments.texts) if not p.exists()]
    if missing:
        raise SystemExit(f"{', '.join(map(str, missing))}: missing; run `python benchmarks/prepare.py` first")
    model = prepare.DATA / arguments.model  # an absolute path stays what it is
    protocol = Protocol(
        arguments.model,
        name_of(arguments.calibration),
        ", ".join(map(name_of, arguments.texts)),
        arguments.samples,
        arguments.seq_len,
        arguments.windows,
        arguments.dtype,
    )
    job = Job(
        protocol,
        model,
        arguments.calibration,
        tuple(arguments.texts),
        arguments.gptqmodel_python,
        arguments.say,
    )
    run(job, cells(arguments), arguments.results)


if __name__ == "__main__":
    main()
