"""The baseline against an elimination in float64, column by column, without any Cholesky factor."""

import pytest
import torch
from plain_gptq import Recipe, gptq, min_max_grid, quantize, round_to_nearest
from torch import Tensor

from models import tiny_model


def eliminate(W: Tensor, H: Tensor, recipe: Recipe) -> Tensor:
    """Optimal brain quantization in a fixed order: each column's error goes to the free ones through (H_λ)⁻¹."""
    W, H = W.double().clone(), H.double().clone()
    n = W.shape[1]
    order = torch.argsort(H.diagonal(), descending=True) if recipe.act_order else torch.arange(n)
    size = n if recipe.group_size == -1 else recipe.group_size
    H = H + recipe.damp * H.diagonal().mean() * torch.eye(n, dtype=torch.float64)
    W_hat = W.clone()
    for k, i in enumerate(order.tolist()):
        free = order[k:]
        if k % size == 0:
            s, z = min_max_grid(W[:, order[k : k + size]].float(), recipe.bits, recipe.sym)
            s, z = s.double()[:, 0], z.double()[:, 0]
        q = (torch.round(W[:, i] / s) + z).clamp(0, 2**recipe.bits - 1)
        W_hat[:, i] = s * (q - z)
        inverse = torch.linalg.inv(H[free][:, free])
        W[:, free] -= torch.outer((W[:, i] - W_hat[:, i]) / inverse[0, 0], inverse[0])
    return W_hat


def layer(m: int, n: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    X = torch.randn(2 * n, n, generator=generator) @ torch.randn(n, n, generator=generator) * 0.1
    X[:, ::7] *= 4
    return torch.randn(m, n, generator=generator) * 0.02, X.T @ X


@pytest.mark.parametrize("act_order", [False, True])
@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(("n", "group_size"), [(48, 16), (150, 64), (150, 100), (40, -1)])
def test_gptq_is_elimination_column_by_column(n: int, group_size: int, sym: bool, act_order: bool) -> None:
    W, H = layer(24, n)
    recipe = Recipe(bits=3, group_size=group_size, sym=sym, act_order=act_order)
    expected = eliminate(W, H, recipe)
    found = gptq(W, H, recipe).double()
    # A tie broken the other way changes the rest of its row; everything else must be equal.
    equal_rows = torch.isclose(found, expected, atol=1e-6).all(1)
    assert equal_rows.float().mean() > 0.9


def test_a_column_that_was_never_active_is_zero() -> None:
    W, H = layer(8, 32)
    H[5], H[:, 5] = 0, 0
    assert gptq(W, H, Recipe(4, 16, True, True))[:, 5].abs().max() == 0


@pytest.mark.parametrize("sym", [False, True])
def test_min_max_grid_covers_the_range(sym: bool) -> None:
    W, _ = layer(50, 16)
    s, z = min_max_grid(W, 4, sym)
    q = torch.round(W / s) + z
    step = q - q.clamp(0, 15)
    # The symmetric grid ends half a step short on the positive side, the rounded zero point likewise.
    assert step.abs().max() <= 1
    assert torch.equal(s, s.half().float())
    assert sym == bool((z == 8).all())


def test_round_to_nearest_is_never_more_than_half_a_step_off() -> None:
    W, _ = layer(20, 40)
    W_hat = round_to_nearest(W, Recipe(4, 16, False, False))
    for a, b in ((0, 16), (16, 32), (32, 40)):
        s, _ = min_max_grid(W[:, a:b], 4, False)
        inside = (W_hat[:, a:b] - W[:, a:b]).abs() <= s / 2 + 1e-6
        # The zero point is rounded too: one end of the range may lie up to half a step outside the grid.
        assert inside.float().mean() > 0.9


def test_model_without_calibration_is_rounded_to_nearest() -> None:
    model = tiny_model("gpt2")
    W = model.transformer.h[0].mlp.c_fc.weight.detach().clone()
    quantize(model, [], Recipe(4, -1, True, False))
    expected = round_to_nearest(W.T, Recipe(4, -1, True, False)).T
    assert torch.equal(model.transformer.h[0].mlp.c_fc.weight, expected)


def test_model_is_calibrated_through_its_quantized_layers() -> None:
    model = tiny_model("llama")
    batches = [{"input_ids": torch.randint(3, 100, (1, 40), generator=torch.Generator().manual_seed(1))}]
    names = [name for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
    original = {name: p.detach().clone() for name, p in model.named_parameters()}
    found = quantize(model, batches, Recipe(4, 16, True, False))
    assert sorted(f"{name}.weight" for name in found) == sorted(names)
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, found[name[:-7]] if name in names else original[name])

    seen: list[Tensor] = []
    last = model.model.layers[1].mlp.down_proj
    last.register_forward_hook(lambda module, args, output: seen.append(args[0][0]))
    model(**batches[0])
    X, W = seen[0].float(), original["model.layers.1.mlp.down_proj.weight"]
    assert torch.allclose(last.weight, gptq(W, X.T @ X, Recipe(4, 16, True, False)), atol=1e-6)
