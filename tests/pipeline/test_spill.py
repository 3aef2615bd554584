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
from fewbit.pipeline import offload as spilling
from fewbit.pipeline import offload_slots as places
from fewbit.pipeline import quantize_layers as running
from fewbit.pipeline.memory import ActivationBudget
from fewbit.pipeline.offload import NoOffload, Offloader, make_offloader
from fewbit.pipeline.offload_slots import File, HostMemory
from fewbit.profiling import Profiler
from models import random_sequences, save_tiny, tiny_model, tiny_tokenizer

SMALL = {"group_size": 16, "seq_len": 24}


@pytest.fixture
def everything(monkeypatch):
    """However small, it goes to disk."""
    monkeypatch.setattr(spilling, "_SMALLEST", 1)


@pytest.fixture
def spill(tmp_path, everything):
    spill = Offloader(File(tmp_path), Profiler())
    with spill:
        yield spill


def on_other_devices(monkeypatch):
    """Take the CPU's memory for that of a device, to which kernels are given addresses."""
    for module in (spilling, places):
        monkeypatch.setattr(module, "is_on_cpu", lambda storage: False)


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
        ("llama", {"tune": True, "tune_steps": 3}),
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
def test_a_run_that_was_stopped_goes_on_to_the_same_files_and_leaves_nothing(error, tmp_path, everything):
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


def test_tensors_of_a_paused_job_give_their_memory_back_and_get_it_again(spill):
    with spill.running(0):
        x = torch.arange(1000.0)
        y = x * 2
        rows, version = y.view(10, 100)[3:], y._version
    assert bytes_of(x) == bytes_of(y) == bytes_of(rows) == 0
    assert torch.equal(rows[0], torch.arange(600.0, 800.0, 2))
    assert y._version == version
    assert rows.data_ptr() == y.data_ptr() + 300 * 4
    assert bytes_of(x) == 0  # nobody asked for it
    assert (spill.written, spill.read, spill.peak) == (8000, 4000, 8000)


def test_only_what_was_changed_is_written_again(spill):
    with spill.running(0):
        x, y = torch.zeros(1000), torch.ones(1000)
    with spill.running(0):
        (x + y).sum()
    assert spill.written == 8000
    with spill.running(0):
        x.view(10, 100)[2].add_(1)
        (y + 1).sum()
    assert spill.written == 12000
    assert spill.peak == 8000
    assert float(x.sum()) == 100


def test_places_in_the_file_are_used_again(spill):
    for _ in range(5):
        with spill.running(0):
            x = torch.ones(1000)
        assert bytes_of(x) == 0
        del x
    assert (spill.written, spill.peak) == (20000, 4000)


def test_whoever_goes_through_all_jobs_holds_few_of_them(spill):
    tensors = []
    for job in range(40):
        with spill.running(job):
            tensors.append(torch.full((1000,), float(job)))
    assert [float(x.sum()) for x in tensors] == [1000.0 * job for job in range(40)]
    assert sum(bytes_of(x) > 0 for x in tensors) <= 8
    with spill.running(0):
        pass
    assert sum(bytes_of(x) for x in tensors) == 0


def test_what_is_not_of_the_job_stays(spill):
    weight = nn.Parameter(torch.randn(100, 100))
    with spill.running(0):
        with spill.paused():
            read = torch.ones(100, 100) * 3
        view, made = weight.T, weight.T @ read
    outside = torch.ones(100) * 2
    kept = (weight, read, view, outside)
    assert all(bytes_of(x) > 0 for x in kept)
    assert bytes_of(made) == 0


def test_memory_that_was_given_to_numpy_stays(spill):
    with spill.running(0):
        x = torch.arange(100.0) + 1
        array = x.numpy()
    assert bytes_of(x) == 400
    assert array.sum() == 5050


def test_what_outlives_the_walk_is_complete_again(tmp_path, everything):
    spill, made = Offloader(File(tmp_path), Profiler()), []

    def stop_midway():
        with spill:
            with spill.running(0):
                made.append(torch.arange(1000.0))
            assert bytes_of(made[0]) == 0
            raise StopError

    with pytest.raises(StopError):
        stop_midway()
    assert made[0][7] == 7
    assert is_clean(tmp_path)


def test_on_other_devices_a_job_gets_everything_back_before_it_runs(tmp_path, everything, monkeypatch):
    on_other_devices(monkeypatch)
    spill = Offloader(File(tmp_path), Profiler())
    with spill:
        with spill.running(0):
            x = torch.arange(1000.0)
        with spill.running(1):
            assert bytes_of(x) == 0
        with spill.running(0):
            assert bytes_of(x) == 4000
            x.numpy()[:] = 5  # behind torch's back
    assert spill.written == 4000
    assert x[0] == 5


def test_small_tensors_are_not_worth_it(tmp_path):
    spill = Offloader(File(tmp_path), Profiler())
    with spill, spill.running(0):
        small, large = torch.zeros(1000), torch.zeros(100_000)
    assert spill.written == bytes_of(large) > bytes_of(small)


def test_without_a_folder_no_operation_is_watched():
    spill = make_offloader(None, Profiler())
    with spill, spill.running(0), spill.paused():
        x = torch.zeros(100_000)
        assert not torch.utils._python_dispatch._get_current_dispatch_mode_stack()
    assert type(spill) is NoOffload
    assert bytes_of(x)
    assert spill.notes() == []


@pytest.mark.parametrize("kind", ["missing", "file"])
def test_a_folder_that_cannot_be_used_is_refused_before_any_work(kind, tmp_path):
    folder = tmp_path / kind
    if kind == "file":
        folder.write_text("")
    with pytest.raises(OutputError, match=rf"{kind}: .*Create the folder, make it writable, or name another"):
        fewbit.quantize(tmp_path / "no model", dataset=["a"], output=tmp_path / "out", offload_dir=folder)


def test_a_full_disk(tmp_path, everything):
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


def filled(spill, jobs, count=1000):
    """One tensor of `count` floats made by each job."""
    made = []
    for job in range(jobs):
        with spill.running(job):
            made.append(torch.full((count,), float(job)))
    return made


def test_those_that_a_device_has_room_for_stay(device):
    spill = Offloader(HostMemory(pinned=False), Profiler(), budget=8000)
    with spill:
        tensors = filled(spill, 4)
        assert [bytes_of(x) for x in tensors] == [4000, 4000, 0, 0]
        for job in range(4):
            with spill.running(job):
                assert float(tensors[job].sum()) == 1000 * job
        assert [bytes_of(x) for x in tensors] == [4000, 4000, 0, 0]
        assert (spill.written, spill.read, spill.peak) == (16000, 8000, 8000)
        with spill.running(0):
            del tensors[0]
        with spill.running(2):
            pass  # there is room for it now
        assert [bytes_of(x) for x in tensors] == [4000, 4000, 0]
    assert [float(x[0]) for x in tensors] == [1, 2, 3]
    assert "on the device were kept in host memory: 16" in spill.notes()[0]


def test_a_job_that_grows_gives_way_itself(device):
    spill = Offloader(HostMemory(pinned=False), Profiler(), budget=12000)
    with spill:
        tensors = filled(spill, 3)
        with spill.running(1):
            grown = torch.ones(500)
        assert [bytes_of(x) for x in (*tensors, grown)] == [4000, 0, 4000, 2000]
        with spill.running(1):
            assert bytes_of(tensors[1]) == 4000


def test_whoever_goes_through_all_jobs_writes_nothing_again(device):
    spill = Offloader(HostMemory(pinned=False), Profiler(), budget=8000)
    with spill:
        tensors = filled(spill, 40)
        assert spill.written == 38 * 4000
        for _ in range(2):
            assert [float(x.sum()) for x in tensors] == [1000.0 * job for job in range(40)]
        assert sum(bytes_of(x) > 0 for x in tensors) <= 10
        assert bytes_of(tensors[0]) == bytes_of(tensors[1]) == 4000
        with spill.running(0):
            pass
        assert sum(bytes_of(x) > 0 for x in tensors) == 2
        assert spill.written == 38 * 4000


def test_what_a_job_changed_behind_torch_is_kept(device):
    spill = Offloader(HostMemory(pinned=False), Profiler())
    with spill:
        [x] = filled(spill, 1)
        with spill.running(0):
            ctypes.memset(x.data_ptr(), 0, 2000)
        assert float(x.sum()) == 0
        assert spill.written == 8000


def test_host_memory_of_what_died_is_used_again(device):
    store = HostMemory(pinned=False)
    spill = Offloader(store, Profiler())
    with spill:
        for _ in range(5):
            [x] = filled(spill, 1)
            assert bytes_of(x) == 0
            del x
    assert (spill.written, spill.peak) == (20000, 4000)


def test_host_memory_does_not_take_what_is_there_already(everything):
    spill = Offloader(HostMemory(pinned=False), Profiler())
    with spill:
        [x] = filled(spill, 1)
        assert bytes_of(x) == 4000
    assert spill.notes() == []


def test_too_little_host_memory(device, monkeypatch):
    def refuse(*arguments, **options):
        if options.get("pin_memory"):
            raise RuntimeError("CUDA error: out of memory\nand more")
        return torch.zeros(*arguments, **options)

    monkeypatch.setattr(places.torch, "empty", refuse)
    spill = Offloader(HostMemory(pinned=True), Profiler())
    with (
        spill,
        pytest.raises(CalibrationError, match=r"neither .* out of memory\. Use fewer .*\(--offload-dir"),
    ):
        filled(spill, 1)


@pytest.mark.parametrize(
    ("family", "options", "budget"),
    [
        ("llama", {"tune": True, "tune_steps": 3}, 60_000),
        ("t5", {"fast": True}, 0),
        ("mixtral", {}, 60_000),
    ],
)
def test_with_little_room_on_a_device_the_result_is_the_same(family, options, budget, device, monkeypatch):
    expected, plain = quantized(family, None, **options)
    assert not any("host memory" in note for note in plain.notes)
    monkeypatch.setattr(
        running, "activation_budget", lambda *_, **__: ActivationBudget(budget, 10**9, pinned=False)
    )
    state, report = quantized(family, None, **options)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert any("were kept in host memory" in note for note in report.notes)


def test_a_folder_takes_what_a_device_has_no_room_for(tmp_path, device, monkeypatch):
    expected, _ = quantized("llama", None)
    monkeypatch.setattr(
        running, "activation_budget", lambda *_, **__: ActivationBudget(60_000, 10**9, pinned=False)
    )
    state, report = quantized("llama", tmp_path)
    assert all(torch.equal(state[key], expected[key]) for key in expected)
    assert any("that had no room on the device were kept on disk" in note for note in report.notes)
    assert is_clean(tmp_path)


def test_where_all_have_room_nobody_watches():
    assert type(make_offloader(None, Profiler(), ActivationBudget(1000, 1000, pinned=False))) is NoOffload
    assert type(make_offloader(None, Profiler(), ActivationBudget(1000, 1001, pinned=False))) is Offloader


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("kind", ["host", "disk"])
def test_on_a_gpu(kind, tmp_path, everything, monkeypatch):
    def run(room):
        monkeypatch.setattr(running, "activation_budget", lambda *_, **__: room)
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


def test_memory_holds_the_activations_of_one_batch(tmp_path):
    process = subprocess.run(
        [sys.executable, "-c", PEAK, str(tmp_path)], capture_output=True, text=True, timeout=120, check=True
    )
    widest = 64 * 512 * (1024 + 256) * 4  # at down_proj: its input and the residual
    assert int(process.stdout) < 0.4 * widest
