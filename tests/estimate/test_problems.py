"""Everything that cannot work is found before the work, with what to do about it."""

import json
import sys
from dataclasses import replace

import pytest
import torch

import fewbit
from fewbit import QuantConfig
from fewbit.context import RunContext
from fewbit.errors import FewbitError
from fewbit.estimate import estimate, limits
from fewbit.estimate.limits import memory_problems
from fewbit.estimate.predict import Memory
from fewbit.resources import Limit
from models import TEXT, random_sequences, save_tiny, tiny_model, tiny_tokenizer

CONFIG = QuantConfig(group_size=16, num_samples=6, seq_len=24)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save_tiny(tmp_path_factory.mktemp("model") / "llama")


def only_problem(model, config=CONFIG, **options):
    found = estimate(model, config, **{"dataset": random_sequences(), **options})
    assert not found.works
    [problem] = found.problems
    return problem


def test_what_works_has_no_problem(model, tmp_path):
    found = estimate(model, CONFIG, dataset=random_sequences(), output=tmp_path / "out")
    assert found.works
    assert not found.problems
    assert found.memory.peak > 0
    assert found.total_seconds == sum(found.seconds.values())
    assert not (tmp_path / "out").exists()
    assert list(tmp_path.iterdir()) == []


def test_too_little_memory_for_the_activations(model, monkeypatch):
    used = 500_000_000
    monkeypatch.setattr("fewbit.estimate.memory_in_use_bytes", lambda: used)
    config, texts = QuantConfig(group_size=16, num_samples=60, seq_len=100), random_sequences(60, 100)
    left = estimate(model, config, dataset=texts).memory.peak - used - 1_000_000
    monkeypatch.setattr(limits, "memory_left", lambda: Limit(left, "left in this test"))
    problem = only_problem(model, config, dataset=texts)
    assert "memory is too small: the run takes" in problem
    assert f"{left / 1e6:.1f} MB are left in this test" in problem
    for way in ("--num-samples", "--seq-len 50", "--fast", "--offload-dir", "--dtype bfloat16"):
        assert way in problem


def test_activations_on_disk_need_less_memory(model, monkeypatch, tmp_path):
    config = QuantConfig(group_size=16, num_samples=60, seq_len=100)
    texts = random_sequences(60, 100)
    within = estimate(model, config, dataset=texts)
    outside = estimate(model, config, dataset=texts, offload_dir=tmp_path)
    assert outside.memory.parts["activations"] < 0.2 * within.memory.parts["activations"]
    assert outside.seconds["offloading"] > 0 == within.seconds["offloading"]
    monkeypatch.setattr(limits, "disk_left", lambda folder: Limit(1000, f"free at {folder}"))
    problem = only_problem(model, config, dataset=texts, offload_dir=tmp_path)
    assert "the disk for activations is too small" in problem
    assert "or another --offload-dir" in problem


def test_a_folder_for_activations_that_is_not_there(model, tmp_path):
    assert "activations cannot be kept in" in only_problem(model, offload_dir=tmp_path / "none")


def test_too_little_memory_for_one_block(model, monkeypatch):
    monkeypatch.setattr(limits, "memory_left", lambda: Limit(1000, "left in this test"))
    problem = only_problem(model)
    assert "memory is too small for the weights of model.layers.0" in problem
    assert "One block must fit" in problem


def test_too_little_room_on_the_disk(model, monkeypatch, tmp_path):
    monkeypatch.setattr(limits, "disk_left", lambda folder: Limit(1000, f"free at {folder}"))
    problem = only_problem(model, output=tmp_path / "out")
    assert "the disk is too small" in problem
    assert f"1.00 kB are free at {tmp_path / 'out'}" in problem


def test_an_output_folder_that_cannot_be_written(model, monkeypatch, tmp_path):
    import tempfile

    def refuse(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(tempfile, "TemporaryDirectory", refuse)
    assert "Read-only file system; choose another output folder" in only_problem(
        model, output=tmp_path / "out"
    )


def test_an_output_folder_with_something_in_it(model, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    problem = only_problem(model, output=tmp_path)
    assert "already holds something else (mine.txt)" in problem


def test_an_interrupted_run_of_other_inputs(model, tmp_path):
    def stop(phase, done, total):
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fewbit.quantize(model, CONFIG, dataset=random_sequences(), output=tmp_path / "out", progress=stop)
    found = estimate(model, CONFIG, dataset=random_sequences(), output=tmp_path / "out")
    assert found.works
    assert any("goes on with an interrupted run" in note for note in found.notes)
    other = QuantConfig(group_size=32, num_samples=6, seq_len=24)
    assert "interrupted run made with another config" in only_problem(model, other, output=tmp_path / "out")
    assert "--no-resume" in only_problem(model, output=tmp_path / "out", resume=False)


def test_a_budget_that_cannot_be_met(model):
    problem = only_problem(model, QuantConfig(target_bits=2.01, num_samples=6, seq_len=24))
    assert "target_bits 2.01 cannot be met" in problem
    assert "Raise target_bits" in problem


def test_a_model_that_is_quantized_already(model, tmp_path):
    fewbit.quantize(model, QuantConfig(method="rtn", group_size=16), output=tmp_path / "out")
    assert "is already quantized (gptq): quantize the original model" in only_problem(tmp_path / "out")


def test_pickled_weights(tmp_path):
    folder = save_tiny(tmp_path / "model")
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    assert "pass --allow-pickle" in only_problem(folder)


def test_text_without_a_tokenizer(tmp_path):
    tiny_model("llama").save_pretrained(tmp_path / "model")
    problem = only_problem(tmp_path / "model", dataset=[TEXT])
    assert "a tokenizer is needed" in problem
    found = estimate(tmp_path / "model", CONFIG)
    assert found.works
    assert any("no tokenizer lies beside the model" in note for note in found.notes)


def test_sequences_that_need_padding_without_a_pad_token(tmp_path):
    folder = save_tiny(tmp_path / "model")
    tokenizer = tiny_tokenizer()
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    texts = tmp_path / "texts.jsonl"
    texts.write_text("\n".join(json.dumps({"text": "word " * n}) for n in (2, 9)))
    config = QuantConfig(group_size=16, batch_size=2, seq_len=24)
    problem = only_problem(folder, config, dataset=[{"input_ids": [5, 6]}, {"input_ids": [5, 6, 7]}])
    assert "pad" in problem
    assert "batch_size" in problem


@pytest.mark.parametrize("option", [{"ignore": ["q_prj"]}, {"override": {"q_prj": {"bits": 8}}}])
def test_a_pattern_that_matches_nothing(model, option):
    problem = only_problem(model, QuantConfig(group_size=16, **option))
    assert "the pattern 'q_prj' matches no layer" in problem


def test_the_evaluation_of_an_encoder_decoder(tmp_path):
    folder = save_tiny(tmp_path / "t5", "t5")
    assert "encoder-decoder: leave it out" in only_problem(folder, evaluate_on="wikitext2")


def test_a_gguf_file_without_its_package(tmp_path, monkeypatch):
    (tmp_path / "model.gguf").write_bytes(b"GGUF")
    monkeypatch.setitem(sys.modules, "gguf", None)
    found = estimate(tmp_path / "model.gguf", CONFIG, dataset=random_sequences())
    assert any("pip install gguf sentencepiece" in problem for problem in found.problems)


def test_a_device_that_is_not_there(model):
    assert "device 'cuda:7' cannot be used here" in only_problem(model, device="cuda:7")


def test_a_shard_size_that_is_no_size(model):
    assert "max_shard_size" in only_problem(model, max_shard_size="much")


def test_all_problems_are_told_at_once(model, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    config = QuantConfig(target_bits=2.01, num_samples=6, seq_len=24)
    found = estimate(model, config, dataset=str(tmp_path / "none.txt"), output=tmp_path)
    assert len(found.problems) == 3


def test_what_quantize_would_say_is_what_plan_says(model, tmp_path):
    (tmp_path / "mine.txt").write_text("x")
    with pytest.raises(FewbitError) as refused:
        fewbit.quantize(model, CONFIG, dataset=random_sequences(), output=tmp_path)
    assert only_problem(model, output=tmp_path) == str(refused.value)


def test_processes_of_one_machine_share_its_memory(monkeypatch):
    monkeypatch.setattr(limits, "memory_left", lambda: Limit(2500, "free"))
    memory = Memory("solving b", {"libraries": 1000})
    for processes, works in ((3, True), (4, False)):
        found = memory_problems(memory, 500, RunContext(CONFIG), processes)
        assert (not found) == works
    assert (
        "each of 4 processes takes 1.00 kB while solving b, 3.50 kB more than now, and 2.50 kB are"
        in found[0]
    )


def test_too_little_memory_on_the_gpu(monkeypatch):
    monkeypatch.setattr(limits, "device_left", lambda device: Limit(1000, f"free on {device}"))
    memory = Memory("reading weights", {"libraries": 10}, device_peak=5000)
    [problem] = memory_problems(memory, 10, RunContext(CONFIG, torch.device("cuda:0")))
    assert "the GPU's memory is too small: without the activations" in problem
    assert "the run takes 5.00 kB, and 1.00 kB are free on cuda:0. Use a smaller --batch-size" in problem


def test_activations_that_fit_into_neither_memory(monkeypatch):
    monkeypatch.setattr(limits, "device_left", lambda device: Limit(9000, f"free on {device}"))
    monkeypatch.setattr(limits, "memory_left", lambda: Limit(1000, "available"))
    memory = Memory(
        "reading weights", {"libraries": 10, "activations": 5000}, device_peak=5000, host_activations=5000
    )
    [problem] = memory_problems(memory, 10, RunContext(CONFIG, torch.device("cuda:0")))
    assert "memory is too small: the run takes 5.01 kB while reading weights" in problem
    assert "What helps: a GPU with more memory; " in problem
    assert "--offload-dir FOLDER" in problem


def test_a_text_shorter_than_asked_for_is_a_note(model, tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)
    found = estimate(model, CONFIG, dataset=str(tmp_path / "text.txt"))
    few = estimate(model, replace(CONFIG, num_samples=500), dataset=str(tmp_path / "text.txt"))
    assert found.works
    assert few.works
    assert any("500 were asked for" in note for note in few.notes)
    assert not any("were asked for" in note for note in found.notes)


def test_notes_do_not_keep_it_from_working(model):
    found = estimate(model, QuantConfig(group_size=20, num_samples=50, seq_len=24), dataset=[TEXT])
    assert found.works
    notes = " ".join(found.notes)
    assert "which group size 20 does not divide" in notes
    assert estimate(model, CONFIG).works  # without a dataset, on as many tokens as asked for
