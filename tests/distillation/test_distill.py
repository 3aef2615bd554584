"""A checkpoint is distilled: nearer to the original, the same codes, resumable to the same bytes."""

import json

import pytest
import torch
from safetensors.torch import load_file

import fewbit
from fewbit import distillation
from fewbit.distillation import DistillConfig, distill, teacher
from fewbit.errors import CalibrationError, ConfigError, ModelError, OutputError, ResumeError
from fewbit.verification import verify
from models import SMALL, random_sequences, save_tiny, tiny_tokenizer
from moe_models import save_tiny_moe
from rank_processes import run_ranks

CONFIG = DistillConfig(tokens=3200, seq_len=32, batch_size=4, rate=4e-3)


def checkpoint(folder, family="llama", **settings):
    save = save_tiny_moe if family == "mixtral" else save_tiny
    save(folder / "model", family)
    config = fewbit.QuantConfig(**{**SMALL, "bits": 2, "dtype": "float32", **settings})
    fewbit.quantize(folder / "model", config, dataset=random_sequences(6, 32), output=folder / "quantized")
    return folder / "quantized"


def text(count=120, seed=3):
    return random_sequences(count, 32, seed=seed)


def weights(folder):
    return {name: t for path in folder.glob("*.safetensors") for name, t in load_file(path).items()}


def kl(folder, base, seed=9):
    from transformers import AutoModelForCausalLM

    windows = torch.stack([one["input_ids"] for one in random_sequences(64, 32, seed=seed)])
    model = fewbit.load(folder, dtype=torch.float32, kernel="reference")
    original = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    return fewbit.evaluate(model, windows, against=original).kl


@pytest.mark.parametrize(
    ("family", "settings"),
    [
        ("llama", {}),
        ("llama", {"sym": False, "bits": 3, "act_order": "full", "format": "gptq_v2"}),
        ("opt", {"group_size": -1}),
        ("gpt2", {"bits": 3, "sym": False}),
        ("mixtral", {}),
        ("llama", {"target_bits": 5.0}),
    ],
)
def test_the_result_is_nearer_and_has_the_same_codes(family, settings, tmp_path):
    quantized = checkpoint(tmp_path, family, **settings)
    result = distill(quantized, tmp_path / "model", text(), tmp_path / "out", CONFIG)
    assert result.kept
    assert result.after < 0.97 * result.before
    assert kl(tmp_path / "out", tmp_path / "model") < 0.97 * kl(quantized, tmp_path / "model")
    assert not verify(tmp_path / "out").problems
    before, after = weights(quantized), weights(tmp_path / "out")
    assert list(before) == list(after)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert {before[name].dtype for name in before} == {after[name].dtype for name in after}
    assert any(name.endswith(".scales") for name in changed)
    assert not any(name.endswith(("qweight", "qzeros", "g_idx", "embed_tokens.weight")) for name in changed)
    assert all(before[name].ndim == 1 for name in changed if not name.endswith(".scales"))
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["meta"]["distilled"].startswith("fewbit:")
    report = json.loads((tmp_path / "out" / "fewbit_report.json").read_text())
    assert report["distillation"]["after"] == result.after
    assert report["layers"]
    assert not (tmp_path / "out" / ".fewbit").exists()


def test_what_is_judged_is_what_is_written(tmp_path):
    """The held-out KL of the report is that of the files."""
    quantized = checkpoint(tmp_path)
    result = distill(quantized, tmp_path / "model", text(), tmp_path / "out", CONFIG)
    again = distill(tmp_path / "out", tmp_path / "model", text(), tmp_path / "again", CONFIG)
    assert again.before == pytest.approx(result.after, rel=1e-3)


@pytest.mark.parametrize("step", [1, 7, 24])
def test_a_killed_run_resumes_to_the_same_bytes(step, tmp_path):
    quantized = checkpoint(tmp_path)
    arguments = (quantized, tmp_path / "model", text())
    distill(*arguments, tmp_path / "straight", CONFIG)

    class KilledError(Exception):
        pass

    def kill(phase, done, total):
        if done == step:
            raise KilledError

    with pytest.raises(KilledError):
        distill(*arguments, tmp_path / "out", CONFIG, progress=kill)
    seen = []
    distill(*arguments, tmp_path / "out", CONFIG, progress=lambda phase, done, total: seen.append(done))
    assert seen[0] in (step, step + 1)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()


def test_an_interrupted_run_of_other_inputs_is_refused(tmp_path):
    quantized = checkpoint(tmp_path)

    def kill(phase, done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        distill(quantized, tmp_path / "model", text(), tmp_path / "out", CONFIG, progress=kill)
    with pytest.raises(ResumeError, match="text"):
        distill(quantized, tmp_path / "model", text(seed=4), tmp_path / "out", CONFIG)
    with pytest.raises(OutputError):
        distill(quantized, tmp_path / "model", text(), tmp_path / "model", CONFIG)


def test_little_memory_gives_the_same_bytes(tmp_path, monkeypatch):
    """The teacher is read block by block, the student's matrices are decoded anew and its blocks recomputed."""
    quantized = checkpoint(tmp_path)
    distill(quantized, tmp_path / "model", text(), tmp_path / "out", CONFIG)
    for module in (teacher, distillation):
        monkeypatch.setattr(module, "takes_at_most", lambda share, needed, device: False)
    distill(quantized, tmp_path / "model", text(), tmp_path / "little", CONFIG)
    assert (tmp_path / "out/model.safetensors").read_bytes() == (
        tmp_path / "little/model.safetensors"
    ).read_bytes()


def test_a_result_that_is_not_better_is_not_kept(tmp_path):
    quantized = checkpoint(tmp_path)
    config = DistillConfig(tokens=320, seq_len=32, batch_size=4, rate=0.9)
    result = distill(quantized, tmp_path / "model", text(), tmp_path / "out", config)
    assert not result.kept
    assert any("did not lower the KL" in note for note in result.notes)
    before, after = weights(quantized), weights(tmp_path / "out")
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_little_text_is_used_several_times_and_said(tmp_path):
    quantized = checkpoint(tmp_path)
    result = distill(quantized, tmp_path / "model", text(8), tmp_path / "out", CONFIG)
    assert any("each was used" in note for note in result.notes)
    with pytest.raises(CalibrationError, match="there is only one"):
        distill(quantized, tmp_path / "model", text(1), tmp_path / "other", CONFIG)


def test_another_model_is_refused(tmp_path):
    quantized = checkpoint(tmp_path)
    save_tiny(tmp_path / "larger", vocab_size=200)
    with pytest.raises(ModelError, match="vocabulary"):
        distill(quantized, tmp_path / "larger", text(), tmp_path / "out", CONFIG)
    with pytest.raises(ConfigError, match="writes to a third one"):
        distill(quantized, tmp_path / "model", text(), quantized, CONFIG)


@pytest.mark.parametrize(
    "settings",
    [{"tokens": 0}, {"batch_size": 1.5}, {"rate": 0.0}, {"rate": "fast"}, {"rate": 2}, {"seq_len": True}],
)
def test_settings_are_checked(settings):
    with pytest.raises(ConfigError):
        DistillConfig(**settings)


def test_processes_share_each_batch(tmp_path):
    quantized = checkpoint(tmp_path)
    alone = distill(quantized, tmp_path / "model", text(), tmp_path / "alone", CONFIG)

    def work(comm, folder):
        return distill(quantized, tmp_path / "model", text(), folder, CONFIG)

    first, second = run_ranks(2, work, tmp_path / "shared")
    assert first.curve == second.curve
    for one, other in zip(first.curve, alone.curve, strict=True):
        assert one.held_out == pytest.approx(other.held_out, rel=2e-2)
    assert kl(tmp_path / "shared", tmp_path / "model") < 0.97 * kl(quantized, tmp_path / "model")


def test_the_command(tmp_path, capsys):
    from fewbit.cli.main import app

    quantized = checkpoint(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(
        "the truth is universally acknowledged in the minds of families. " * 400
    )
    arguments = ["distill", str(quantized), "--against", str(tmp_path / "model"), "-o", str(tmp_path / "out")]
    arguments += ["--dataset", str(tmp_path / "text.txt"), "--tokens", "640", "--seq-len", "32"]
    app(arguments, standalone_mode=False)
    shown = capsys.readouterr().out
    assert "KL divergence" in shown
    assert "written to" in shown
    arguments[arguments.index(str(tmp_path / "out"))] = str(tmp_path / "out2")
    app([*arguments, "--json"], standalone_mode=False)
    assert json.loads(capsys.readouterr().out)["tokens"] == 640


def test_quantize_with_distill_resumes_to_the_same_bytes(tmp_path):
    save_tiny(tmp_path / "model")
    config = fewbit.QuantConfig(
        **{**SMALL, "bits": 2, "dtype": "float32", "distill": True, "distill_tokens": 2048}
    )
    data = random_sequences(40, 48)
    plain = fewbit.QuantConfig(**{**config.to_dict(), "distill": False})
    fewbit.quantize(tmp_path / "model", plain, dataset=data, output=tmp_path / "plain")
    report = fewbit.quantize(tmp_path / "model", config, dataset=data, output=tmp_path / "straight")
    assert report.distillation["after"] < report.distillation["before"]
    assert report.distillation["curve"][-1]["tokens"] >= 1900
    assert "KL after distillation" in (tmp_path / "straight/fewbit_report.html").read_text()
    assert "distilled" in (tmp_path / "straight/README.md").read_text()
    assert kl(tmp_path / "straight", tmp_path / "model") < kl(tmp_path / "plain", tmp_path / "model")
    assert not verify(tmp_path / "straight").problems

    class KilledError(Exception):
        pass

    for phase, step in (("quantize", 20_000), ("distill", 1), ("distill", 17)):

        def kill(seen, done, total, phase=phase, step=step):
            if seen == phase and done >= step:
                raise KilledError

        with pytest.raises(KilledError):
            fewbit.quantize(tmp_path / "model", config, dataset=data, output=tmp_path / "out", progress=kill)
        assert not (tmp_path / "out/config.json").exists()
    again = fewbit.quantize(tmp_path / "model", config, dataset=data, output=tmp_path / "out")
    assert again.resumed_layers == len(again.layers)
    for name in ("model.safetensors", "config.json"):
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "straight" / name).read_bytes()
    assert not (tmp_path / "out/.fewbit").exists()


def test_errors_come_before_the_training(tmp_path):
    quantized = checkpoint(tmp_path)

    def never(phase, done, total):
        raise AssertionError("a step was done")

    arguments = (quantized, tmp_path / "model", text(), tmp_path / "out", CONFIG)
    with pytest.raises(ConfigError, match="max_shard_size"):
        distill(*arguments, max_shard_size="5 sheep", progress=never)
    images = [
        {"input_ids": one["input_ids"][None], "pixel_values": torch.zeros(1, 3, 8, 8)} for one in text(4)
    ]
    with pytest.raises(CalibrationError, match="token ids alone"):
        distill(quantized, tmp_path / "model", images, tmp_path / "out", CONFIG, progress=never)
    assert not (tmp_path / "out").exists()


def test_what_distill_cannot_do_is_said_before_the_work(tmp_path):
    save_tiny(tmp_path / "t5", "t5")
    config = fewbit.QuantConfig(**SMALL, distill=True)
    with pytest.raises(ConfigError, match="causal language models"):
        fewbit.quantize(tmp_path / "t5", config, dataset=random_sequences(6, 32), output=tmp_path / "out")
    save_tiny(tmp_path / "model")
    tiny_tokenizer().save_pretrained(tmp_path / "model")
    with pytest.raises(ConfigError, match="a second time"):
        fewbit.quantize(tmp_path / "model", config, dataset="-", output=tmp_path / "out")
    from models import tiny_model

    with pytest.raises(ConfigError, match="model in memory"):
        fewbit.quantize(tiny_model("llama"), config, dataset=random_sequences(6, 32))
