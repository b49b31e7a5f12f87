"""RoundedSteps: numbers of 8 bits take a step by being rounded at random (DQT, Zhao et al., 2024, arXiv 2412.04787)."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from weft.errors import WeftError
from weft.optim.base import Matrix, Rows
from weft.optim.inner import Adam8bit
from weft.rules.base import Rule, State
from weft.seeds import mix
from weft.terms import TrainedFloat

__all__ = ["RoundedSteps"]


class RoundedSteps(Rule):
    """Before the optimizer steps all else, every `TrainedFloat` takes AdamW's step of its gradient G = dL/dW:

        W <- round((1 - lr decay) W - lr m / (sqrt(v) + eps)),   to one of the two numbers beside, its mean exact

    lr and weight decay are the optimizer's own, of its first group. Moments are kept in float8, blocks of 256 a scale.
    Gradients are not clipped: a step's length hardly depends on theirs.

    Args:
        seed: of the rounding, which follows it, the step and the matrix alone.
    """

    uncounted = "moments and gradients of the matrices: 2 bytes a weight, and one more of the products' dtype"

    def __init__(self, seed: int) -> None:
        self.seed, self.inner = seed, Adam8bit(eps=1e-8, form="torch", code="float8")
        self.optimizer: torch.optim.Optimizer | None = None

    def bind(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def begin(self, model: nn.Module) -> None:
        self.codes = [term for _, term in self.all_terms() if isinstance(term, TrainedFloat)]
        if not self.codes:
            raise WeftError("There are no numbers of 8 bits to train among these terms; choose --method dqt.")
        self.pulls: list[Tensor | None] = [None] * len(self.codes)
        self.moments = [
            {name: torch.zeros(1, *field.shape, dtype=field.dtype, device=term.codes.device) for name, field in fields}
            for term in self.codes
            for fields in [self.inner.fields(Matrix(term.out_features, term.in_features, torch.float32)).items()]
        ]
        for i, term in enumerate(self.codes):
            probe = term.carrier.new_zeros(()).expand(term.out_features, term.in_features).detach().requires_grad_()
            # the gradient of a matrix comes as a whole, in the middle of the backward pass
            probe.register_post_accumulate_grad_hook(partial(self._see, i))  # type: ignore[no-untyped-call]
            term.probe = probe

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        if all(pull is None for pull in self.pulls) or self.optimizer is None:
            raise WeftError(
                "No gradient has reached the numbers of 8 bits: call bind(optimizer) and start(model) first."
            )
        group = self.optimizer.param_groups[0]
        for i, term in enumerate(self.codes):
            N, correction = self.inner.update(self._mean(i), self.moments[i], float(step), Rows(term.out_features))
            W = term.dense(torch.float32) * (1 - group["lr"] * self.optimizer.defaults.get("weight_decay", 0.0))
            W -= group["lr"] * correction * N[0]
            draws = torch.Generator(W.device).manual_seed(mix(self.seed, step, i))
            term.store(W, draws)
        self.pulls = [None] * len(self.codes)

    def after_step(self, model: nn.Module, step: int) -> None:
        if step == self.steps:
            for term in self.codes:
                term.probe = None

    def state_dict(self) -> State:
        return {f"{i}_{name}": tensor for i, own in enumerate(self.moments) for name, tensor in own.items()}

    def load_state_dict(self, state: Mapping[str, Tensor | int | float]) -> None:
        for i, own in enumerate(self.moments):
            for name, tensor in own.items():
                tensor.copy_(torch.as_tensor(state[f"{i}_{name}"]))

    def _see(self, i: int, probe: Tensor) -> None:
        """Of one micro-batch."""
        seen, before = probe.grad, self.pulls[i]
        probe.grad, self.pulls[i] = None, seen if before is None or seen is None else before.add_(seen)

    def _mean(self, i: int) -> Tensor:
        """The gradient (1, out, in) over all processes; zero for a matrix that no token met."""
        term, found = self.codes[i], self.pulls[i]
        if found is None:
            found = term.carrier.new_zeros(term.out_features, term.in_features)
        if dist.is_available() and dist.is_initialized():
            dist.all_reduce(found)
            found /= dist.get_world_size()
        return found.unsqueeze(0)
