"""Every compiled version of every kernel against the torch path, and what is said where there is none."""

import importlib

import pytest
import torch

from fewbit import native
from fewbit.gptq import grid
from fewbit.gptq.backends import TORCH, select
from fewbit.gptq.gptq import round_block

ISAS = [name for name in native.instruction_sets() if name != "avx512_bf16"]
needs_module = pytest.mark.skipif(not native.available(), reason=native.unsupported_reason())


@needs_module
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("sym", [True, False])
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_grid_search_finds_the_same_grids(bits, sym, isa):
    torch.manual_seed(0)
    m, n = 37, 100
    W, D = torch.randn(m, n), torch.rand(n) + 0.1
    W[5, 32:64] = 0
    starts = torch.tensor([0, 32, 64, 96, 100])
    lists = grid.candidates(bits, sym)
    with native.instruction_set(isa):
        s, z = native.fit_grid(W, D, starts.int(), lists.coarse, lists.fine, lists.offsets, bits, sym)
    s_torch, z_torch = grid.search(W, D, starts, lists, bits, sym)
    assert (s == s_torch).float().mean() > 0.95  # the rest are ties between sums in another order
    for columns, group in ((slice(0, 32), 0), (slice(96, 100), 3)):
        ours = _errors(W[:, columns], D[columns], s[:, group], z[:, group], bits)
        theirs = _errors(W[:, columns], D[columns], s_torch[:, group], z_torch[:, group], bits)
        # After a tie of two coarse scales the fine search goes on around another one, to another error.
        assert ((ours - theirs).abs() <= 2e-3 * theirs + 1e-9).float().mean() > 0.95
        assert ours.sum() <= 1.01 * theirs.sum()
    assert s[5, 1] == 1
    assert z[5, 1] == 2 ** (bits - 1)


def _errors(W, D, s, z, bits):
    q = (torch.round(W / s[:, None]) + z[:, None]).clamp(0, 2**bits - 1)
    return (D * (s[:, None] * (q - z[:, None]) - W) ** 2).sum(1)


@needs_module
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize(("m", "k"), [(1, 1), (31, 7), (33, 100), (80, 128)])
def test_block_gives_the_codes_of_the_torch_block(m, k, isa):
    W = torch.randn(k, m)
    F = (torch.randn(k, k) * 0.1).triu(1) + torch.eye(k)
    d = torch.rand(k) + 0.5
    groups = torch.arange(k, dtype=torch.int32) // 20
    G = int(groups[-1]) + 1
    scales = (torch.rand(G, m) * 0.2 + 0.2) * torch.where(torch.rand(G, m) < 0.5, -1.0, 1.0)
    zeros = torch.randint(1, 16, (G, m)).float()
    blocks = grid.Grid(scales[None], zeros[None], groups)
    codes, E, loss = (part[0] for part in round_block(W, W[None].clone(), F, d, blocks, 4))
    codes_native, E_native = torch.empty_like(codes), torch.empty_like(E)
    with native.instruction_set(isa):
        loss_native = native.round_block(W, W.clone(), F, d, scales, zeros, groups, 4, codes_native, E_native)
    same = (codes == codes_native).all(dim=0)
    assert same.float().mean() > 0.9  # a tie that breaks the other way changes the rest of its row
    torch.testing.assert_close(E[:, same], E_native[:, same], rtol=1e-3, atol=1e-4)
    assert loss_native == pytest.approx(loss, rel=1e-2)


@needs_module
@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("tokens", "n"), [(0, 3), (1, 1), (63, 255), (130, 600)])
def test_sums_of_squares(tokens, n, dtype, isa):
    X = (torch.randn(tokens, n) * torch.logspace(-3, 2, n)).to(dtype)
    with native.instruction_set(isa):
        found = native.sum_of_squares(X)
    torch.testing.assert_close(found.double(), X.double().square().sum(0), rtol=1e-6, atol=0)


@needs_module
def test_an_unknown_instruction_set_is_refused():
    lists = grid.candidates(4, True)
    starts = torch.tensor([0, 1], dtype=torch.int32)
    W, D = torch.ones(1, 1), torch.ones(1)
    with pytest.raises(ValueError, match="this processor has no sve"), native.instruction_set("sve"):
        native.fit_grid(W, D, starts, lists.coarse, lists.fine, lists.offsets, 4, True)


def test_without_the_module_the_torch_path_is_used_and_the_reason_is_told(monkeypatch):
    def absent(name):
        raise ImportError(f"No module named {name!r}")

    monkeypatch.setattr(importlib, "import_module", absent)
    native._load.cache_clear()
    try:
        assert not native.available()
        assert native.instruction_sets() == ()
        assert "C++17 compiler" in native.unsupported_reason()
        assert select(torch.device("cpu")) is TORCH
    finally:
        native._load.cache_clear()
