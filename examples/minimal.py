"""GPTQ on a whole model in about 120 lines: the two ideas of fewbit without its engineering.

1. The calibration pass in lockstep. Every batch runs the model's own forward in a greenlet and pauses in front of
   each linear layer. When all batches are paused, the earliest waiting layer has all of its inputs. It is quantized,
   and the batches continue through the quantized layer. So each layer sees inputs that went through all quantized
   layers before it, for the price of one forward pass, and no architecture needs special code.
2. GPTQ in its LDLQ form. The columns of W are rounded one after the other, and the error of each column is moved
   to the columns that are not rounded yet, by the amounts that keep the layer's outputs closest.

    python examples/minimal.py [bits]

The model is the demo model of this repository (1.8 million weights, trained on Jane Austen). Nothing of fewbit is
imported; src/fewbit/pipeline/scheduler.py and src/fewbit/gptq/gptq.py are the complete forms of the same ideas.
"""

import sys
from pathlib import Path

import torch
from greenlet import getcurrent, greenlet
from transformers import AutoModelForCausalLM, AutoTokenizer

GROUP, DAMP = 64, 0.01  # inputs that share a scale; damping as a share of the mean diagonal of H
DEMO = Path(__file__).parents[1] / "src" / "fewbit" / "demo"


def calibration_pass(layers, jobs, on_layer):
    """Run all `jobs` (functions, each one forward pass) in lockstep.

    Calls ``on_layer(name, inputs)`` once for each of `layers` (name -> module, in execution order), with its inputs
    from all batches. It may change the layer's weight.
    """
    scheduler, order, forwards = getcurrent(), list(layers), {n: m.forward for n, m in layers.items()}

    def pausing(name):
        # The replacement of a layer's forward: hand over the input, pause, and resume with the layer's output.
        return lambda x: scheduler.switch((name, x))

    for name, module in layers.items():
        module.forward = pausing(name)
    tasks = [greenlet(job) for job in jobs]
    # `switch` runs a batch up to its next layer and returns (name, input); a batch that is through is dead.
    waiting = {task: task.switch() for task in tasks}
    while waiting := {task: call for task, call in waiting.items() if not task.dead}:
        name = min((name for name, _ in waiting.values()), key=order.index)  # the earliest layer waited for
        here = {task: x for task, (at, x) in waiting.items() if at == name}
        on_layer(name, list(here.values()))
        for task, x in here.items():  # run each batch through the changed layer up to its next one
            waiting[task] = task.switch(forwards[name](x))
    for module in layers.values():
        del module.forward  # the class's own forward is visible again


def grid(W, bits):
    """Return the scale of each weight, (m, n): symmetric, one per row and group: 2^b - 1 steps are 2 max|w|."""
    groups = W.unflatten(1, (-1, GROUP))
    scale = groups.abs().amax(-1, keepdim=True) * 2 / (2**bits - 1)
    return scale.clamp(min=1e-8).expand_as(groups).flatten(1)


def to_codes(w, scale, bits):
    """q = clamp(round(w / s) + z, 0, 2^b - 1), with the zero point z = 2^(b-1)."""
    return (torch.round(w / scale) + 2 ** (bits - 1)).clamp(0, 2**bits - 1)


def dequantize(codes, scale, bits):
    """w_hat = s (q - z)."""
    return scale * (codes - 2 ** (bits - 1))


def gptq(W, H, scale, bits):
    """Return integer codes (m, n) of W, given H = X X^T of the layer's inputs."""
    n = len(H)
    H = H + DAMP * H.diagonal().mean() * torch.eye(n)  # H_l = H + l I: makes H positive definite
    R = torch.linalg.cholesky(H.flip(0, 1)).flip(0, 1)  # H_l = R R^T, R upper triangular
    F = R / R.diagonal()  # F = R diag(R)^-1
    codes, E = torch.zeros_like(W), torch.zeros_like(W)  # E = W - W_hat of the columns that are rounded
    for i in range(n):
        target = W[:, i] + E[:, :i] @ F[:i, i]  # t_i = w_i + sum_{j<i} (w_j - w_hat_j) F_ji
        codes[:, i] = to_codes(target, scale[:, i], bits)  # w_hat_i = Q(t_i)
        E[:, i] = W[:, i] - dequantize(codes[:, i], scale[:, i], bits)
    return codes


@torch.no_grad()
def quantize(model, batches, bits, method="gptq"):
    """Quantize all linear layers inside the model's blocks in place.

    Returns the relative error of each layer's outputs, ||(W - W_hat) X|| / ||W X||, and its codes.
    """
    layers = {n: m for n, m in model.model.layers.named_modules() if isinstance(m, torch.nn.Linear)}
    errors, codes = {}, {}

    def on_layer(name, inputs):
        X = torch.cat([x.flatten(0, -2) for x in inputs]).T  # (n, tokens), as in the paper
        W, H = layers[name].weight.data, X @ X.T
        scale = grid(W, bits)
        codes[name] = gptq(W, H, scale, bits) if method == "gptq" else to_codes(W, scale, bits)
        W_hat = dequantize(codes[name], scale, bits)
        errors[name] = float(((W - W_hat) @ X).norm() / (W @ X).norm())
        layers[name].weight.data = W_hat

    calibration_pass(layers, [lambda ids=ids: model(ids, use_cache=False) for ids in batches], on_layer)
    return errors, codes


def load():
    """Return the demo model in float32 and its tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(DEMO / "model", dtype=torch.float32).eval()
    return model, AutoTokenizer.from_pretrained(DEMO / "model")


def batches_of(text, tokenizer, count, length=128):
    """Return `count` windows of `length` tokens, each (1, length)."""
    ids = tokenizer((DEMO / "text" / text).read_text(encoding="utf-8"), return_tensors="pt").input_ids
    return list(ids[:, : count * length].split(length, dim=1))


@torch.no_grad()
def kl_divergence(model, original, batches):
    """Mean KL(original || model) per token, in nats."""
    logits = ((original(ids).logits.log_softmax(-1), model(ids).logits.log_softmax(-1)) for ids in batches)
    return float(torch.stack([(p.exp() * (p - q)).sum(-1).mean() for p, q in logits]).mean())


def main(bits=3):
    """Print what round-to-nearest and GPTQ lose, layer by layer and in the model's predictions."""
    original, tokenizer = load()
    calibration = batches_of("calibration.txt", tokenizer, 16)
    evaluation = batches_of("evaluation.txt", tokenizer, 8)
    for method in ("round to nearest", "gptq"):
        model, _ = load()
        errors, _ = quantize(model, calibration, bits, method)
        error, kl = sum(errors.values()) / len(errors), kl_divergence(model, original, evaluation)
        print(f"{method:>16}: mean output error of {len(errors)} layers {error:.1%}, KL divergence {kl:.4f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
