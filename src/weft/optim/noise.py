"""Annealed gradient noise: Gaussian noise on every gradient entry, of a variance that falls with the step.

    g_t <- g_t + N(0, sigma_t^2),   sigma_t^2 = eta / (1 + t)^gamma,   t = 0, 1, 2, ...

It is added between clipping and the update, so it passes through momentum and Adam as a gradient does. Which numbers
are drawn depends on (seed, t, parameter, position) alone: a resumed run, and any sharding, sees the same noise.

Source: Neelakantan et al., 2015, arXiv 1511.06807.
Deviations: `scale="relative"` and `spare_zeros` are not the paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.optim.distributed import layout_of, local
from weft.optim.seeds import normal, runs
from weft.seeds import mix

__all__ = ["add_gradient_noise", "noise_deviation"]

_CHUNK = 1 << 20  # entries drawn at a time; part of what decides the noise


def add_gradient_noise(
    optimizer: torch.optim.Optimizer,
    eta: float = 0.01,
    gamma: float = 0.55,
    *,
    scale: Literal["absolute", "relative"] = "absolute",
    spare_zeros: bool = False,
    seed: int = 0,
) -> None:
    """Make every step of `optimizer` add annealed noise to the gradients first; `.grad` holds the noisy ones
    afterwards.

    Args:
        optimizer: any; it stays the same object. Step, seed and settings are kept in its parameter groups, so that they
            are saved and loaded with it.
        eta: variance at the first step; the paper chooses from 0.01, 0.3 and 1.0. It was tuned on networks of 10^4 to
            10^6 weights: a language model's gradient has entries of 1e-4 or less, which even 0.01 drowns; there, use
            scale="relative".
        gamma: decay of the variance.
        scale: "relative" multiplies the deviation by the root mean square of the parameter's gradient.
        spare_zeros: leave entries whose gradient is exactly zero (rows of unseen tokens, masked weights) without noise.
        seed: of the noise; the same on all processes, so that replicas stay equal.

    With `step(closure)` the noise is added to the gradients that the closure computes. Noise far smaller than a bf16
    gradient is rounded away. Raises WeftError for a negative eta or gamma, and for noise added twice.
    """
    if eta < 0 or gamma < 0 or scale not in ("absolute", "relative"):
        raise WeftError(
            f"eta and gamma are at least 0 and scale is 'absolute' or 'relative'; "
            f"these are {eta}, {gamma} and {scale!r}."
        )
    if any("noise_step" in group for group in optimizer.param_groups):
        raise WeftError("This optimizer already adds gradient noise; change its groups' noise_* entries instead.")
    settings = {"eta": eta, "gamma": gamma, "scale": scale, "spare_zeros": spare_zeros, "seed": seed, "step": 0}
    for group in optimizer.param_groups:
        group.update({f"noise_{name}": value for name, value in settings.items()})
    optimizer.register_step_pre_hook(_before_step)
    optimizer.register_load_state_dict_pre_hook(_before_load)


def noise_deviation(eta: float, gamma: float, step: int) -> float:
    """sigma_t, the standard deviation at step t (from 0): sqrt(eta) / (1 + t)^(gamma / 2)."""
    return float(eta**0.5 * (1 + step) ** (-gamma / 2))


def _before_step(optimizer: torch.optim.Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Add the noise now, or, where a closure computes the gradients, behind it."""
    closure = args[1] if len(args) > 1 else kwargs.get("closure")
    if closure is None:
        _add(optimizer)
        return None
    rest = {name: value for name, value in kwargs.items() if name != "closure"}
    return (args[0], _noisy(optimizer, closure), *args[2:]), rest


def _noisy(optimizer: torch.optim.Optimizer, closure: Callable[[], Any]) -> Callable[[], Any]:
    def then_add() -> Any:
        loss = closure()
        _add(optimizer)
        return loss

    return then_add


def _before_load(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    if any("noise_step" not in group for group in state_dict["param_groups"]):
        raise WeftError(
            "The state_dict was saved without gradient noise, and this optimizer adds it; load it first and call "
            "add_gradient_noise afterwards (the noise then begins at step 0)."
        )


@torch.no_grad()
def _add(optimizer: torch.optim.Optimizer) -> None:
    number = 0
    for group in optimizer.param_groups:
        sigma = noise_deviation(group["noise_eta"], group["noise_gamma"], group["noise_step"])
        for parameter in group["params"]:
            if parameter.grad is not None and sigma > 0:
                seed = mix(group["noise_seed"], group["noise_step"], number)
                _add_to(parameter.grad, sigma, seed, group["noise_scale"] == "relative", group["noise_spare_zeros"])
            number += 1
        group["noise_step"] += 1


def _add_to(grad: Tensor, sigma: float, seed: int, relative: bool, spare_zeros: bool) -> None:
    if relative:
        sigma *= _root_mean_square(grad)
    part = local(grad)
    flat = part.view(-1) if part.is_contiguous() else part.reshape(-1)
    for first, noise in _noise(grad, seed):
        piece = flat[first : first + noise.numel()]
        noise = noise.mul_(sigma).to(torch.promote_types(piece.dtype, torch.float32))
        piece.copy_(piece + (noise * (piece != 0) if spare_zeros else noise))
    if not part.is_contiguous():
        part.copy_(flat.view(part.shape))


def _noise(grad: Tensor, seed: int) -> Iterator[tuple[int, Tensor]]:
    """(position in the local part, standard normal numbers): this process's rows of the whole tensor's noise."""
    part, layout = local(grad), layout_of(grad, "A gradient")
    start = 0
    if layout.mesh is not None:
        group = layout.rows(grad.shape[0]).group
        width, each = grad[0].numel(), -(-grad.shape[0] // torch.distributed.get_world_size(group))
        start = min(torch.distributed.get_rank(group) * each, grad.shape[0]) * width
    for first, _, noise in runs(normal, seed, grad.numel(), part.device, _CHUNK, start, start + part.numel()):
        yield first - start, noise


def _root_mean_square(grad: Tensor) -> float:
    rows = layout_of(grad, "A gradient").rows(grad.shape[0] if grad.dim() else 1)
    return float((rows.sum(local(grad).float().square().sum()) / max(grad.numel(), 1)).sqrt())
