"""What is left: of the machine, of a control group, of the address space, of a disk."""

import resource
import shutil

import torch

from fewbit import resources
from fewbit.resources import device_left, disk_left, existing, memory_left


def test_the_tightest_limit_counts(monkeypatch, tmp_path):
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 2000 kB\nMemAvailable:     1000 kB\n")
    monkeypatch.setattr(resources, "_MEMINFO", meminfo)
    monkeypatch.setattr(resources, "_OWN_CGROUP", tmp_path / "none")
    left = memory_left()
    assert (left.bytes, left.name) == (1024000, "available on this machine")


def test_a_control_group_and_those_around_it(monkeypatch, tmp_path):
    own = tmp_path / "own"
    own.write_text("0::/batch/job\n")
    job = tmp_path / "batch" / "job"
    job.mkdir(parents=True)
    (job / "memory.max").write_text("max\n")
    (job / "memory.current").write_text("10\n")
    (job.parent / "memory.max").write_text("5000\n")
    (job.parent / "memory.current").write_text("3000\n")
    (job.parent / "memory.stat").write_text("anon 1\ninactive_file 400\n")
    monkeypatch.setattr(resources, "_OWN_CGROUP", own)
    monkeypatch.setattr(resources, "_CGROUPS", tmp_path)
    left = memory_left()
    assert left.bytes == 5000 - 3000 + 400
    assert "memory.max" in left.name


def test_a_limited_address_space(monkeypatch):
    used = int(resources._STATM.read_text().split()[0]) * resource.getpagesize()
    monkeypatch.setattr(resource, "getrlimit", lambda what: (used + 10**6, resource.RLIM_INFINITY))
    left = memory_left()
    assert left.bytes <= 10**6
    assert "ulimit -v" in left.name


def test_disk_of_a_folder_that_is_not_there_yet(tmp_path):
    assert existing(tmp_path / "a" / "b") == tmp_path
    left = disk_left(tmp_path / "a" / "b")
    assert abs(left.bytes - shutil.disk_usage(tmp_path).free) < 10**9
    assert str(tmp_path) in left.name


def test_the_cpu_has_no_memory_of_its_own():
    assert device_left(torch.device("cpu")) is None
