"""Code that comes with a model runs only if the user allows it: neither Python files nor pickles, in any command."""

import builtins
import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import fewbit
from fewbit.cli.main import app
from fewbit.errors import FewbitError
from models import VOCAB, save_tiny, tiny_tokenizer
from tiny_gptq import llama, write_checkpoint

CODE = """
import pathlib
pathlib.Path({trace!r}).touch()
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
class Config(LlamaConfig):
    model_type = "foreign"
class Model(LlamaForCausalLM):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""
AUTO_MAP = {
    "AutoConfig": "foreign.Config",
    "AutoModelForCausalLM": "foreign.Model",
    "AutoModel": "foreign.Model",
}


class Running:
    """An object whose unpickling leaves a trace."""

    def __init__(self, trace):
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (str(self.trace),)


@pytest.fixture
def trace(tmp_path, monkeypatch):
    """A path that exists once foreign code has run. Asking the user is not allowed either."""
    monkeypatch.setattr(builtins, "input", lambda *_: pytest.fail("a question was asked"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.syspath_prepend(str(tmp_path / "modules"))
    return tmp_path / "trace"


def bring_code(folder, trace, model_type):
    """Let the folder's configuration and tokenizer name their own code."""
    (folder / "foreign.py").write_text(CODE.format(trace=str(trace)))
    path = folder / "config.json"
    values = {**json.loads(path.read_text()), "auto_map": AUTO_MAP, "model_type": model_type}
    path.write_text(json.dumps(values | ({} if model_type == "llama" else {"architectures": ["Model"]})))
    path = folder / "tokenizer_config.json"
    values = {"auto_map": {"AutoTokenizer": [None, "foreign.Tokenizer"]}}
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def bring_pickles(folder, trace, instead):
    """Put pickles that run code beside the weights, or replace the weights by them."""
    if instead:
        for path in folder.glob("*.safetensors*"):
            path.unlink()
    for name in ("pytorch_model.bin", "model.pt", "training_args.bin", "scheduler.pth"):
        if instead and name == "model.pt":
            continue
        torch.save({"model.norm.weight": Running(trace)}, folder / name)
    return folder


@pytest.fixture
def original(tmp_path):
    return save_tiny(tmp_path / "original", "llama", num_hidden_layers=1)


@pytest.fixture
def quantized(tmp_path):
    write_checkpoint(tmp_path / "quantized", llama(vocab_size=VOCAB))
    tiny_tokenizer().save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


SMALL = ("--group-size", "16", "--seq-len", "32", "--num-samples", "2")
EVAL = ("--dataset", "{text}", "--seq-len", "32", "--num-samples", "1", "--device", "cpu", "-q")
WAYS = {
    "quantize": ("quantize", "{original}", "-o", "{new}", "--dataset", "{text}", *SMALL),
    "quantize, eval": ("quantize", "{original}", "-o", "{new}", "--dataset", "{text}", "--eval", "{text}", *SMALL),
    "eval the original": ("eval", "{original}", *EVAL),
    "eval": ("eval", "{quantized}", *EVAL),
    "eval against": ("eval", "{quantized}", "--against", "{original}", *EVAL),
    "inspect": ("inspect", "{quantized}"),
    "verify": ("verify", "{quantized}"),
    "verify against": ("verify", "{quantized}", "--against", "{original}"),
    "convert": ("convert", "{quantized}", "-o", "{new}", "--format", "gptq_v2"),
    "generate": ("generate", "{quantized}", "-p", "a", "--max-new-tokens", "2", "--device", "cpu"),
    "load": None,
    "through transformers": None,
}  # fmt: skip


def go(way, original, quantized, new, text, *more):
    """Run one command or function. Returns its error message, or an empty text."""
    if way == "load":
        return _error(lambda: fewbit.load(quantized, trust_remote_code=bool(more)))
    if way == "through transformers":
        fewbit.register()
        builtins.input = lambda *_: "n"  # transformers itself asks; the fixture puts it back
        try:
            options = {"trust_remote_code": True} if more else {}
            return _error(lambda: AutoModelForCausalLM.from_pretrained(quantized, **options))
        finally:
            fewbit.unregister()
    arguments = [a.format(original=original, quantized=quantized, new=new, text=text) for a in WAYS[way]]
    result = CliRunner().invoke(app, [*arguments, *more])
    if result.exception is not None and not isinstance(result.exception, (SystemExit, FewbitError)):
        raise result.exception
    return str(result.exception) if isinstance(result.exception, FewbitError) else ""


def _error(call):
    try:
        call()
    except (FewbitError, ValueError) as error:  # ValueError: transformers' own refusal
        return str(error)
    return ""


@pytest.mark.parametrize("model_type", ["llama", "foreign"])
@pytest.mark.parametrize("way", WAYS)
def test_a_models_own_code_does_not_run(tmp_path, trace, text_file, original, quantized, way, model_type):
    for folder in (original, quantized):
        bring_code(folder, trace, model_type)
    error = go(way, original, quantized, tmp_path / "new", text_file)
    assert not trace.exists()
    if way not in ("inspect", "verify", "verify against", "convert"):  # these need no code
        assert (model_type == "foreign") == bool(error), error
        assert not error or "trust" in error


@pytest.mark.parametrize("way", ["quantize", "eval", "generate", "load", "through transformers"])
def test_trusted_code_runs(tmp_path, trace, text_file, original, quantized, way):
    for folder in (original, quantized):
        bring_code(folder, trace, "foreign")
    go(way, original, quantized, tmp_path / "new", text_file, "--trust-remote-code")
    assert trace.exists()


@pytest.mark.parametrize("instead", [False, True])
@pytest.mark.parametrize("way", WAYS)
def test_pickles_are_not_opened(tmp_path, trace, text_file, original, quantized, way, instead):
    for folder in (original, quantized):
        bring_pickles(folder, trace, instead)
    error = go(way, original, quantized, tmp_path / "new", text_file)
    assert not trace.exists()
    if instead and way != "verify":
        assert "pickle" in error
        assert "allow-pickle" in error
    else:
        assert not error


@pytest.mark.parametrize("way", ["quantize", "convert"])
def test_allowed_pickles_cannot_run_code(tmp_path, trace, text_file, original, quantized, way):
    for folder in (original, quantized):
        for path in bring_pickles(folder, trace, instead=True).glob("*.pth"):
            path.unlink()
    error = go(way, original, quantized, tmp_path / "new", text_file, "--allow-pickle")
    assert not trace.exists()
    assert error


@pytest.mark.parametrize("name", ["text.pt", "text.pkl", "text.bin", "text.npy", "text.py"])
def test_calibration_text_is_never_executed(tmp_path, trace, original, name):
    path = tmp_path / name
    if name.endswith(".py"):
        path.write_text(f"import os; os.mkdir({str(trace)!r})")
    else:
        torch.save([Running(trace)], path)
    with pytest.raises(FewbitError, match=name):
        fewbit.quantize(original, dataset=str(path), output=tmp_path / "new")
    assert not trace.exists()


def test_the_trace_appears_when_code_runs(tmp_path, trace):
    torch.save(Running(trace), tmp_path / "x.pt")
    torch.load(tmp_path / "x.pt", weights_only=False)
    assert trace.exists()
