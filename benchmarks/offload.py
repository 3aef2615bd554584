"""Peak memory and time of a quantization with and without --offload-dir.

    python benchmarks/offload.py --samples 128 --folder /mnt/disk

SmolLM2-135M in bfloat16, 4 bits, 512 tokens per sample. Every run is in a process of its own. Printed: the highest
resident memory, what of it is above a run with two samples (weights, solver, libraries), seconds of the clock and of
the processor, and whether the files are the same.
"""

from __future__ import annotations

import argparse
import hashlib
import multiprocessing
import tempfile
import time
from pathlib import Path

import prepare

SEQ_LEN = 512


def quantize(output: str, samples: int, offload_dir: str | None, options: dict) -> dict:
    """One run of the public API; its report, and the hash of its weights."""
    import transformers.models.llama.modeling_llama  # noqa: F401

    import fewbit
    import fewbit.quantization

    config = fewbit.QuantConfig(
        num_samples=samples, seq_len=SEQ_LEN, group_size=64, dtype="bfloat16", **options
    )
    start = time.process_time()
    report = fewbit.quantize(
        prepare.MODEL, config, dataset=str(prepare.TRAIN), output=output, offload_dir=offload_dir
    )
    processor = time.process_time() - start
    digest = hashlib.sha256((Path(output) / "model.safetensors").read_bytes()).hexdigest()
    return {**report.to_dict(), "sha256": digest, "processor": processor}


def _child(function, *arguments):
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--samples", type=int, default=128)
    parser.add_argument("--fast", action="store_true", help="one stream")
    parser.add_argument("--folder", type=Path, help="where to put activations and results for the time being")
    arguments = parser.parse_args()
    prepare.ensure()
    options = {"fast": arguments.fast}
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        least = _child(quantize, f"{folder}/least", 2, None, options)["peak_memory_bytes"]
        plain = _child(quantize, f"{folder}/plain", arguments.samples, None, options)
        offloaded = _child(quantize, f"{folder}/offloaded", arguments.samples, folder, options)
    print(f"with two samples: peak {least / 1e9:.2f} GB")
    above = []
    for name, report in (("in memory", plain), ("offloaded", offloaded)):
        above.append(report["peak_memory_bytes"] - least)
        offloading = report["seconds_by_phase"].get("offload", 0.0)
        print(
            f"{name}: peak {report['peak_memory_bytes'] / 1e9:.2f} GB, {above[-1] / 1e9:.2f} GB of it activations"
        )
        print(
            f"  {report['seconds']:.0f} s, {offloading:.0f} s of it offloading; "
            f"{report['processor']:.0f} s of the processor"
        )
    print(next(note for note in offloaded["notes"] if "on disk" in note))
    same = plain["sha256"] == offloaded["sha256"]
    print(
        f"ratio: activations {above[1] / above[0]:.2f} ×, time {offloaded['seconds'] / plain['seconds']:.2f} ×, "
        f"processor {offloaded['processor'] / plain['processor']:.2f} ×; files {'the same' if same else 'DIFFERENT'}"
    )


if __name__ == "__main__":
    main()
