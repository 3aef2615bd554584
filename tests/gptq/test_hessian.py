from functools import partial

import pytest
import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

import oracle
from fewbit import native
from fewbit.errors import SolverError
from fewbit.gptq import Hessian
from fewbit.gptq import gram as products
from summing import hessian_of


@pytest.fixture(params=["torch", "avx512_vnni", "amx"])
def backend(request, monkeypatch):
    """All ways to multiply bfloat16 activations."""
    sets = native.instruction_sets()
    if request.param == "torch":
        monkeypatch.setattr(native, "instruction_sets", lambda: ())
        yield
    elif request.param in sets and "avx512_bf16" in sets:
        with native.instruction_set(request.param):
            yield
    else:
        pytest.skip("no compiled product on this processor")


def relative(H, truth):
    return float((H.double() - truth).norm() / truth.norm())


@pytest.mark.parametrize("n", [1, 7, 48, 100, 130, 576])
def test_sum_of_odd_batches_matches_float64(backend, n):
    X = torch.randn(1203, n).bfloat16()
    H = hessian_of(X.split([1, 1100, 102]))
    assert H.tokens == 1203
    assert relative(H.matrix(), oracle.hessian(X)) < 3e-6
    assert torch.equal(H.matrix(), H.matrix().T)
    assert torch.equal(H.diagonal(), H.matrix().diagonal())


@pytest.mark.parametrize("n", [1, 7, 100, 577])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_input_error_matches_float64(backend, dtype, n):
    full = torch.randn(703, n).to(dtype)
    X = (full + 0.1 * torch.randn(703, n)).to(dtype)
    assert not hessian_of([X]).has_full
    assert hessian_of([X]).input_error() is None
    H = hessian_of(X.split([1, 600, 102]), full.split([1, 600, 102]))
    truth = (full.double() - X.double()).T @ X.double()
    assert float((H.input_error() - truth).norm() / oracle.hessian(X).norm()) < 3e-6
    assert relative(H.matrix(), oracle.hessian(X)) < 3e-6


def test_masked_and_bad_tokens_leave_both_paths():
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
    assert torch.allclose(H.input_error(), clean.input_error(), atol=1e-5)


def test_full_inputs_of_another_shape_are_refused():
    with pytest.raises(SolverError, match=r"shape \(4, 8\), but the batch has \(5, 8\)"):
        Hessian(8).add(torch.randn(5, 8), full=torch.randn(4, 8))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_other_dtypes(dtype):
    X = torch.randn(300, 130).to(dtype)
    H = Hessian(130)
    H.add(X.view(3, 100, 130))
    assert relative(H.matrix(), oracle.hessian(X)) < 3e-6


def exact_sums(X, full, owners, order):
    """The bytes of H and C where batch b is added by owners[b], the batches taken in this order."""
    mine = [Hessian(X[0].shape[1]) for _ in set(owners)]
    for b in order:
        mine[owners[b]].observe_range(X[b], full=full[b])
    everyones = torch.cat([H.range_stats for H in mine])
    for H in mine:
        H.freeze_units(everyones)
    for b in order:
        mine[owners[b]].add(X[b], full=full[b])
    for others in mine[1:]:
        for total, part in zip(mine[0].sums(full=True), others.sums(full=True), strict=True):
            total.add_(part)
    mine[0].tokens = sum(H.tokens for H in mine)
    return mine[0].matrix(), mine[0].input_error()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_the_sums_do_not_depend_on_the_order_of_batches_nor_on_who_adds_them(backend, dtype):
    sizes = [1, 3, 40, 600, 255, 256, 17, 5, 5, 2]
    X = [torch.randn(size, 130).mul(10 ** torch.randn(130)).to(dtype) for size in sizes]
    full = [(x + 0.1 * torch.randn_like(x)).to(dtype) for x in X]
    first = exact_sums(X, full, [0] * 10, range(10))
    for seed in range(5):
        g = torch.Generator().manual_seed(seed)
        owners = torch.randint(seed + 1, (10,), generator=g).tolist()
        owners = [sorted(set(owners)).index(owner) for owner in owners]
        order = torch.randperm(10, generator=g).tolist()
        assert all(map(torch.equal, exact_sums(X, full, owners, order), first))


def test_outliers_and_late_channels_are_as_exact_as_others(backend):
    X = torch.randn(8, 500, 96)
    X[..., 3] *= 1000  # always large
    X[5, 17, 4] = 30000  # one massive activation
    X[..., 7] *= 1e-4
    X[..., 9] = 0  # dead
    X[:7, :, 10] = 0  # alive in the last batch only
    X[1:, :, 11] *= 1e-3  # large in the first batch only
    X = X.bfloat16()
    H, truth = hessian_of(list(X)), oracle.hessian(X.reshape(-1, 96))
    norms = truth.diagonal().sqrt().clamp(min=1e-30)
    error = (H.matrix() - truth).abs() / norms / norms[:, None]
    assert float(error.max()) < 2e-6
    assert not H.matrix()[9].any()


@pytest.mark.parametrize("scale", [1e-15, 1e12])
def test_tiny_and_huge_inputs_stay_in_range(scale):
    X = torch.randn(300, 64) * scale
    assert relative(hessian_of(X.split(100)).matrix(), oracle.hessian(X)) < 1e-6


def test_tokens_that_were_not_announced_are_refused():
    H = hessian_of([torch.randn(5, 8)])
    with pytest.raises(SolverError, match="made for the 5 tokens that it has: observe all batches first"):
        H.add(torch.randn(1, 8))
    with pytest.raises(SolverError, match="has its units already"):
        H.observe_range(torch.randn(1, 8))


def test_no_tokens_after_the_matrix_was_taken():
    H = Hessian(8)
    H.observe_range(torch.randn(5, 8))
    H.matrix()
    with pytest.raises(SolverError, match="before the matrix is taken"):
        H.add(torch.randn(5, 8))


def test_same_bytes_every_time_and_for_every_thread_count(backend):
    X = torch.randn(700, 144).bfloat16()

    def run(threads):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        H = Hessian(144)
        H.add(X)
        torch.set_num_threads(before)
        return H.matrix()

    assert torch.equal(run(1), run(1))
    if native.instruction_sets():
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
    H = hessian_of([torch.zeros(0, 8), torch.full((2, 8), float("nan"))])
    assert (H.tokens, H.dropped) == (0, 2)
    assert not H.matrix().any()
    H = Hessian(8)
    H.add(torch.full((2, 8), float("nan")))
    assert (H.tokens, H.dropped) == (0, 2)
    assert not H.matrix().any()
    H = Hessian(8)
    H.add(torch.ones(2, 8), torch.zeros(2, dtype=torch.bool))
    assert (H.tokens, H.dropped) == (0, 0)
    assert not H.matrix().any()


def test_errors_name_both_sizes():
    H = Hessian(8)
    with pytest.raises(SolverError, match="8 input features, but the batch has 9"):
        H.add(torch.zeros(2, 9))
    with pytest.raises(SolverError, match="mask has 3 rows, but the batch has 2 tokens"):
        H.add(torch.zeros(2, 8), torch.ones(3, dtype=torch.bool))


@pytest.fixture
def like_a_gpu(monkeypatch):
    """Sums on CPU tensors as on a GPU: without the compiled module, which takes bfloat16 where the CPU can."""
    monkeypatch.setattr(Hessian, "_is_native", lambda self, both: False)


@pytest.fixture
def tensor_cores(monkeypatch, like_a_gpu):
    """The way of a GPU on CPU tensors: the operator that only CUDA has, called as there, with the same sums."""
    made = []

    def mm(A, B, out_dtype, *, out):
        assert A.dtype == B.dtype != torch.float32 == out_dtype == out.dtype
        made.append(A.shape[0] * A.shape[1] * B.shape[1])
        return out.copy_(A.float() @ B.float())

    library = torch.library.Library("aten", "IMPL")
    library.impl("mm.dtype_out", mm, "CPU")
    monkeypatch.setattr(products, "on_tensor_cores", lambda X: X.dtype in (torch.bfloat16, torch.float16))
    yield made
    library._destroy()


@pytest.mark.parametrize("n", [1, 7, 130])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_products_give_the_bytes_of_float32_ones(dtype, n, tensor_cores, monkeypatch):
    # With few tokens every float32 sum is exact, so no order of summing can be told from another.
    full = torch.randint(-9, 10, (60, n)) * 2.0 ** torch.randint(-12, 5, (n,))
    X = (full + torch.randint(-1, 2, (60, n)) * 2.0**-10).to(dtype).split([1, 39, 20])
    full = full.to(dtype).split([1, 39, 20])
    H = hessian_of(X, full)
    assert len(tensor_cores) == 6
    monkeypatch.setattr(products, "on_tensor_cores", lambda X: False)
    expected = hessian_of(X, full)
    assert len(tensor_cores) == 6
    assert torch.equal(H.matrix(), expected.matrix())
    assert torch.equal(H.input_error(), expected.input_error())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_products_of_the_smallest_and_largest_numbers(dtype, tensor_cores):
    info = torch.finfo(dtype)
    largest = min(info.max, 2.0**40)
    X = torch.randn(50, 6).to(dtype)
    X[:, 0], X[:, 1] = info.smallest_normal * 2.0**-6, largest  # a number below the normal ones
    X[:, 2] *= 1e-4
    X = X * (1 if dtype == torch.float16 else torch.tensor([2.0**60, 1, 1, 1, 1, 1], dtype=dtype))
    H, truth = hessian_of([X]), oracle.hessian(X)
    assert tensor_cores
    norms = truth.diagonal().sqrt()
    assert float(((H.matrix() - truth).abs() / norms / norms[:, None]).max()) < 2e-6


@pytest.mark.parametrize("n", [4096, 14336])
def test_on_a_gpu_symmetric_work_is_done_once_in_a_few_products(n):
    step = products.panel_rows(n, torch.device("cuda"))
    starts = range(0, n, step)
    assert len(starts) <= 6
    assert sum(min(step, n - a) * (n - a) for a in starts) < 0.6 * n * n


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_no_value_is_looked_at_before_it_is_asked_for(dtype, monkeypatch, like_a_gpu):
    """A GPU would have to be waited for: tensors without values raise when somebody looks at one."""
    monkeypatch.setattr(products, "on_tensor_cores", lambda X: X.dtype != torch.float32)
    with FakeTensorMode():
        H = Hessian(640)
        X, full = (torch.empty(2, 300, 640, dtype=dtype) for _ in range(2))
        for take in (partial(H.observe_range, check_finite=False), H.add):
            take(X, None, full)
        assert [tensor.dtype for tensor in H.sums(full=True)] == [torch.int32] * 2
        assert H.matrix().dtype == H.input_error().dtype == torch.float32
        with pytest.raises(DataDependentOutputException):
            Hessian(640).observe_range(X)


def test_announced_without_a_look_and_then_with_one():
    X = [torch.randn(20, 8) for _ in range(3)]
    X[1][4, 2] = float("inf")
    H = Hessian(8)
    for batch in X:
        H.observe_range(batch, check_finite=False)
    assert not H.in_range
    H.reset()
    for batch in X:
        H.observe_range(batch)
    assert H.in_range
    for batch in X:
        H.add(batch)
    assert (H.tokens, H.dropped) == (59, 1)
    assert torch.equal(H.matrix(), hessian_of(X).matrix())
    clean = Hessian(8)
    clean.observe_range(X[0], check_finite=False)
    assert clean.in_range


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("n", [7, 130, 1000])
def test_on_a_gpu(dtype, n):
    X = (torch.randn(1203, n) * 10 ** torch.randn(n)).to(dtype)
    full = (X + 0.1 * torch.randn_like(X)).to(dtype)
    parts = [x.cuda().split([3, 1100, 100]) for x in (X, full)]
    H = hessian_of(*parts, device="cuda")
    C = (full.double() - X.double()).T @ X.double()
    assert relative(H.matrix().cpu(), oracle.hessian(X)) < 3e-6
    assert float((H.input_error().cpu() - C).norm() / oracle.hessian(X).norm()) < 3e-6
    again = hessian_of(*(part[::-1] for part in parts), device="cuda")
    assert torch.equal(again.matrix(), H.matrix())
    assert torch.equal(again.input_error(), H.input_error())
