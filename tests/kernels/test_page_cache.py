import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from fewbit import native

pytestmark = [
    pytest.mark.skipif(not native.available(), reason=native.unsupported_reason() or "compiled module"),
    pytest.mark.skipif(not sys.platform.startswith("linux"), reason="/proc/self/maps"),
]


def resident():
    """Bytes of files in this process's memory."""
    with open("/proc/self/status") as status:
        return next(int(line.split()[1]) * 1024 for line in status if line.startswith("RssFile"))


def test_dropped_pages_can_be_read_again(tmp_path):
    values = torch.randint(0, 1 << 30, (1 << 22,), dtype=torch.int32)  # 16 MB
    save_file({"a": values[:5].clone(), "b": values}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        mapped = file.get_tensor("b")
        total = mapped.sum()
        before = resident()
        assert native.drop_page_cache(mapped)
        assert before - resident() > 15 << 20
        assert mapped.sum() == total
        assert torch.equal(mapped, values)


def test_other_memory_is_not_dropped(tmp_path):
    values = torch.ones(1 << 20)
    assert not native.drop_page_cache(values)
    assert values.sum() == 1 << 20
    save_file({"b": values}, tmp_path / "x.safetensors")
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        mapped = file.get_tensor("b")
        assert not native.drop_page_cache(mapped.view(1024, 1024).t())
        assert not native.drop_page_cache(torch.empty(3, device="meta"))
        (tmp_path / "x.safetensors").unlink()
        assert not native.drop_page_cache(mapped)
        assert mapped.sum() == 1 << 20
