"""Uploading what was quantized, and loading it from there, against a stand-in for the Hub."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from hub_stand_in import hub
from safetensors.torch import load

import fewbit
from fewbit.verification import verify
from models import TEXT, save_tiny

# What a user would type; the endpoint is read when huggingface_hub is imported.
SCRIPT = f"""
import sys
import torch
from transformers import AutoModelForCausalLM, GPTQConfig
import fewbit

fewbit.register()
config = GPTQConfig(bits=4, group_size=16, dataset=[{TEXT[:90]!r}], model_seqlen=64)
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], quantization_config=config)
model.push_to_hub("me/tiny-4bit", max_shard_size="60KB", tags=["gptq"])
again = AutoModelForCausalLM.from_pretrained("me/tiny-4bit")
ids = torch.arange(10).view(2, 5)
with torch.no_grad():
    assert torch.equal(again(ids).logits, model(ids).logits)
model.save_pretrained("same")
"""


def test_what_is_pushed_is_what_is_saved(tmp_path):
    save_tiny(tmp_path / "model")
    with hub() as server:
        environment = {
            **{key: value for key, value in os.environ.items() if "proxy" not in key.lower()},
            "HF_ENDPOINT": server.url,
            "HF_TOKEN": "hf_of_nobody",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "PYTHONPATH": str(Path(fewbit.__file__).parents[1]),
        }
        command = [sys.executable, "-c", SCRIPT, str(tmp_path / "model")]
        done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        files = server.repositories["me/tiny-4bit"]
    assert json.loads(files["config.json"])["quantization_config"]["checkpoint_format"] == "gptq"
    assert b"- gptq" in files["README.md"]
    shards = [name for name in files if name.endswith(".safetensors")]
    assert len(shards) > 1
    index = json.loads(files["model.safetensors.index.json"])["weight_map"]
    pushed = {name: tensor for shard in shards for name, tensor in load(files[shard]).items()}
    assert pushed.keys() == index.keys()
    saved = fewbit.load(tmp_path / "same")
    assert all(torch.equal(pushed[name], tensor) for name, tensor in saved.state_dict().items())
    folder = tmp_path / "downloaded"
    folder.mkdir()
    for name, content in files.items():
        (folder / name).write_bytes(content)
    assert not verify(folder).problems
