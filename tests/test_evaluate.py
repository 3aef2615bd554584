"""Perplexity, KL and agreement against a slow float64 loop; the window protocol; every refusal."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from fewbit import demo
from fewbit.errors import CalibrationError, ModelError
from fewbit.evaluation import evaluate, windows

PROSE = demo.evaluation_text().read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(demo.model_path())


@pytest.fixture(scope="module")
def model():
    return AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype=torch.float32)


@pytest.fixture(scope="module")
def worse():
    """The demo model with noise on its weights."""
    noisy = AutoModelForCausalLM.from_pretrained(demo.model_path(), dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in noisy.parameters():
            parameter.add_(torch.randn_like(parameter) * parameter.std() * 0.2)
    return noisy


@torch.no_grad()
def slow(model, windows, base=None):
    """nll, KL and agreement of every predicted token, one Python loop, in float64."""
    nll, kl, same = [], [], []
    for window in windows:
        logits = model(window[None], use_cache=False).logits[0].double()
        other = base(window[None], use_cache=False).logits[0].double() if base else logits
        for i in range(len(window) - 1):
            q, p = logits[i].softmax(0), other[i].softmax(0)
            nll.append(-math.log(q[window[i + 1]]))
            kl.append(float((p * (p.log() - q.log())).sum()))
            same.append(float(p.argmax() == q.argmax()))
    means = torch.tensor([nll, kl, same], dtype=torch.float64).view(3, len(windows), -1).mean(2)
    errors = (
        (means - means.mean(1, keepdim=True)).pow(2).sum(1).div(len(windows) - 1).div(len(windows)).sqrt()
    )
    return means.mean(1).tolist(), errors.tolist()


@pytest.mark.parametrize("batch_size", [1, 2, 5])
def test_scores_equal_the_slow_loop(batch_size, model, worse, tokenizer, monkeypatch):
    monkeypatch.setattr("fewbit.evaluation.rows_at_once", lambda *_: 7)  # many chunks, the last one smaller
    text = windows([PROSE], tokenizer, 33, 5)
    (nll, kl, same), (nll_error, kl_error, _) = slow(worse, text, model)
    result = evaluate(worse, text, against=model, batch_size=batch_size)
    assert result.nll == pytest.approx(nll, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(nll), rel=1e-5)
    assert result.nll_stderr == pytest.approx(nll_error, rel=1e-4)
    assert result.stderr == pytest.approx(math.exp(nll) * nll_error, rel=1e-4)
    assert result.kl == pytest.approx(kl, rel=1e-4)
    assert result.kl_stderr == pytest.approx(kl_error, rel=1e-3)
    assert result.top1_agreement == pytest.approx(same, abs=1e-9)
    assert (result.tokens, result.windows, result.seq_len) == (5 * 32, 5, 33)


def test_a_model_against_itself_and_alone(model, tokenizer):
    text = windows([PROSE], tokenizer, 64, 2)
    same = evaluate(model, text, against=model)
    alone = evaluate(model, text)
    assert same.kl == 0.0
    assert same.top1_agreement == 1.0
    assert alone.perplexity == same.perplexity
    assert (alone.kl, alone.kl_stderr, alone.top1_agreement) == (None, None, None)


def test_one_window_has_no_standard_error(model, tokenizer):
    result = evaluate(model, windows(["It was a fine morning."], tokenizer, 512))
    assert (result.windows, result.stderr, result.nll_stderr) == (1, None, None)


def test_to_dict_has_the_keys_of_the_contract_and_is_json(model, tokenizer):
    result = evaluate(model, windows([PROSE], tokenizer, 32, 2), against=model).to_dict()
    assert {"perplexity", "nll", "stderr", "tokens", "kl", "top1_agreement", "seconds"} <= result.keys()
    assert json.loads(json.dumps(result, allow_nan=False)) == result


def test_progress_and_training_mode(model, tokenizer):
    calls = []
    model.train()
    evaluate(model, windows([PROSE], tokenizer, 16, 5), batch_size=2, progress=lambda *c: calls.append(c))
    assert calls == [(2, 5), (4, 5), (5, 5)]
    assert model.training
    model.eval()


# ---------- windows ----------


def test_windows_are_the_whole_text_without_the_incomplete_end(tokenizer):
    ids = tokenizer(PROSE[:5000], add_special_tokens=False, verbose=False)["input_ids"]
    text = windows([PROSE[:5000]], tokenizer, 60)
    assert text.flatten().tolist() == ids[: len(ids) // 60 * 60]
    assert len(ids) % 60
    assert torch.equal(windows([PROSE[:5000]], tokenizer, 60, 3), text[:3])


def test_windows_from_a_file_and_a_named_set(tokenizer, monkeypatch):
    datasets = pytest.importorskip("datasets")
    expected = windows([PROSE], tokenizer, 128, 4)
    assert torch.equal(windows(demo.evaluation_text(), tokenizer, 128, 4), expected)
    asked = []

    def load_dataset(*args, **options):
        asked.append(options)
        return datasets.Dataset.from_dict({"text": [PROSE[:3000], PROSE[3000:6000]]})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name, separator in (("wikitext2", "\n\n"), ("c4", "\n\n"), ("c4-new", " ")):
        joined = windows([PROSE[:3000] + separator + PROSE[3000:6000]], tokenizer, 128)
        assert torch.equal(windows(name, tokenizer, 128), joined)
    assert [options["split"] for options in asked] == ["test"] * 3
    assert asked[1]["data_files"] == {"test": "en/c4-validation.00000-of-00008.json.gz"}


def test_bos_takes_the_place_of_the_last_token(tokenizer):
    with pytest.raises(CalibrationError, match="no BOS token"):
        windows([PROSE], tokenizer, 64, bos=True)
    with_bos = AutoTokenizer.from_pretrained(demo.model_path(), bos_token="<|endoftext|>")
    result = windows([PROSE], with_bos, 64, 3, bos=True)
    assert result.shape == (3, 64)
    assert result[:, 0].tolist() == [with_bos.bos_token_id] * 3
    assert torch.equal(result[:, 1:], windows([PROSE], with_bos, 63, 3))


@pytest.mark.parametrize(
    ("dataset", "options", "message"),
    [
        ([], {}, "only 0 tokens"),
        (["a"], {}, "only 1 tokens"),
        ([[1, 2, 3]], {}, "evaluation needs text"),
        (["text"], {"seq_len": 1}, "seq_len must be at least 2"),
        (["text"], {"num_windows": 0}, "at least 1"),
        (None, {}, "no dataset given"),
    ],
)
def test_texts_that_cannot_be_used(dataset, options, message, tokenizer):
    with pytest.raises(CalibrationError, match=message):
        windows(dataset, tokenizer, **options)


# ---------- refusals ----------


class Fixed(nn.Module):
    """Gives the same logits everywhere."""

    def __init__(self, vocabulary, value=0.0, config=None):
        super().__init__()
        self.weight = nn.Parameter(torch.full((vocabulary,), value))
        self.config = config

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=self.weight.expand(*input_ids.shape, -1))


def test_uniform_logits_score_the_size_of_the_vocabulary():
    result = evaluate(Fixed(50), torch.randint(50, (3, 9)))
    assert result.perplexity == pytest.approx(50, rel=1e-6)


def test_an_overflowing_perplexity_is_infinite_and_null_in_json():
    broken = Fixed(2)
    broken.weight.data[1] = 3000.0
    result = evaluate(broken, torch.zeros(2, 4, dtype=torch.int64))
    assert result.perplexity == math.inf
    assert result.nll == pytest.approx(3000)
    assert result.to_dict()["perplexity"] is None


def test_models_that_cannot_be_scored(model):
    text = torch.ones(2, 8, dtype=torch.int64)
    seq2seq = T5ForConditionalGeneration(
        T5Config(vocab_size=16, d_model=8, d_kv=4, d_ff=8, num_layers=1, num_heads=2)
    )
    with pytest.raises(ModelError, match="encoder-decoder"):
        evaluate(seq2seq, text)
    with pytest.raises(ModelError, match="no logits"):
        evaluate(model.model, text)
    with pytest.raises(ModelError, match=r"513 tokens do not fit .* at most 512"):
        evaluate(model, torch.ones(1, 513, dtype=torch.int64))
    with pytest.raises(ModelError, match="vocabularies of 4 and 5"):
        evaluate(Fixed(4), text, against=Fixed(5))
    with pytest.raises(ModelError, match="not finite"):
        evaluate(Fixed(4, math.nan), text)


@pytest.mark.parametrize("shape", [(0, 4), (3, 1), (4,)])
def test_windows_of_a_wrong_shape(shape):
    with pytest.raises(CalibrationError, match="must be of shape"):
        evaluate(Fixed(4), torch.zeros(shape, dtype=torch.int64))
