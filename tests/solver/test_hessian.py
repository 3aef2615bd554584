import pytest
import torch

import oracle
from fewbit.errors import KernelError, SolverError
from fewbit.solver import Hessian, native

BACKENDS = [
    "torch",
    pytest.param(
        "native",
        marks=pytest.mark.skipif(
            "avx512_bf16" not in native.instruction_sets(), reason="no compiled SYRK on this processor"
        ),
    ),
]


def relative(H, truth):
    return float((H.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("n", [1, 7, 48, 100, 130, 576])
@pytest.mark.parametrize("backend", BACKENDS)
def test_sum_of_odd_batches_matches_float64(backend, n):
    X = torch.randn(1203, n).bfloat16()
    H = Hessian(n, backend=backend)
    for batch in X.split([1, 1100, 102]):
        H.add(batch)
    assert H.tokens == 1203
    assert relative(H.matrix(), oracle.hessian(X)) < 3e-6
    assert torch.equal(H.matrix(), H.matrix().T)
    assert torch.equal(H.diagonal(), H.matrix().diagonal())


@pytest.mark.parametrize("n", [1, 7, 100, 577])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("backend", BACKENDS)
def test_drift_matches_float64(backend, dtype, n):
    full = torch.randn(703, n).to(dtype)
    X = (full + 0.1 * torch.randn(703, n)).to(dtype)
    H = Hessian(n, backend=backend)
    assert not H.has_full
    assert H.drift() is None
    for x, y in zip(X.split([1, 600, 102]), full.split([1, 600, 102]), strict=True):
        H.add(x, full=y)
    truth = (full.double() - X.double()).T @ X.double()
    assert float((H.drift() - truth).norm() / oracle.hessian(X).norm()) < 3e-6
    assert relative(H.matrix(), oracle.hessian(X)) < 3e-6


def test_masked_and_bad_tokens_leave_both_streams():
    full, X = torch.randn(50, 12), torch.randn(50, 12)
    mask = torch.rand(50) > 0.3
    H, clean = Hessian(12), Hessian(12)
    good = mask.clone()
    good[[3, 7]] = False
    clean.add(X[good], full=full[good])
    mask[[3, 7]] = True
    full[3, 0], X[7, 5] = float("nan"), float("inf")
    H.add(X, mask, full)
    assert (H.tokens, H.dropped) == (clean.tokens, 2)
    assert torch.allclose(H.drift(), clean.drift(), atol=1e-5)


def test_full_inputs_of_another_shape_are_refused():
    with pytest.raises(SolverError, match=r"shape \(4, 8\), but the batch has \(5, 8\)"):
        Hessian(8).add(torch.randn(5, 8), full=torch.randn(4, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype):
    X = torch.randn(300, 130).to(dtype)
    H = Hessian(130)
    H.add(X.view(3, 100, 130))
    assert relative(H.matrix(), oracle.hessian(X)) < 3e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_looking_at_the_matrix_does_not_disturb_the_sum(backend):
    X = torch.randn(64, 100).bfloat16()
    H = Hessian(100, backend=backend)
    H.add(X)
    H.matrix()
    H.add(X)
    assert relative(H.matrix(), 2 * oracle.hessian(X)) < 3e-6


@pytest.mark.parametrize("backend", BACKENDS)
def test_same_bytes_every_time_and_for_every_thread_count(backend):
    X = torch.randn(700, 144).bfloat16()

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        H = Hessian(144, backend=backend)
        H.add(X)
        torch.set_num_threads(before)
        return H.matrix()

    assert torch.equal(run(1), run(1))
    if backend == "native":
        assert torch.equal(run(1), run(3))


def test_masked_tokens_do_not_count():
    X = torch.randn(2, 50, 36)
    mask = torch.ones(2, 50, dtype=torch.bool)
    mask[1, 20:] = False
    H = Hessian(36)
    H.add(X, mask)
    assert H.tokens == 70
    assert relative(H.matrix(), oracle.hessian(X[mask])) < 1e-6


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf"), 1e30])
def test_rows_that_are_not_finite_are_dropped_and_counted(bad):
    X = torch.randn(40, 36)
    X[3, 5] = X[30, 0] = bad
    H = Hessian(36)
    H.add(X)
    keep = torch.ones(40, dtype=torch.bool)
    keep[[3, 30]] = False
    assert (H.tokens, H.dropped) == (38, 2)
    assert relative(H.matrix(), oracle.hessian(X[keep])) < 1e-6


def test_a_masked_bad_row_is_not_counted_as_dropped():
    X = torch.randn(4, 8)
    X[0] = float("nan")
    H = Hessian(8)
    H.add(X, torch.tensor([False, True, True, True]))
    assert (H.tokens, H.dropped) == (3, 0)


def test_batches_without_any_token():
    H = Hessian(8)
    H.add(torch.zeros(0, 8))
    H.add(torch.full((2, 8), float("nan")))
    H.add(torch.ones(2, 8), torch.zeros(2, dtype=torch.bool))
    assert (H.tokens, H.dropped) == (0, 2)
    assert not H.matrix().any()


def test_errors_name_both_sizes():
    H = Hessian(8)
    with pytest.raises(SolverError, match="8 input features, but the batch has 9"):
        H.add(torch.zeros(2, 9))
    with pytest.raises(SolverError, match="mask has 3 rows, but the batch has 2 tokens"):
        H.add(torch.zeros(2, 8), torch.ones(3, dtype=torch.bool))


def test_native_refuses_tensors_that_are_not_on_the_cpu():
    if not native.available():
        pytest.skip("no compiled module")
    with pytest.raises(KernelError, match="works on the CPU only"):
        native.use("native", torch.zeros(1, device="meta"))
