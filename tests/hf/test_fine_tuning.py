"""docs/fine-tuning.md runs: adapters are trained beside quantized weights, and the loss falls."""

import re
from pathlib import Path

import pytest
import torch

import fewbit
from fewbit.errors import KernelError
from fewbit.hf.quantized_layers import quantized_layers
from fewbit.verification import verify

DOCS = Path(__file__).parents[2] / "docs"
BLOCKS = re.findall(r"```python\n(.*?)```", (DOCS / "fine-tuning.md").read_text(), re.DOTALL)

peft = pytest.importorskip("peft")
pytestmark = pytest.mark.slow  # trains an adapter


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The names that the page's blocks leave behind. The text to learn is fewbit's own documentation."""
    folder = tmp_path_factory.mktemp("fine-tuning")
    (folder / "notes.txt").write_text((DOCS / "guide.md").read_text() + (DOCS / "algorithm.md").read_text())
    (folder / "other.txt").write_text((DOCS / "scale.md").read_text() + (DOCS / "calibration.md").read_text())
    names = {"folder_of_run": folder}
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for code in BLOCKS:
            exec(compile(code, "docs/fine-tuning.md", "exec"), names)
            if "tensors" not in names:
                names["tensors"] = {n: t.clone() for n, t in names["model"].state_dict().items()}
    fewbit.unregister()
    return names


def test_the_loss_falls_on_text_that_was_not_learned_too(run):
    losses = run["losses"]
    assert sum(losses[-5:]) < 0.8 * sum(losses[:5])
    assert run["after"].nll < 0.9 * run["before"].nll


def test_only_the_adapter_was_trained_and_saved(run):
    assert not verify(run["folder_of_run"] / "demo-4bit").problems
    size = sum(file.stat().st_size for file in (run["folder_of_run"] / "adapter").glob("*.safetensors"))
    assert size < 500_000
    for _, layer in quantized_layers(run["model"]):
        assert all(parameter.grad is None for parameter in layer.parameters())
    state = run["model"].base_model.model.state_dict()
    for name, tensor in run["tensors"].items():
        owner, _, part = name.rpartition(".")
        now = state.get(f"{owner}.base_layer.{part}", state.get(name))
        assert torch.equal(now, tensor), name


def test_a_loaded_adapter_gives_the_same_model(run):
    with torch.no_grad():
        ids = run["held_out"][:2]
        assert torch.equal(run["again"](ids).logits, run["model"](ids).logits)


def test_merging_is_refused_with_a_reason(run):
    with pytest.raises(ValueError, match=r"Cannot merge LORA layers when the model is gptq quantized"):
        run["model"].merge_and_unload()
    with pytest.raises(ValueError, match=r"Cannot merge LORA layers when the model is gptq quantized"):
        run["again"].merge_adapter()
    layer = run["again"].base_model.model.model.layers[0].mlp.up_proj
    for safe in (False, True):
        with pytest.raises(KernelError, match=r"cannot be changed in place.*train an adapter beside it"):
            layer.merge(safe_merge=safe)


def test_merging_into_the_dequantized_model(run):
    base = fewbit.load(run["folder_of_run"] / "demo-4bit").dequantize()
    merged = peft.PeftModel.from_pretrained(base, run["folder_of_run"] / "adapter").merge_and_unload()
    with torch.no_grad():
        ids = run["held_out"][:2]
        assert torch.allclose(merged(ids).logits, run["model"].eval()(ids).logits, atol=1e-3)


def test_gradient_checkpointing_changes_no_gradient(run):
    model = run["again"].train()
    batch = run["held_out"][:2]
    found = []
    for use in (False, True):
        (model.gradient_checkpointing_enable if use else model.gradient_checkpointing_disable)()
        model.enable_input_require_grads()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        model.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        found.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert len(found[0]) == 2 * 4 * 7
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
