"""Cross-entropy of a linear head without the tokens x vocabulary matrix of logits.

    loss = sum_i (logsumexp(z_i) - z_i[t_i]) / n,   z_i = steps(C e_i + b),   E (tokens, in), C (vocabulary, in)

Tokens go through in chunks; the gradient of a chunk is computed beside its loss, so that its logits live only that
long and no product is done twice (Hsu et al., 2024, arXiv 2410.10989, section 3.2). Exact: what is not kept is
recomputed by nobody and left out by nobody. That is torch's own `F.linear_cross_entropy`, which is used for heads in
fp32 and fp64: on the tokens that count it is faster and keeps less (`python benchmarks/cross_entropy.py`). It lacks
softcaps, gives a head in half precision a loss in half precision, which is off by 3e-3 and takes twice the memory,
and knows nothing of shards and compiled graphs; these have chunks of our own. For a trained head on a GPU,
cut-cross-entropy (Wijmans et al., 2024, arXiv 2411.09009) is used where it is installed, unfiltered; for a frozen
head the chunks need two matrix products where it needs three.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint

__all__ = ["chunked_cross_entropy", "in_chunks", "linear_cross_entropy"]

CHUNK_LOGITS = 2**24
"""Logits a chunk: 64 MB in fp32, 512 tokens at a vocabulary of 32 768."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    ignore_index: int = -100,
    reduction: str = "mean",
    chunk: int | None = None,
) -> Tensor:
    """F.cross_entropy of the logits hidden @ weight.T + bias in fp32, or softcap * tanh(logits / softcap) of them.

    Args:
        hidden: (tokens, in).
        weight: (vocabulary, in); receives a gradient if it requires one, accumulated in fp32 over the chunks.
        targets: (tokens,) class indices; those equal to `ignore_index` do not count.
        bias: (vocabulary,).
        reduction: "mean" over the tokens that count (NaN when there is none, as in torch), "sum", or "none".
        chunk: tokens a chunk; None for as many as make 2^24 logits.
    """

    def logits(rows: Tensor) -> Tensor:
        z = F.linear(rows, weight, bias)
        z = z if softcap is None else torch.tanh(z / softcap) * softcap
        return z.to(torch.promote_types(z.dtype, torch.float32))

    trained = [p for p in (weight, bias) if p is not None and p.requires_grad]
    kernel = cut_cross_entropy(hidden, weight) if bias is None and reduction != "none" else None
    if kernel is not None:
        # unfiltered: skipping small gradients starves rare tokens' rows of the weight
        loss: Tensor = kernel(hidden, weight, targets, ignore_index, softcap, reduction, False, None)
        return loss
    chunk = chunk or max(CHUNK_LOGITS // weight.shape[0], 1)
    if softcap is None and reduction != "none" and _torch_serves(hidden, weight, bias):
        return _torch_s(hidden, weight, targets, bias, ignore_index, reduction, chunk)
    return chunked_cross_entropy(
        hidden, targets, logits, trained, chunk, ignore_index=ignore_index, reduction=reduction
    )


def chunked_cross_entropy(
    hidden: Tensor,
    targets: Tensor,
    logits: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    chunk: int,
    *,
    ignore_index: int = -100,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Tensor:
    """F.cross_entropy(logits(hidden), targets), `chunk` tokens at a time.

    Args:
        hidden: (tokens, in).
        targets: (tokens,) class indices.
        logits: (k, in) -> (k, vocabulary), row by row.
        parameters: the trained tensors that `logits` reads.
        chunk: tokens a chunk.
    """
    options: dict[str, Any] = {"ignore_index": ignore_index, "label_smoothing": label_smoothing}
    if reduction == "none":
        # each token's gradient waits for its own weight, so the logits are made again in backward
        pairs = zip(torch.split(hidden, chunk), torch.split(targets, chunk), strict=True)
        losses = [checkpoint(_losses, logits, *pair, options, use_reentrant=False) for pair in pairs]
        return torch.cat(losses)  # type: ignore[arg-type]
    counted = targets != ignore_index
    # a tensor without values, as a plan of memory has them, counts as a whole
    total = len(targets) if type(targets).__name__ == "FakeTensor" else int(counted.sum())
    if 0 < total < len(targets):
        # tokens without a target cost nothing
        hidden, targets = hidden[counted], targets[counted]
    divisor = torch.tensor(total if reduction == "mean" else 1, device=hidden.device)

    def summed(rows: Tensor, part: slice) -> Tensor:
        return F.cross_entropy(logits(rows), targets[part], reduction="sum", **options)

    return in_chunks(summed, hidden, parameters, chunk, divisor)


def in_chunks(
    summed: Callable[[Tensor, slice], Tensor],
    hidden: Tensor,
    parameters: Sequence[Tensor],
    chunk: int,
    divisor: Tensor,
) -> Tensor:
    """The sum over all chunks of summed(hidden[part], part) / divisor, whose gradient is made beside it.

    Args:
        summed: (k, in), the slice of tokens that they are -> their loss; it lives for one chunk.
        hidden: (tokens, in).
        parameters: the trained tensors that `summed` reads.
        chunk: tokens a chunk.
        divisor: a number, on the device of `hidden`.
    """
    loss: Tensor = _ChunkedLoss.apply(summed, chunk, divisor, hidden, *parameters)  # type: ignore[no-untyped-call]
    return loss


def _torch_serves(*tensors: Tensor | None) -> bool:
    """Whether these are plain tensors of one wide dtype, outside of a compiled graph and of autocast."""
    there = [t for t in tensors if t is not None]
    plain = all(type(t) in (Tensor, nn.Parameter) for t in there) and len({t.dtype for t in there}) == 1
    wide = there[0].dtype in (torch.float32, torch.float64)
    return plain and wide and not torch.compiler.is_compiling() and not torch.is_autocast_enabled(there[0].device.type)


def _torch_s(
    hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None, ignore_index: int, reduction: str, chunk: int
) -> Tensor:
    """torch's own, on the tokens that count."""
    counted = targets != ignore_index
    if not bool(counted.all()):
        hidden, targets = hidden[counted], targets[counted]
    options = nn.LinearCrossEntropyOptions(
        batch_chunk_size=min(chunk, max(len(targets), 1)), chunking_method=None, allow_retain_graph=True
    )
    return F.linear_cross_entropy(hidden, weight, targets, linear_bias=bias, reduction=reduction, options=options)


def cut_cross_entropy(hidden: Tensor, weight: Tensor) -> Callable[..., Tensor] | None:
    """The kernel, where it is installed, fits and pays: half-precision tensors on a CUDA GPU and a trained head."""
    fits = (
        hidden.is_cuda
        and weight.requires_grad
        and hidden.dtype == weight.dtype
        and hidden.dtype in (torch.bfloat16, torch.float16)
    )
    if not fits or importlib.util.find_spec("cut_cross_entropy") is None:
        return None
    kernel: Callable[..., Tensor] = importlib.import_module("cut_cross_entropy").linear_cross_entropy
    return kernel


def _losses(logits: Callable[[Tensor], Tensor], rows: Tensor, classes: Tensor, options: dict[str, Any]) -> Tensor:
    return F.cross_entropy(logits(rows), classes, reduction="none", **options)


class _ChunkedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        summed: Callable[[Tensor, slice], Tensor],
        chunk: int,
        divisor: Tensor,
        hidden: Tensor,
        *parameters: Tensor,
    ) -> Tensor:
        needs = ctx.needs_input_grad[3:]
        total = None
        # fp16 would lose what is small until the scale of the loss is known, which comes in backward
        late = _meets_fp16(hidden, *parameters)
        grad_hidden = torch.empty_like(hidden) if needs[0] else None
        # a sum over many chunks in half precision drifts: fp32 or wider
        sums = [torch.zeros_like(p, dtype=torch.promote_types(p.dtype, torch.float32)) for p in parameters]
        for start in range(0, max(len(hidden), 1), chunk):
            rows = hidden[start : start + chunk].detach().requires_grad_(needs[0])
            with torch.set_grad_enabled(any(needs)):
                loss = summed(rows, slice(start, start + chunk)) / (1 if late else divisor)
            total = loss.detach() if total is None else total + loss.detach()
            wanted = [t for t, need in zip((rows, *parameters), needs, strict=True) if need]
            grads = list(torch.autograd.grad(loss, wanted)) if wanted else []
            if grad_hidden is not None:
                grad_hidden[start : start + chunk] = grads.pop(0)
            for accumulated, grad in zip(sums, grads, strict=True):
                accumulated += grad
        kept = sums if late else [s.to(p.dtype) for s, p in zip(sums, parameters, strict=True)]
        ctx.save_for_backward(divisor if late else None, grad_hidden, *kept)
        ctx.dtypes, ctx.chunk = [t.dtype for t in (hidden, *parameters)], chunk
        assert total is not None
        return total / divisor if late else total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        divisor, *sums = ctx.saved_tensors
        factor = (grad if divisor is None else grad / divisor).reshape(1)  # the upstream gradient is one number
        pairs = zip(sums, ctx.dtypes, strict=True)
        return None, None, None, *(None if s is None else _times(s, factor, dtype, ctx.chunk) for s, dtype in pairs)


def _meets_fp16(*tensors: Tensor) -> bool:
    """Whether the loss of these is computed in fp16, in part at least."""
    device = tensors[0].device.type
    cast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16
    return cast or any(t.dtype == torch.float16 for t in tensors)


def _times(sums: Tensor, factor: Tensor, dtype: torch.dtype, chunk: int) -> Tensor:
    """factor (1,) times a tensor, in the wider dtype of both, a chunk of rows at a time, then in `dtype`."""
    answer = torch.empty_like(sums, dtype=dtype)
    for part, some in zip(torch.split(answer, chunk), torch.split(sums, chunk), strict=True):
        part.copy_(some * factor)
    return answer
