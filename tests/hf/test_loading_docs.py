"""Every block of docs/loading.md runs and leaves what it says."""

import inspect

import torch
from transformers import GPTQConfig

import fewbit
from docs_runner import DOCS, prepare, run
from fewbit.kernels import registry
from fewbit.verification import verify

PAGE = (DOCS / "loading.md").read_text()


def test_the_page_runs(tmp_path, monkeypatch):
    prepare(tmp_path)
    fewbit.quantize(str(tmp_path / "my-model"), fewbit.QuantConfig(method="rtn"), output=tmp_path / "out")
    monkeypatch.chdir(tmp_path)
    run(DOCS / "loading.md")
    for name in ("out", "copy", "my-model-4bit"):
        assert not verify(tmp_path / name).problems
    ours, theirs = fewbit.load("out").state_dict(), fewbit.load("copy").state_dict()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_every_kernel_is_listed():
    section = PAGE.partition("## Kernels")[2].partition("## Limits")[0]
    for name in registry.names():
        assert f"`{name}`" in section or f"`{name.replace('lamav2', 'lama_v2')}`" in section, name


def test_no_argument_of_transformers_is_left_out():
    arguments = inspect.signature(GPTQConfig).parameters.keys() - {"kwargs"}
    table = PAGE.partition("| argument of `GPTQConfig`")[2]
    assert all(f"`{argument}" in table for argument in arguments)
