"""Families of one shape as one batch, forced on the CPU: what each gets alone, for no more waits than two of them."""

import dataclasses
import warnings
from collections import Counter
from itertools import chain

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import oracle
from fewbit.config import LayerSettings
from fewbit.gptq import Accuracy, FactorCache, Hessian, Holdout, InputGroup, quantize_together
from fewbit.gptq import cholesky as fallback
from fewbit.gptq import grid as grids
from fewbit.gptq.batching import in_batches, on_host, padded, product, stacked
from fewbit.gptq.cholesky import prepare
from fewbit.gptq.correction import RIDGE, drifts_of, steps_of, whole
from fewbit.gptq.grid import Candidates, fit_grid, fit_grids

SETTINGS = LayerSettings(bits=4, group_size=16, sym=True, act_order="group", damp=0.01, method="gptq")


def family(rows, n, seed, *, full=True, probe=50, idle=(), device="cpu"):
    """Weights with so many rows each, their input, and so many tokens of a probe; `idle` inputs are always zero."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(n, n, generator=generator) / n**0.5
    X_full = torch.randn(4 * n + probe, n, generator=generator) @ mix
    X = X_full + 0.3 * torch.randn(len(X_full), n, generator=generator) @ mix
    X[:, list(idle)] = X_full[:, list(idle)] = 0
    X, X_full = X.to(device), X_full.to(device)
    H = Hessian(n, device=device)
    H.add(X[probe:], full=X_full[probe:] if full else None)
    weights = [torch.randn(m, n, generator=generator).to(device) for m in rows]
    held_out = Holdout(X[:probe], X_full[:probe]) if probe else None
    return InputGroup(weights, H, FactorCache(), held_out, [whole] * len(rows))


def fresh(families):
    """The same with nothing in their caches."""
    return [dataclasses.replace(one, cache=FactorCache()) for one in families]


def solved(families, settings, accuracy, **options):
    options = {"backend": "torch", **options}
    return quantize_together(fresh(families), settings, accuracy=accuracy, **options)


def assert_same(solution, other):
    """But for ties: after one that is broken the other way the rest of a row may differ."""
    assert (solution.codes.codes == other.codes.codes).float().mean() > 0.97
    assert torch.equal(solution.codes.g_idx, other.codes.g_idx)
    assert solution.loss == pytest.approx(other.loss, rel=1e-2)
    for fact in ("true_error", "alpha"):
        value, expected = getattr(solution, fact), getattr(other, fact)
        assert value == (expected if expected is None else pytest.approx(expected, rel=1e-2)), fact
    for fact in ("fallbacks", "damp", "tokens", "dropped", "dead", "refit"):
        assert getattr(solution, fact) == getattr(other, fact), fact


CASES = {
    "one row, 2 bits": (
        (1,),
        50,
        {"bits": 2, "sym": False, "act_order": "full", "group_size": 24},
        "auto",
        False,
    ),
    "siblings, 3 bits": ((20, 13), 45, {"bits": 3}, "auto", True),
    "one group, 4 bits": ((5, 1), 33, {"act_order": "none", "group_size": -1}, 0.5, False),
    "8 bits": ((7,), 100, {"bits": 8, "sym": False, "act_order": "full", "group_size": 32}, 1.0, False),
    "no correction": ((3,), 37, {"sym": False, "group_size": 32}, 0.0, False),
    "refitted": ((24,), 40, {"bits": 2, "act_order": "full"}, 0.0, True),
}


@pytest.mark.parametrize("case", CASES)
def test_each_family_gets_what_it_gets_alone(case):
    rows, n, changes, correction, refit = CASES[case]
    settings, accuracy = dataclasses.replace(SETTINGS, **changes), Accuracy(correction, refit)
    families = [
        family(rows, n, 1, idle=(0, 5)),
        family(rows, n, 2, probe=31),  # padded among the others
        family((2,), 20, 3),  # another shape in between
        family(rows, n, 4, probe=0),
        family(rows, n, 5, full=False),
        family(rows, n, 6, probe=7),
    ]
    together = solved(families, settings, accuracy, batched=True)
    alone = solved(families, settings, accuracy, batched=False)
    for one, other in zip(chain(*together), chain(*alone), strict=True):
        assert_same(one, other)
    assert together[0][0].dead == 2
    assert together[3][0].true_error is None
    assert together[4][0].alpha is None
    if correction == "auto":
        assert together[3][0].alpha == 0.0
        assert 0 < together[0][0].alpha != together[1][0].alpha > 0


def test_a_batch_that_is_refitted_keeps_what_is_better_for_each():
    settings = dataclasses.replace(SETTINGS, bits=2, sym=False)
    families = [family((24,), 48, seed) for seed in range(3)]
    # For this probe refitted scales are wrong: the full-precision layer gives what the swept codes give.
    [swept] = solved(families, settings, Accuracy(), batched=True)[1]
    X = families[1].probe.X
    stubborn = Holdout(X, X @ swept.codes.dequantize().T @ torch.linalg.pinv(families[1].weights[0]).T)
    families[1] = dataclasses.replace(families[1], probe=stubborn)
    found = solved(families, settings, Accuracy(refit=True), batched=True)
    assert [one.refit for [one] in found] == [True, False, True]
    assert torch.equal(found[1][0].codes.scales, swept.codes.scales)


def test_one_matrix_that_cannot_be_factored_is_a_rung_for_its_family_alone():
    families = [family((9,), 40, seed) for seed in range(3)]
    H = families[1].hessian.matrix()
    H[0, 1] = H[1, 0] = 1.5 * float(H.diagonal().max())  # no longer positive definite, even with the ridge
    for accuracy in Accuracy(0.5), Accuracy("auto"):
        together = solved(families, SETTINGS, accuracy, batched=True)
        alone = solved(families, SETTINGS, accuracy, batched=False)
        for [one], [other] in zip(together, alone, strict=True):
            assert_same(one, other)
        assert together[0][0].fallbacks == together[2][0].fallbacks == ()
        assert together[1][0].fallbacks[0] == fallback.FLOAT64
        assert together[1][0].fallbacks[-1] == fallback.NO_CORRECTION
        assert together[1][0].alpha == 0.0
        assert together[2][0].alpha > 0


@pytest.mark.parametrize("act_order", ["none", "full"])
def test_codes_are_the_rounded_targets_in_float64(act_order):
    n, settings = 50, dataclasses.replace(SETTINGS, act_order=act_order)
    families = [family((6, 3), n, seed, idle=(4,)) for seed in range(3)]
    for one, solutions in zip(families, solved(families, settings, Accuracy(0.5), batched=True), strict=True):
        H, C = one.hessian.matrix().double(), one.hessian.input_error().double()
        perm = prepare(one.hessian, 16, act_order, 0.01).factor.perm
        ridge = RIDGE * H.diagonal().mean() * torch.eye(n, dtype=torch.float64)
        for W, solution in zip(one.weights, solutions, strict=True):
            T = W.double() + 0.5 * W.double() @ C @ torch.linalg.inv(H + ridge)
            codes, groups = solution.codes, solution.codes.g_idx.long()
            s, z = codes.scales.double()[:, groups], codes.zeros.double()[:, groups]
            parts = (part[:, perm] for part in (T, s, z, codes.codes))
            T_perm, *grid, q = parts
            assert oracle.excess(T_perm, oracle.damped(H, 0.01)[perm][:, perm], *grid, q, 4) < 0.02
            assert solution.loss == pytest.approx(oracle.loss(T, codes.dequantize(), H), rel=2e-3)
            probe = one.probe
            Y = probe.X_full.double() @ W.double().T
            error = (Y - probe.X.double() @ codes.dequantize().double().T).norm() / Y.norm()
            assert solution.true_error == pytest.approx(float(error), rel=1e-4)


def test_steps_of_a_batch_are_those_of_each():
    families = [family((4, 2), 30, seed) for seed in range(3)]
    drifts = drifts_of([one.hessian for one in families])
    weights = [torch.stack(of_place) for of_place in zip(*(one.weights for one in families), strict=True)]
    for W, steps in zip(weights, steps_of(weights, drifts), strict=True):
        for w, step, one, drift in zip(W, steps, families, drifts, strict=True):
            [[alone]] = steps_of([w[None]], [drift])
            torch.testing.assert_close(step, alone, rtol=1e-4, atol=1e-5)
            H = one.hessian.matrix().double()
            H = H + RIDGE * H.diagonal().mean() * torch.eye(30)
            torch.testing.assert_close((step.double() @ H).float(), w @ drift.C, rtol=1e-3, atol=1e-2)


def test_a_batch_of_one_is_the_matrix_itself():
    A, B = torch.randn(7, 33), torch.randn(33, 19)
    assert torch.equal(product(A[None], B[None])[0], A @ B)
    assert stacked([A]).data_ptr() == padded([A]).data_ptr() == A.data_ptr()
    both = padded([A, A[:3]])
    assert torch.equal(both[1], torch.cat([A[:3], torch.zeros(4, 33)]))
    assert on_host([]) == []
    assert on_host([torch.tensor(3.0), torch.tensor([1.0, 2.0])]) == [[3.0], [1.0, 2.0]]
    assert [list(some) for some in in_batches([1, 2, 3], 1 << 14)] == [[1], [2], [3]]


def test_sums_over_rows_come_in_the_order_of_layers():
    """Processes whose parts of the layers have other shapes, and so form other batches, meet in them."""
    seen = []

    def total(name):
        def summed(figures):
            seen.append((name, figures.shape[1:]))
            return figures.sum(0)

        return summed

    def order(*shapes):
        seen.clear()
        families = [
            dataclasses.replace(family(rows, 24, i), totals=[total((i, j)) for j in range(len(rows))])
            for i, rows in enumerate(shapes)
        ]
        solved(families, SETTINGS, Accuracy("auto", refit=True), batched=True)
        return list(seen)

    mixed, alike = order((3, 2), (4, 2), (3, 2)), order((3, 2), (3, 2), (3, 2))
    layers = [(i, j) for i in range(3) for j in range(2)]
    assert mixed == alike
    twice = [name for name in layers for _ in range(2)]
    # α; the error before and after the refit; loss and true error.
    assert [name for name, _ in alike] == [*layers, *twice, *twice]


class Waits(TorchDispatchMode):
    """Counts what a GPU would be waited for, whatever the device."""

    NAMES = ("_local_scalar_dense", "nonzero", "bincount", "equal", "masked_select", "is_nonzero")

    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in self.NAMES:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def waits(monkeypatch):
    """Counted calls of a function, with Triton's kernels replaced by ones that leave anything in their outputs."""
    pytest.importorskip("triton", reason="pip install triton")
    from fewbit.gptq import triton_backend as triton

    def fit(W, D, starts, *_):
        shape = (*W.shape[:-1], starts.numel() - 1)
        return torch.full(shape, 0.5), torch.full(shape, 8.0)

    def block(W, T, F, d, scales, zeros, groups, bits, codes, E):
        codes.fill_(7)
        E.copy_(W)
        return W.square().sum(-2)

    monkeypatch.setattr(triton, "fit_grid", fit)
    monkeypatch.setattr(triton, "ldlq_block", block)

    def counted(work):
        mode = Waits()
        with pytest.MonkeyPatch.context() as patch, mode:
            for name in ("tolist", "cpu", "numpy"):  # on the CPU they are no operations
                method = getattr(torch.Tensor, name)

                def spy(self, *args, _method=method, _name=name):
                    mode.seen[_name] += 1
                    return _method(self, *args)

                patch.setattr(torch.Tensor, name, spy)
            work()
        return mode.seen

    return counted


@pytest.mark.parametrize("act_order", ["group", "full"])
@pytest.mark.parametrize("accuracy", [Accuracy("auto"), Accuracy(0.5, refit=True), Accuracy()])
def test_waits_do_not_grow_with_the_number_of_families(waits, accuracy, act_order):
    settings = dataclasses.replace(SETTINGS, act_order=act_order)
    families = [family((8, 4), 40, seed, probe=20 + seed) for seed in range(6)]
    for one in families:
        one.hessian.matrix()
    counts = [
        waits(
            lambda n=n: quantize_together(fresh(families[:n]), settings, accuracy=accuracy, backend="triton")
        )
        for n in (2, 6)
    ]
    assert counts[0] == counts[1]
    assert 5 <= counts[0].total() <= 12
    one_by_one = waits(
        lambda: quantize_together(
            fresh(families), settings, accuracy=accuracy, backend="triton", batched=False
        )
    )
    assert one_by_one.total() > counts[1].total()  # what grows is seen


def few_candidates(monkeypatch):
    """The interpreter is slow: of all that is tried every eleventh."""
    every = grids.candidates

    def some(bits, sym):
        found = every(bits, sym)
        return Candidates(found.coarse[::11], found.fine[::5], found.offsets[::3])

    monkeypatch.setattr(grids, "candidates", some)


@pytest.mark.parametrize(("bits", "sym"), [(3, False), (4, True)])
def test_one_search_for_a_batch_gives_the_grids_of_each(monkeypatch, bits, sym):
    pytest.importorskip("triton", reason="pip install triton")
    few_candidates(monkeypatch)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)
    W, D = torch.randn(3, 5, 21, generator=generator), torch.rand(3, 21, generator=generator) + 0.1
    D[1, :8] = 0  # a group that never was active, in one of them
    W[2, 4] = 0
    groups = torch.arange(21, dtype=torch.int32) // 8
    g_idx = torch.stack([groups, groups[torch.randperm(21, generator=generator)], groups])
    batch = (part.to(device) for part in (W, D, g_idx))
    for b, found in enumerate(fit_grids(*batch, bits, sym=sym, backend="triton")):
        alone = fit_grid(W[b], D[b], g_idx[b], bits, sym=sym, backend="torch")
        for part in ("scales", "zeros", "g_idx"):
            assert torch.equal(getattr(found, part).cpu(), getattr(alone, part)), part


def test_with_triton_the_families_are_a_batch_from_end_to_end(monkeypatch):
    triton = pytest.importorskip("fewbit.gptq.triton_backend", reason="pip install triton")
    few_candidates(monkeypatch)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    families = [family((3, 2), 20, seed, probe=9 + seed, device=device) for seed in range(3)]
    shapes = []
    fit, block = triton.fit_grid, triton.ldlq_block
    monkeypatch.setattr(triton, "fit_grid", lambda W, *rest: shapes.append(W.shape) or fit(W, *rest))
    monkeypatch.setattr(triton, "ldlq_block", lambda W, *rest: shapes.append(W.shape) or block(W, *rest))
    settings, accuracy = dataclasses.replace(SETTINGS, bits=3, group_size=8), Accuracy("auto")
    together = solved(families, settings, accuracy, backend="triton")
    assert shapes == [(3, 5, 20), (3, 20, 3 * 5)]
    alone = solved(families, settings, accuracy, batched=False)
    for one, other in zip(chain(*together), chain(*alone), strict=True):
        assert_same(one, other)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("accuracy", [Accuracy("auto"), Accuracy(0.5, refit=True)])
def test_a_gpu_is_waited_for_as_often_for_two_families_as_for_six(accuracy):
    families = [family((64, 32), 160, seed, probe=20 + seed, device="cuda") for seed in range(6)]
    quantize_together(fresh(families), SETTINGS, accuracy=accuracy)  # compiles

    def waits(count):
        some = fresh(families[:count])
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                quantize_together(some, SETTINGS, accuracy=accuracy)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return sum("synchronizing" in str(one.message) for one in seen)

    assert 0 < waits(2) == waits(6)
