"""A layer's rows divided over processes give the bits of a single process."""

import pytest
import torch

from fewbit.config import LayerSettings
from fewbit.distributed import Communicator
from fewbit.gptq import Hessian, Holdout, InputGroup, quantize_weight
from rank_processes import run_ranks


def problem(m, n, tokens=300):
    generator = torch.Generator().manual_seed(m)
    W = torch.randn(m, n, generator=generator)
    X = torch.randn(tokens, n, generator=generator) @ torch.randn(n, n, generator=generator)
    X_full = X + 0.2 * torch.randn(tokens, n, generator=generator) @ torch.randn(n, n, generator=generator)
    H = Hessian(n)
    H.add(X[:200], full=X_full[:200])
    return W, InputGroup(H, Holdout(X[200:], X_full[200:]))


def solved(comm, m, n, settings, correction, with_hessian=True):
    W, group = problem(m, n)
    shard = comm.row_shard(m)
    solution = quantize_weight(
        W[shard.rows],
        group if with_hessian else None,
        settings,
        correction=correction,
        reduce=shard.reduce,
    )
    figures = {key: getattr(solution, key) for key in ("loss", "alpha", "true_error", "tokens", "fallbacks")}
    return [
        shard.gather(tensor).tolist() for tensor in (solution.codes.codes, solution.codes.scales)
    ], figures


def settings_of(bits=4, sym=True, method="gptq"):
    return LayerSettings(bits, 16, sym, "group", 0.01, method)


CASES = {
    "plain": (settings_of(), 0.0),
    "corrected": (settings_of(bits=3), "auto"),
    "2 bits": (settings_of(bits=2, sym=False), 0.5),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("m", "n", "world"), [(64, 48, 2), (131, 200, 3), (31, 48, 3), (576, 192, 5)])
def test_row_shards_match_one_process(case, m, n, world):
    settings, correction = CASES[case]
    whole, figures = solved(Communicator(), m, n, settings, correction)
    results = run_ranks(world, solved, m, n, settings, correction)
    assert all(result == (whole, figures) for result in results)


def test_round_to_nearest_row_shards_match():
    settings = settings_of(method="rtn")
    alone = solved(Communicator(), 131, 48, settings, 0.0, False)
    assert run_ranks(3, solved, 131, 48, settings, 0.0, False) == [alone] * 3
