"""The accuracy benchmark on a tiny model, in one process, and its tables."""

import json
import sys
from pathlib import Path

import accuracy
import accuracy_tables
import prepare
import pytest
import torch

from fewbit.evaluation import evaluate
from models import save_tiny


@pytest.fixture
def benchmark(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Runs the command line on a tiny model; returns the records."""
    monkeypatch.setattr(prepare, "DATA", tmp_path)
    monkeypatch.setattr(accuracy, "in_child", lambda function, *arguments: function(*arguments))
    save_tiny(tmp_path / "tiny")
    letters = torch.randint(97, 123, (6000,), generator=torch.Generator().manual_seed(0)).tolist()
    (tmp_path / "some.txt").write_text(bytes(letters).decode())
    (tmp_path / "other.txt").write_text(bytes(letters[::-1]).decode())
    base = [
        "accuracy.py",
        "--model",
        "tiny",
        "--calibration",
        f"{tmp_path}/some.txt",
        "--texts",
        f"{tmp_path}/other.txt",
    ]
    base += [
        "--samples",
        "4",
        "--seq-len",
        "32",
        "--windows",
        "4",
        "--group-sizes",
        "16",
        "--dtype",
        "float32",
    ]
    base += ["--results", f"{tmp_path}/results.jsonl", "--symmetry", "sym"]

    def run(*options: str) -> list[dict]:
        monkeypatch.setattr(sys, "argv", [*base, *options])
        accuracy.main()
        return accuracy_tables.read(tmp_path / "results.jsonl")

    return run


def test_cells_are_measured_once_and_appended(benchmark, capsys: pytest.CaptureFixture[str]) -> None:
    rows = ("--rows", "rtn-minmax", "rtn", "plain", "fast", "gptqmodel")
    found = benchmark(*rows, "--bits", "3", "--seeds", "0", "1")
    cells = [(r["cell"]["row"], r["cell"]["seed"]) for r in found]
    assert cells == [
        ("original", 0),
        ("rtn-minmax", 0),
        ("rtn", 0),
        ("plain", 0),
        ("fast", 0),
        ("plain", 1),
        ("fast", 1),
    ]
    kl = {cell: record["texts"]["other"]["kl"] for cell, record in zip(cells, found, strict=True)}
    assert kl["original", 0] is None
    assert 0 < kl["fast", 0] < kl["rtn", 0]
    assert 0 < kl["plain", 0] < kl["rtn-minmax", 0]
    assert kl["plain", 0] != kl["plain", 1]
    assert "skipped, --gptqmodel-python was not given" in capsys.readouterr().out

    assert benchmark(*rows, "--bits", "3", "--seeds", "0", "1") == found
    assert len(benchmark("--rows", "rtn", "--bits", "3", "4")) == len(found) + 1


def test_recorded_logits_score_like_the_model(tmp_path: Path) -> None:
    from models import tiny_model

    model, other = tiny_model("llama"), tiny_model("llama", seed=1)
    ids = torch.randint(3, 100, (5, 20), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        logits = model(ids).logits
    direct = evaluate(other, ids, against=model)
    replayed = evaluate(other, ids, against=accuracy.recorded(ids, logits), batch_size=2)
    assert replayed.kl == pytest.approx(direct.kl, rel=1e-5)
    assert replayed.top1_agreement == direct.top1_agreement


def test_a_text_that_is_missing_is_named(benchmark, tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match=r"gone\.txt: missing; run `python benchmarks/prepare\.py`"):
        benchmark("--calibration", f"{tmp_path}/gone.txt")


PROTOCOL = {
    "model": "m",
    "calibration": "wiki",
    "texts": "wiki",
    "samples": 32,
    "seq_len": 512,
    "windows": 16,
    "dtype": "bfloat16",
}


def record(row: str, seed: int, kl: float, perplexity: float | None = 20.0) -> dict:
    scores = {"perplexity": perplexity, "stderr": 1.5, "kl": kl, "kl_stderr": 0.01}
    cell = {"row": row, "bits": 4, "group_size": 64, "sym": True, "seed": seed}
    return {
        "protocol": PROTOCOL,
        "cell": cell,
        "texts": {"wiki": scores},
        "seconds": 61.7,
        "peak_memory_bytes": 2e9,
    }


def test_tables_have_means_over_seeds_and_errors_over_windows() -> None:
    text = accuracy_tables.tables(
        [record("default", 0, 0.1), record("default", 1, 0.3), record("rtn", 0, 0.5, None)]
    )
    assert "| **fewbit** | 20.00 ± 1.50 (0.00) | 0.2000 ± 0.0100 (0.1414) | 62 | 2.00 | 2 |" in text
    assert "| round to nearest, fewbit's grid | ∞ | 0.5000 ± 0.0100 | 62 | 2.00 | 1 |" in text
    assert "### 4 bits, groups of 64, symmetric" in text


def test_tables_show_what_the_models_said() -> None:
    text = accuracy_tables.tables(
        [record("fast", 0, 0.2) | {"continuation": " Paris.\n\nIt `is`" + " x" * 100}]
    )
    assert "- fewbit `--fast`: `Paris. It 'is' x x" in text
    assert text.rstrip().endswith("…`")
    assert "“The capital of France is …”" not in accuracy_tables.tables([record("fast", 0, 0.2)])


def test_a_later_measurement_replaces_the_earlier_and_a_refusal_is_shown() -> None:
    refused = {**record("gptqmodel", 0, 0.0), "error": "ValueError: no"}
    text = accuracy_tables.tables([record("fast", 0, 0.9), record("fast", 0, 0.2), refused])
    assert "0.2000" in text
    assert "0.9000" not in text
    assert "failed: ValueError: no" in text


def test_tables_are_written_between_the_marks(tmp_path: Path) -> None:
    document = tmp_path / "accuracy.md"
    document.write_text(f"# Before\n{accuracy_tables.BEGIN}\nold\n{accuracy_tables.END}\nAfter\n")
    results = tmp_path / "results.jsonl"
    results.write_text(json.dumps(record("fast", 0, 0.2)) + "\n")
    accuracy_tables.write(document, accuracy_tables.read(results))
    text = document.read_text()
    assert text.startswith("# Before\n")
    assert text.endswith("\nAfter\n")
    assert "old" not in text
    assert "0.2000" in text
    with pytest.raises(SystemExit, match="no place for the tables"):
        accuracy_tables.write(results, [])
