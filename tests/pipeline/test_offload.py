"""Activations on disk: the same result, less memory, and nothing left behind."""

import ctypes
import gc
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_weights import EXPERTS
from torch import nn

import fewbit
from fewbit.errors import CalibrationError, OutputError
from fewbit.pipeline import offload, quantize_layers
from fewbit.pipeline.memory import ActivationBudget
from fewbit.pipeline.offload import DiskStore, HostStore, NoOffload, Offloader, make_offloader
from fewbit.profiling import Profiler
from models import random_sequences, save_tiny, tiny_model, tiny_tokenizer

SMALL = {"group_size": 16, "seq_len": 24}


@pytest.fixture
def everything(monkeypatch):
    """However small, it goes to disk."""
    monkeypatch.setattr(offload, "_SMALLEST", 1)


@pytest.fixture
def offloader(tmp_path, everything):
    offloader = Offloader(DiskStore(tmp_path), Profiler())
    with offloader:
        yield offloader


def on_other_devices(monkeypatch):
    """Take the CPU's memory for that of a device, to which kernels are given addresses."""
    monkeypatch.setattr(offload, "is_on_cpu", lambda storage: False)


def bytes_of(tensor):
    return tensor.untyped_storage().nbytes()


def is_clean(folder):
    """Whether `folder` is empty and this process has no file in it open, not even a deleted one."""
    links = []
    for name in os.listdir("/proc/self/fd"):
        link = Path("/proc/self/fd", name)
        if link.is_symlink() and os.path.lexists(link):
            links.append(os.readlink(link))
    return not any(folder.iterdir()) and not any(link.startswith(str(folder)) for link in links)


def quantized(family, folder, **options):
    config = fewbit.QuantConfig(**{**SMALL, **options})
    model = fewbit.quantize(
        tiny_model(family, **(EXPERTS if family == "mixtral" else {})),
        config,
        dataset=random_sequences(6),
        tokenizer=tiny_tokenizer(),
        offload_dir=folder,
    )
    return model.state_dict(), model.fewbit_report


@pytest.mark.parametrize(
    ("family", "options"),
    [
        ("llama", {}),
        pytest.param("llama", {"tune": True, "tune_steps": 3}, marks=pytest.mark.slow),
        ("llama", {"fast": True, "batch_size": 4}),
        ("gpt2", {"correction": 0.5}),
        ("t5", {}),
        ("t5", {"fast": True}),
        ("falcon", {}),
    ],
)
def test_the_result_is_the_same(family, options, tmp_path, everything):
    expected, plain = quantized(family, None, **options)
    state, report = quantized(family, tmp_path, **options)
    assert state.keys() == expected.keys()
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    for layer, other in zip(report.layers, plain.layers, strict=True):
        assert {**layer, "seconds": 0} == {**other, "seconds": 0}
    assert any("on disk" in note and "written" in note for note in report.notes)
    assert "offload" in {phase["name"] for phase in report.phases}
    assert "offload" not in {phase["name"] for phase in plain.phases}
    assert is_clean(tmp_path)


class StopError(Exception):
    pass


def stop_after(count, error):
    calls = []

    def progress(phase, done, total):
        calls.append(done)
        if len(calls) == count:
            raise error

    return progress


@pytest.mark.parametrize("error", [StopError, KeyboardInterrupt])
def test_stopped_run_resumes_to_the_same_files(error, tmp_path, everything):
    folder, scratch = save_tiny(tmp_path / "model"), tmp_path / "scratch"
    scratch.mkdir()
    config, text = fewbit.QuantConfig(**SMALL), random_sequences(6)
    fewbit.quantize(folder, config, dataset=text, output=tmp_path / "plain")
    arguments = {"dataset": text, "output": tmp_path / "out", "offload_dir": scratch}
    with pytest.raises(error):
        fewbit.quantize(folder, config, **arguments, progress=stop_after(9, error))
    gc.collect()
    assert is_clean(scratch)
    report = fewbit.quantize(folder, config, **arguments)
    assert report.resumed_layers == 7
    assert is_clean(scratch)
    names = {path.name for path in (tmp_path / "plain").iterdir()} - {
        "fewbit_report.json",
        "fewbit_report.html",
    }
    assert "model.safetensors" in names
    for name in names - {"README.md"}:
        assert (tmp_path / "plain" / name).read_bytes() == (tmp_path / "out" / name).read_bytes(), name


def test_paused_tensors_are_evicted_and_restored(offloader):
    with offloader.running(0):
        x = torch.arange(1000.0)
        y = x * 2
        rows, version = y.view(10, 100)[3:], y._version
    assert bytes_of(x) == bytes_of(y) == bytes_of(rows) == 0
    assert torch.equal(rows[0], torch.arange(600.0, 800.0, 2))
    assert y._version == version
    assert rows.data_ptr() == y.data_ptr() + 300 * 4
    assert bytes_of(x) == 0  # nobody asked for it
    assert (offloader.written, offloader.read, offloader._store.size) == (8000, 4000, 8000)


def test_only_changed_tensors_are_written_again(offloader):
    with offloader.running(0):
        x, y = torch.zeros(1000), torch.ones(1000)
    with offloader.running(0):
        (x + y).sum()
    assert offloader.written == 8000
    with offloader.running(0):
        x.view(10, 100)[2].add_(1)
        (y + 1).sum()
    assert offloader.written == 12000
    assert offloader._store.size == 8000
    assert float(x.sum()) == 100


def test_slots_are_used_again(offloader):
    for _ in range(5):
        with offloader.running(0):
            x = torch.ones(1000)
        assert bytes_of(x) == 0
        del x
    assert (offloader.written, offloader._store.size) == (20000, 4000)


def test_reading_all_jobs_keeps_few_resident(offloader):
    tensors = []
    for job in range(40):
        with offloader.running(job):
            tensors.append(torch.full((1000,), float(job)))
    assert [float(x.sum()) for x in tensors] == [1000.0 * job for job in range(40)]
    assert sum(bytes_of(x) > 0 for x in tensors) <= 8
    with offloader.running(0):
        pass
    assert sum(bytes_of(x) for x in tensors) == 0


def test_other_tensors_stay(offloader):
    weight = nn.Parameter(torch.randn(100, 100))
    with offloader.running(0):
        with offloader.paused():
            read = torch.ones(100, 100) * 3
        view, made = weight.T, weight.T @ read
    outside = torch.ones(100) * 2
    kept = (weight, read, view, outside)
    assert all(bytes_of(x) > 0 for x in kept)
    assert bytes_of(made) == 0


def test_memory_shared_with_numpy_stays(offloader):
    with offloader.running(0):
        x = torch.arange(100.0) + 1
        array = x.numpy()
    assert bytes_of(x) == 400
    assert array.sum() == 5050


def test_survivors_are_restored_at_the_end(tmp_path, everything):
    offloader, made = Offloader(DiskStore(tmp_path), Profiler()), []

    def stop_midway():
        with offloader:
            with offloader.running(0):
                made.append(torch.arange(1000.0))
            assert bytes_of(made[0]) == 0
            raise StopError

    with pytest.raises(StopError):
        stop_midway()
    assert made[0][7] == 7
    assert is_clean(tmp_path)


def test_device_job_is_restored_before_it_runs(tmp_path, everything, monkeypatch):
    on_other_devices(monkeypatch)
    offloader = Offloader(DiskStore(tmp_path), Profiler())
    with offloader:
        with offloader.running(0):
            x = torch.arange(1000.0)
        with offloader.running(1):
            assert bytes_of(x) == 0
        with offloader.running(0):
            assert bytes_of(x) == 4000
            x.numpy()[:] = 5  # behind torch's back
    assert offloader.written == 4000
    assert x[0] == 5


def test_small_tensors_stay(tmp_path):
    offloader = Offloader(DiskStore(tmp_path), Profiler())
    with offloader, offloader.running(0):
        small, large = torch.zeros(1000), torch.zeros(100_000)
    assert offloader.written == bytes_of(large) > bytes_of(small)


def test_no_offload_without_a_folder():
    offloader = make_offloader(None, Profiler())
    with offloader, offloader.running(0), offloader.paused():
        x = torch.zeros(100_000)
        assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert type(offloader) is NoOffload
    assert bytes_of(x)
    assert offloader.notes() == []


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_unusable_folder_is_refused_before_any_work(kind, tmp_path):
    folder = tmp_path / kind
    if kind == "file":
        folder.write_text("")
    with pytest.raises(OutputError, match=rf"{kind}: .*Create the folder, make it writable, or name another"):
        fewbit.quantize(tmp_path / "no model", dataset=["a"], output=tmp_path / "out", offload_dir=folder)


def test_full_disk(tmp_path, everything):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(
            OutputError, match=r"cannot be written to .* after .* kB\. Name a folder with more space"
        ):
            quantized("llama", tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    gc.collect()
    assert is_clean(tmp_path)


@pytest.fixture
def device(monkeypatch, everything):
    on_other_devices(monkeypatch)


def filled(offloader, jobs, count=1000):
    """One tensor of `count` floats made by each job."""
    made = []
    for job in range(jobs):
        with offloader.running(job):
            made.append(torch.full((count,), float(job)))
    return made


def test_tensors_within_the_budget_stay(device):
    offloader = Offloader(HostStore(pinned=False), Profiler(), budget=8000)
    with offloader:
        tensors = filled(offloader, 4)
        assert [bytes_of(x) for x in tensors] == [4000, 4000, 0, 0]
        for job in range(4):
            with offloader.running(job):
                assert float(tensors[job].sum()) == 1000 * job
        assert [bytes_of(x) for x in tensors] == [4000, 4000, 0, 0]
        assert (offloader.written, offloader.read, offloader._store.size) == (16000, 8000, 8000)
        with offloader.running(0):
            del tensors[0]
        with offloader.running(2):
            pass  # there is room for it now
        assert [bytes_of(x) for x in tensors] == [4000, 4000, 0]
    assert [float(x[0]) for x in tensors] == [1, 2, 3]
    assert "on the device were kept in host memory: 16" in offloader.notes()[0]


def test_growing_job_is_evicted_itself(device):
    offloader = Offloader(HostStore(pinned=False), Profiler(), budget=12000)
    with offloader:
        tensors = filled(offloader, 3)
        with offloader.running(1):
            grown = torch.ones(500)
        assert [bytes_of(x) for x in (*tensors, grown)] == [4000, 4000, 4000, 0]
        with offloader.running(1):
            assert bytes_of(grown) == 2000


def test_reading_all_jobs_writes_nothing_again(device):
    offloader = Offloader(HostStore(pinned=False), Profiler(), budget=8000)
    with offloader:
        tensors = filled(offloader, 40)
        assert offloader.written == 38 * 4000
        for _ in range(2):
            assert [float(x.sum()) for x in tensors] == [1000.0 * job for job in range(40)]
        assert sum(bytes_of(x) > 0 for x in tensors) <= 10
        assert bytes_of(tensors[0]) == bytes_of(tensors[1]) == 4000
        with offloader.running(0):
            pass
        assert sum(bytes_of(x) > 0 for x in tensors) == 2
        assert offloader.written == 38 * 4000


def test_changes_unseen_by_torch_are_kept(device):
    offloader = Offloader(HostStore(pinned=False), Profiler())
    with offloader:
        [x] = filled(offloader, 1)
        with offloader.running(0):
            ctypes.memset(x.data_ptr(), 0, 2000)
        assert float(x.sum()) == 0
        assert offloader.written == 8000


def test_released_host_memory_is_not_counted(device):
    store = HostStore(pinned=False)
    offloader = Offloader(store, Profiler())
    with offloader:
        for _ in range(5):
            [x] = filled(offloader, 1)
            assert bytes_of(x) == 0
            del x
    assert (offloader.written, offloader._store.size) == (20000, 4000)


def test_host_store_rejects_cpu_tensors(everything):
    offloader = Offloader(HostStore(pinned=False), Profiler())
    with offloader:
        [x] = filled(offloader, 1)
        assert bytes_of(x) == 4000
    assert offloader.notes() == []


def test_too_little_host_memory(device, monkeypatch):
    def refuse(*arguments, **options):
        if options.get("pin_memory"):
            raise RuntimeError("CUDA error: out of memory\nand more")
        return torch.zeros(*arguments, **options)

    monkeypatch.setattr(offload.torch, "empty", refuse)
    offloader = Offloader(HostStore(pinned=True), Profiler())
    with (
        offloader,
        pytest.raises(CalibrationError, match=r"neither .* out of memory\. Use fewer .*\(--offload-dir"),
    ):
        filled(offloader, 1)


@pytest.mark.parametrize(
    ("family", "options", "budget"),
    [
        ("llama", {"tune": True, "tune_steps": 3}, 60_000),
        ("t5", {"fast": True}, 0),
        ("mixtral", {}, 60_000),
    ],
)
def test_same_result_with_little_device_memory(family, options, budget, device, monkeypatch):
    expected, plain = quantized(family, None, **options)
    assert not any("host memory" in note for note in plain.notes)
    monkeypatch.setattr(
        quantize_layers, "activation_budget", lambda *_, **__: ActivationBudget(budget, 10**9, pinned=False)
    )
    state, report = quantized(family, None, **options)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert any("were kept in host memory" in note for note in report.notes)


def test_folder_takes_the_excess_of_a_device(tmp_path, device, monkeypatch):
    expected, _ = quantized("llama", None)
    monkeypatch.setattr(
        quantize_layers, "activation_budget", lambda *_, **__: ActivationBudget(60_000, 10**9, pinned=False)
    )
    state, report = quantized("llama", tmp_path)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert any("that had no room on the device were kept on disk" in note for note in report.notes)
    assert is_clean(tmp_path)


def test_no_offload_if_everything_fits():
    assert type(make_offloader(None, Profiler(), ActivationBudget(1000, 1000, pinned=False))) is NoOffload
    assert type(make_offloader(None, Profiler(), ActivationBudget(1000, 1001, pinned=False))) is Offloader


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["host", "disk"])
def test_on_a_gpu(kind, tmp_path, everything, monkeypatch):
    def run(room):
        monkeypatch.setattr(quantize_layers, "activation_budget", lambda *_, **__: room)
        folder = tmp_path if kind == "disk" and room else None
        model = tiny_model("llama").cuda()
        config = fewbit.QuantConfig(**SMALL)
        text = random_sequences(6)
        model = fewbit.quantize(model, config, dataset=text, tokenizer=tiny_tokenizer(), offload_dir=folder)
        return model.state_dict(), model.fewbit_report.notes

    expected, _ = run(None)
    for budget in (0, 60_000):
        state, notes = run(ActivationBudget(budget, 10**9, pinned=True))
        assert all(torch.equal(state[key], expected[key]) for key in expected)
        assert any({"host": "host memory", "disk": "on disk"}[kind] in note for note in notes)


PEAK = """
import resource, sys, torch, fewbit
from transformers import LlamaConfig, LlamaForCausalLM

def quantize(**options):
    shape = dict(hidden_size=256, intermediate_size=1024, num_attention_heads=4, vocab_size=256)
    model = LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=1)).eval()
    fewbit.quantize(model, fewbit.QuantConfig(fast=True, **options), dataset=tokens, offload_dir=sys.argv[1])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

tokens = [{"input_ids": torch.randint(256, (512,))} for _ in range(64)]
before = quantize(num_samples=2)  # what libraries and solver need anyway
print(quantize(num_samples=64) - before)
"""


@pytest.mark.slow
def test_peak_memory_is_one_batch(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    widest = 64 * 512 * (1024 + 256) * 4  # at down_proj: its input and the residual
    assert int(process.stdout) < 0.4 * widest
