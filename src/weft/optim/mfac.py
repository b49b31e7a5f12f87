"""M-FAC: the gradient preconditioned with the inverse empirical Fisher matrix of the last m gradients.

    F = lam I + (1/k) sum_i g_i g_i^T,   v <- beta v + (1 - beta) F^-1 g,   w <- w - lr v

The window holds the last m gradients, k = min(step, m) of them filled, the newest among them, and their m x m Gram
matrix; no matrix has d x d entries. A step costs two passes over the window, O(d m), and a Cholesky factorisation,
O(m^3) (`weft.linalg.fisher_window`).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weft.errors import WeftError, unknown
from weft.linalg.fisher_window import window_coefficients, window_combination, window_dots
from weft.optim.dither import stochastic_round
from weft.optim.state import restore, state_bytes
from weft.seeds import mix

__all__ = ["MFAC", "mfac"]

_BLOCKS = ("group", "parameter")


class MFAC(torch.optim.Optimizer):
    """M-FAC; `mfac` says what the arguments mean, and builds it on a model.

    The state of a parameter of d entries is its part of the window, m d numbers (and d of momentum); the first one of a
    block also has the Gram matrix (m, m), in fp64, and the number of steps. Under DDP every process holds all of it.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        gradients: int = 1024,
        damping: float = 1e-5,
        momentum: float = 0.0,
        weight_decay: float = 0.0,
        block: Literal["group", "parameter"] = "group",
        state_dtype: torch.dtype | None = None,
        seed: int = 0,
    ) -> None:
        if state_dtype is not None and not state_dtype.is_floating_point:
            raise WeftError(f"state_dtype is {state_dtype}, and gradients are kept in a floating-point dtype.")
        self.state_dtype, self.seed = state_dtype, seed
        defaults = {"lr": lr, "gradients": gradients, "damping": damping, "momentum": momentum}
        super().__init__(params, defaults | {"weight_decay": weight_decay, "block": block})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group, with a window of its own; its dictionary may override any hyperparameter."""
        super().add_param_group(param_group)
        try:
            _check(self.param_groups[-1])
        except WeftError:
            self.param_groups.pop()
            raise

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step of every parameter that has a gradient; for the others it was 0. Returns what `closure` returned.

        Raises WeftError for gradients that are not finite, before anything is changed, and for a window that does not
        fit into memory.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._refuse_nonfinite()
        number = 0
        for group in self.param_groups:
            for block in [group["params"]] if group["block"] == "group" else [[p] for p in group["params"]]:
                if any(p.grad is not None for p in block):
                    self._step_block(block, group, mix(self.seed, number))
                number += 1
        return loss

    def _step_block(self, block: Sequence[Tensor], group: Mapping[str, Any], seed: int) -> None:
        self._allocate(block, group)
        shared = self.state[block[0]]
        row, count = shared["step"] % group["gradients"], min(shared["step"] + 1, group["gradients"])
        held = [p for p in block if "window" in self.state[p]]
        gram = shared["gram"][:count, :count]  # rows are filled from the first, so that a young window costs little
        dots = torch.zeros_like(gram[row])
        for p in held:
            dots += self._exchange(p, row, count, group["weight_decay"])
        gram[row], gram[:, row] = dots, dots
        c = window_coefficients(gram, count, group["damping"], row)
        for i, p in enumerate(held):
            if p.grad is not None:
                self._move(p, c, group, mix(seed, shared["step"], i))
        shared["step"] += 1

    def _exchange(self, p: Tensor, row: int, count: int, decay: float) -> Tensor:
        """Put the newest gradient in the place of the oldest: this parameter's part of G g (k,), for the new G."""
        window = self.state[p]["window"][:count]
        if p.grad is None:
            window[row] = 0
        else:
            wide = torch.promote_types(p.dtype, torch.float32)
            window[row] = p.grad.to(wide).add(p, alpha=decay).reshape(-1) if decay else p.grad.reshape(-1)
        return window_dots(window, window[row])

    def _move(self, p: Tensor, c: Tensor, group: Mapping[str, Any], seed: int) -> None:
        state = self.state[p]
        update = window_combination(state["window"][: len(c)], c)
        if group["momentum"]:
            update = state["momentum"].lerp_(update.to(state["momentum"].dtype), 1 - group["momentum"])
        wide = torch.promote_types(p.dtype, torch.float32)
        moved = p.to(wide).sub(update.view(p.shape).to(wide), alpha=group["lr"])
        p.copy_(stochastic_round(moved, p.dtype, torch.Generator(p.device).manual_seed(seed)))

    # --- state --------------------------------------------------------------------------------------------------------

    def state_bytes(self) -> int:
        """Bytes of windows, Gram matrices and momentum that this process holds."""
        return state_bytes(self)

    def planned_bytes(self) -> int:
        """What `state_bytes` will be after a first step that reaches every trainable parameter."""
        total = 0
        for group in self.param_groups:
            blocks = 1 if group["block"] == "group" else sum(p.requires_grad for p in group["params"])
            total += blocks * 8 * group["gradients"] ** 2
            total += sum(self._part_bytes(p, group) for p in group["params"] if p.requires_grad)
        return total

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore the windows, in the dtypes they were saved in; the run goes on bit for bit."""
        restore(self, state_dict)

    def _allocate(self, block: Sequence[Tensor], group: Mapping[str, Any]) -> None:
        new = [p for p in block if p.requires_grad and "window" not in self.state[p]]
        if new:
            _refuse_too_large(sum(self._part_bytes(p, group) for p in new), new, group["gradients"])
        m = group["gradients"]
        if "gram" not in self.state[block[0]]:
            gram = torch.zeros(m, m, dtype=torch.float64, device=block[0].device)
            self.state[block[0]] |= {"gram": gram, "step": 0}
        for p in new:
            self.state[p]["window"] = torch.zeros(m, p.numel(), dtype=self._dtype(p), device=p.device)
            if group["momentum"]:
                wide = torch.promote_types(p.dtype, torch.float32)
                self.state[p]["momentum"] = torch.zeros(p.numel(), dtype=wide, device=p.device)

    def _dtype(self, p: Tensor) -> torch.dtype:
        return self.state_dtype or torch.promote_types(p.dtype, torch.float32)

    def _part_bytes(self, p: Tensor, group: Mapping[str, Any]) -> int:
        momentum = torch.promote_types(p.dtype, torch.float32).itemsize if group["momentum"] else 0
        return int(p.numel() * (group["gradients"] * self._dtype(p).itemsize + momentum))

    def _refuse_nonfinite(self) -> None:
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        fine = [torch.isfinite(grad).all().to(grads[0].device) for grad in grads]
        if fine and not torch.stack(fine).all():
            raise WeftError(
                "A gradient is not finite, and it would stay in the window; no weight was changed. "
                "Lower the learning rate or skip this batch."
            )

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"state_dtype": self.state_dtype, "seed": self.seed}


def mfac(
    model_or_groups: nn.Module | Iterable[Any],
    lr: float = 1e-3,
    *,
    gradients: int = 1024,
    damping: float = 1e-5,
    momentum: float = 0.0,
    weight_decay: float = 0.0,
    block: Literal["group", "parameter"] = "group",
    state_dtype: torch.dtype | None = None,
    seed: int = 0,
) -> MFAC:
    """M-FAC: natural-gradient steps w <- w - lr F^-1 g from the last gradients, of all trainable parameters or groups.

        F = lam I + (1/k) sum_i g_i g_i^T,   g_i = gradient + weight_decay * w,   k = min(step, m)

    Args:
        lr: to first order, the loss of a batch falls by up to lr * k in a step, whatever its scale.
        gradients: m, the window's length. It takes m numbers a trained weight: right for adapters and small models.
        damping: lam, absolute, in units of a squared gradient entry: it belongs to one loss scale and one batch size.
        momentum: beta, of the preconditioned gradients.
        weight_decay: added to the gradient before it enters the window, as released; so it is preconditioned too.
        block: one window for all parameters of a group, or one each, with F block-diagonal and m^3 work for each.
        state_dtype: of the window: torch.bfloat16 halves it; the Gram matrix is that of the rows as stored, in fp64.
        seed: of the stochastic rounding of bf16 and fp16 weights.

    The step grows as gradients shrink (about m / ||g||), so let the learning rate fall towards the end. Unscale fp16
    gradients first: lam is absolute.

    Raises WeftError for sharded parameters, hyperparameters out of range, gradients that are not finite, and a window
    larger than the memory of its device.

    Source: Frantar, Kurtic and Alistarh, 2021, arXiv 2107.03356; lr, m and lam of the released code (its example takes
    512 and its successor 1e-6).
    Deviations: the divisor is the number of gradients seen, not m, which makes the first m steps up to m times shorter
    and is the same afterwards; no subtraction of nearly equal vectors; no sparse mode, since weft's sparse terms train
    their values alone.
    """
    if isinstance(model_or_groups, nn.Module):
        named = [(name, p) for name, p in model_or_groups.named_parameters() if p.requires_grad]
        if not named:
            raise WeftError("No parameter of the model requires a gradient; there is nothing to train.")
        model_or_groups = named
    return MFAC(
        model_or_groups, lr, gradients=gradients, damping=damping, momentum=momentum, weight_decay=weight_decay,
        block=block, state_dtype=state_dtype, seed=seed,
    )  # fmt: skip


def _check(group: Mapping[str, Any]) -> None:
    if group["gradients"] < 1 or not group["damping"] > 0 or not 0 <= group["momentum"] < 1:
        raise WeftError(
            f"M-FAC takes 1 gradient or more, damping above 0 and momentum from 0 to below 1; these are "
            f"{group['gradients']}, {group['damping']} and {group['momentum']}."
        )
    if group["block"] not in _BLOCKS:
        raise unknown("block of the Fisher matrix", group["block"], _BLOCKS)
    if any(isinstance(p, DTensor) for p in group["params"]):
        raise WeftError(
            "M-FAC compares whole gradients of the past with the newest, and sharded parameters have parts of them on "
            "each process; train with DDP, or choose a subspace optimizer such as galore."
        )
    if group["block"] == "group" and len({p.device for p in group["params"]}) > 1:
        raise WeftError('One window lies on one device; use block="parameter", or a group for each device.')


def _refuse_too_large(need: int, block: Sequence[Tensor], gradients: int) -> None:
    free = _memory(block[0].device)
    if free is not None and need > free:
        weights = sum(p.numel() for p in block)
        raise WeftError(
            f"A window of {gradients} gradients of {weights:,} weights takes {need / 1e9:.1f} GB, "
            f"and {block[0].device} has {free / 1e9:.1f} GB; keep fewer gradients, keep them in bfloat16 "
            "(state_dtype), or train fewer weights, such as an adapter's."
        )


def _memory(device: torch.device) -> int | None:
    """Bytes that could be had: a CPU's whole memory, or what a GPU has free; None where it is not known."""
    if device.type == "cpu":
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    if device.type != "cuda":
        return None
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + kept
