"""ConcurrentAdversary: each batch once more with its embeddings moved to where older weights lose most (ConAdv)."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call

from weft.errors import WeftError
from weft.rules.base import Rule, State

__all__ = ["ConcurrentAdversary"]


class ConcurrentAdversary(Rule):
    """Adds omega L(w_t; e + d) to the loss, e the embedded tokens, d = eps rms(e) sign(dL/de) at the weights of `delay`
    steps before (Liu et al., 2021, arXiv 2106.00221). The first `delay` steps have none.

    Args:
        eps: of the embeddings' root mean square; 0 for none.
        omega: weight of the moved batch; 0 for none.
        delay: tau; 0 for the present weights.
    """

    uncounted = "a second pass of each batch, and older weights"

    def __init__(self, eps: float, omega: float, delay: int) -> None:
        if min(eps, omega, delay) < 0 or delay != int(delay):
            raise WeftError(f"eps is {eps}, omega {omega} and delay {delay}: give numbers from 0, delay a whole one.")
        self.eps, self.omega, self.delay = eps, omega, int(delay)
        self.batch: dict[str, Any] | None = None

    def begin(self, model: nn.Module) -> None:
        self.names = [name for name, p in model.named_parameters() if p.requires_grad]
        self.older: deque[list[Tensor]] = deque(maxlen=self.delay)
        if any(isinstance(p, DTensor) for p in model.parameters()):
            raise WeftError("Adversarial batches of older weights need whole parameters: train without FSDP.")
        if self.eps and self.omega:
            self.hang(model.register_forward_pre_hook(self._see, with_kwargs=True))

    def penalty(self, model: nn.Module) -> Tensor | None:
        batch, self.batch = self.batch, None
        if batch is None or len(self.older) < self.delay:
            return None
        self.batch = {}  # the hook sees no batch of ours
        try:
            moved = self.moved(model, batch)
            loss: Tensor = model(**{**batch, "input_ids": None, "inputs_embeds": moved}).loss
        finally:
            self.batch = None
        return self.omega * loss

    def moved(self, model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
        """e + d (rows, length, width) of a batch, without a gradient to the attack's weights; e keeps its own."""
        embedded = model.get_input_embeddings()(batch["input_ids"])  # type: ignore[operator]
        probe = embedded.detach().requires_grad_(True)
        old = dict(zip(self.names, self.older[0], strict=True)) if self.delay else {}
        with torch.enable_grad():
            named = {**batch, "input_ids": None, "inputs_embeds": probe}
            loss = functional_call(model, old, kwargs=named).loss
            (slope,) = torch.autograd.grad(loss, probe)
        return embedded + self.eps * probe.detach().square().mean().sqrt() * slope.sign()

    @torch.no_grad()
    def before_step(self, model: nn.Module, step: int) -> None:
        if self.delay:
            self.older.append([p.detach().clone() for p in self._parameters(model)])

    def after_step(self, model: nn.Module, step: int) -> None:
        self.batch = None
        if step == self.steps:
            self.close()

    def state_dict(self) -> State:
        return {f"{i}_{j}": tensor for i, held in enumerate(self.older) for j, tensor in enumerate(held)}

    def load_state_dict(self, state: Mapping[str, Tensor | int | float]) -> None:
        self.older.clear()
        for i in range(len(state) // max(1, len(self.names))):
            self.older.append([state[f"{i}_{j}"] for j in range(len(self.names))])  # type: ignore[misc]

    def _parameters(self, model: nn.Module) -> list[nn.Parameter]:
        return [model.get_parameter(name) for name in self.names]

    def _see(self, model: nn.Module, args: tuple[Any, ...], named: dict[str, Any]) -> None:
        if self.batch is None and model.training and named.get("input_ids") is not None and "labels" in named:
            # a penalty is a mean, as one of a single batch is; the trainer weighs it
            self.batch = {name: value for name, value in named.items() if name != "num_items_in_batch"}
