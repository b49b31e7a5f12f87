"""Optimizer state of chosen entries, rows or columns of a parameter: gather, step, scatter, age, freeze, and change
the choice.

Sparse fine-tuning (SFT / SpIEL, LIFT), PaCA, rank growth (IncreLoRA), gates (SoRA), freezing schedules (LaMDA) and
coordinate subspaces all keep Adam moments for a few *slots* of a larger tensor, and change the slots while they
train. `Entries` is that state:

    index    (k,)  the slots: flat row-major positions (axis None), rows (axis 0) or columns (axis 1); rising
    age      (k,)  the steps each slot has taken, so that each has its own bias correction
    frozen   (k,)  slots that neither move nor age
    exp_avg, exp_avg_sq   moments of the gathered entries: (k,), (k, in) or (out, k); fp32, or fp64 for fp64 weights

When the choice changes, a slot that stays keeps its state bit for bit, a slot that comes starts from zero at age 0
(or is seeded), a slot that goes leaves nothing behind. `EntryAdamW` is the optimizer made of it.

Sources: per-entry ages after SpIEL (Ansell et al., 2024, arXiv 2401.16405); AdamW (Loshchilov and Hutter, 2017).
Deviations: LIFT's released code keeps one step count for old and new slots, and SpIEL's increments the age after the
step, which makes the first update of a slot 0.45 to 3.2 times too large or small; here a slot of age a is corrected
with a + 1, as AdamW corrects a new parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.optim.state import followed, restore, state_bytes

__all__ = ["Entries", "EntryAdamW"]


@dataclass(frozen=True)
class Entries:
    """Adam's state for the slots of one parameter. `step` works in place; every other change gives a new `Entries`."""

    index: Tensor  # (k,) int64, strictly increasing
    age: Tensor  # (k,) int32
    frozen: Tensor  # (k,) bool
    exp_avg: Tensor  # (k,) | (k, in) | (out, k), fp32 or wider
    exp_avg_sq: Tensor  # like exp_avg
    axis: int | None = None

    @classmethod
    def of(cls, parameter: Tensor, index: Tensor, axis: int | None = None) -> Entries:
        """Fresh state for the slots `index` of `parameter`, given in any order.

        Raises WeftError for slots that do not exist, or are given twice.
        """
        index = _checked(index.to(parameter.device, torch.int64), _count(parameter, axis))
        zeros = torch.zeros_like(_gather(parameter, index, axis), dtype=_wide(parameter))
        age = torch.zeros(index.numel(), dtype=torch.int32, device=parameter.device)
        return cls(index, age, age.bool(), zeros, zeros.clone(), axis)

    def gather(self, tensor: Tensor) -> Tensor:
        """The slots of a tensor of the parameter's shape: (k,), (k, in) or (out, k)."""
        return _gather(tensor, self.index, self.axis)

    def scatter_(self, tensor: Tensor, slots: Tensor) -> None:
        """Write `slots` into a tensor of the parameter's shape, in place; nothing else of it is touched."""
        if self.axis is None:
            tensor.view(-1)[self.index] = slots.to(tensor.dtype)
        else:
            tensor.index_copy_(self.axis, self.index, slots.to(tensor.dtype))

    def step(self, grad: Tensor, betas: tuple[float, float], eps: float) -> Tensor:
        """Age the live slots by one step; give their Adam direction from the gathered gradient, 0 where frozen.

            direction = exp_avg / (1 - b1^age) / (sqrt(exp_avg_sq / (1 - b2^age)) + eps)

        The caller multiplies by -lr and adds.
        """
        grad = grad.to(self.exp_avg.dtype)
        live = self.per_slot(~self.frozen).to(grad.dtype)
        # the weight 0 instead of 1 - beta leaves a frozen moment bit for bit where it was
        self.exp_avg.lerp_(grad, live * (1.0 - betas[0]))
        self.exp_avg_sq.lerp_(grad.square(), live * (1.0 - betas[1]))
        self.age.add_(~self.frozen)
        first, second = (self.per_slot(1.0 - beta ** self.age.double().clamp(min=1)).to(grad.dtype) for beta in betas)
        direction = (self.exp_avg / first) / ((self.exp_avg_sq / second).sqrt_().add_(eps))
        return direction.mul_(live)

    def change(self, index: Tensor) -> Entries:
        """The state for another choice of slots of the same parameter; `index` in any order."""
        index = _checked(index.to(self.index.device, torch.int64), None)
        carried = {name: self.align(getattr(self, name), index) for name in ("age", "frozen", "exp_avg", "exp_avg_sq")}
        return Entries(index=index, axis=self.axis, **carried)

    def align(self, tensor: Tensor, index: Tensor, fill: float = 0.0) -> Tensor:
        """A tensor kept per slot, carried over to the sorted choice `index`; slots that are new get `fill`."""
        place = torch.searchsorted(self.index, index)
        known = torch.zeros_like(index, dtype=torch.bool)
        if self.index.numel():
            place = place.clamp(max=self.index.numel() - 1)
            known = self.index[place] == index
        axis = 0 if tensor.dim() == 1 else (self.axis or 0)
        carried = tensor.new_full((*tensor.shape[:axis], index.numel(), *tensor.shape[axis + 1 :]), fill)
        return carried.index_copy_(axis, known.nonzero().squeeze(1), tensor.index_select(axis, place[known]))

    def freeze(self, index: Tensor, frozen: bool = True) -> Entries:
        """Freeze (or thaw) these slots of the parameter; a thawed slot goes on from the state it had.

        Raises WeftError for slots that are not chosen.
        """
        index = _checked(index.to(self.index.device, torch.int64), None)
        hit = torch.isin(self.index, index)
        if int(hit.sum()) != index.numel():
            raise WeftError(
                f"{index.numel() - int(hit.sum())} of the {index.numel()} slots to freeze are not chosen; "
                "freeze chosen slots only."
            )
        return replace(self, frozen=torch.where(hit, frozen, self.frozen))

    def seed(
        self, index: Tensor, mean: Tensor, mean_square: Tensor, age: Tensor, betas: tuple[float, float]
    ) -> Entries:
        """Give these slots the state that `age` steps of this mean gradient and mean square would have left (SpIEL).

        `mean` and `mean_square` are laid out like `exp_avg` restricted to `index`, which is sorted; the moments are
        stored times (1 - beta^age), so that bias correction returns the means.
        """
        hit = torch.isin(self.index, _checked(index.to(self.index.device, torch.int64), None)).nonzero().squeeze(1)
        if hit.numel() != index.numel():
            raise WeftError("Only chosen slots can be seeded; change the choice first.")
        axis = self.axis or 0
        corrections = [self.per_slot(1.0 - beta ** age.double()).to(self.exp_avg.dtype) for beta in betas]
        return replace(
            self,
            age=self.age.index_copy(0, hit, age.to(torch.int32)),
            exp_avg=self.exp_avg.index_copy(axis, hit, mean * corrections[0]),
            exp_avg_sq=self.exp_avg_sq.index_copy(axis, hit, mean_square * corrections[1]),
        )

    def per_slot(self, values: Tensor) -> Tensor:
        """(k,) values, shaped to broadcast over the gathered entries."""
        return values.unsqueeze(1) if self.axis == 0 else values

    def state(self) -> dict[str, Any]:
        """Tensors and plain numbers only; `Entries(**state)` is the same object again."""
        return {f.name: getattr(self, f.name) for f in fields(self)}


class EntryAdamW(torch.optim.Optimizer):
    """AdamW on the chosen entries, rows or columns of each parameter; all other weights stay bit for bit.

        w[index] <- w[index] - lr * weight_decay * w[index] - lr * direction        (live slots; see `Entries.step`)

    Args:
        params: parameters or groups.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`; eps is LIFT's and SpIEL's 1e-6.
        master: keep the chosen entries of bf16 or fp16 parameters in fp32 as well, so that steps below their spacing
            are not lost (k numbers more).

    Choose the slots with `choose` before the first step; call it again to change them.

    Raises WeftError for parameters of which nothing is chosen at `step`, for non-finite gradients, and for slots that
    do not exist.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-6,
        weight_decay: float = 0.0,
        master: bool = False,
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "master": master})

    def choose(self, parameter: nn.Parameter, index: Tensor, axis: int | None = None) -> None:
        """Train these slots of `parameter` from now on: flat positions, rows (axis 0) or columns (axis 1).

        Slots that were already chosen keep their state.
        """
        held = self._held(parameter)
        if held and held["axis"] != axis:
            raise WeftError(
                f"The slots of this parameter were chosen along axis {held['axis']}; "
                f"they cannot be changed along axis {axis}."
            )
        index = _checked(index.to(parameter.device, torch.int64), _count(parameter, axis))
        old = Entries.of(parameter, index, axis) if not held else self.entries(parameter)
        new = old.change(index)
        master = {}
        if self._keeps_master(parameter):
            # masters of the slots that stay are finer than the weights; newcomers start from the weights
            known = torch.isin(index, old.index) if held else torch.zeros_like(index, dtype=torch.bool)
            carried = old.align(held["master"], index) if held else new.exp_avg
            master["master"] = torch.where(new.per_slot(known), carried, new.gather(parameter.detach()).float())
        self.state[parameter] = new.state() | master

    def entries(self, parameter: nn.Parameter) -> Entries:
        """The state of this parameter's slots. Raises WeftError when none were chosen."""
        held = self._held(parameter)
        if not held:
            raise WeftError(
                f"No entries of a {tuple(parameter.shape)} parameter are chosen; "
                "call choose(parameter, index) before the first step."
            )
        return Entries(**{name: value for name, value in held.items() if name != "master"})

    def freeze(self, parameter: nn.Parameter, index: Tensor, frozen: bool = True) -> None:
        """Freeze (or, with `frozen=False`, thaw) chosen slots: they take no step, no decay, and do not age."""
        self.state[parameter].update(self.entries(parameter).freeze(index, frozen).state())

    def seed(self, parameter: nn.Parameter, index: Tensor, mean: Tensor, mean_square: Tensor, age: Tensor) -> None:
        """Start these slots from gradient statistics gathered before they were chosen; see `Entries.seed`."""
        betas = next(group["betas"] for group in self.param_groups if any(p is parameter for p in group["params"]))
        self.state[parameter].update(self.entries(parameter).seed(index, mean, mean_square, age, betas).state())

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step; returns what `closure` returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        work = [
            (p, self.entries(p).gather(p.grad), group)
            for group in self.param_groups
            for p in group["params"]
            if p.grad is not None
        ]
        if work and not torch.stack([torch.isfinite(grad).all() for _, grad, _ in work]).all():
            raise WeftError(
                "A gradient is not finite at the chosen entries; no weight was changed. "
                "Lower the learning rate or skip this batch."
            )
        for parameter, grad, group in work:
            self._step_one(parameter, grad, group)
        return loss

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore indices, ages, moments and masters exactly; the slots need not be chosen again."""
        restore(self, state_dict)

    def state_bytes(self) -> int:
        """Bytes of all slots' state."""
        return state_bytes(self)

    def _step_one(self, parameter: nn.Parameter, grad: Tensor, group: dict[str, Any]) -> None:
        entries, held = self.entries(parameter), self.state[parameter]
        stored = entries.gather(parameter)
        slots = followed(held.get("master", stored), stored).to(_wide(parameter))
        direction = entries.step(grad, group["betas"], group["eps"])
        moved = slots * (1.0 - group["lr"] * group["weight_decay"]) - group["lr"] * direction
        live = entries.per_slot(~entries.frozen)
        if "master" in held:
            held["master"] = torch.where(live, moved, slots)
        entries.scatter_(parameter, torch.where(live, moved.to(parameter.dtype), stored))

    def _held(self, parameter: nn.Parameter) -> dict[str, Any]:
        held: dict[str, Any] = self.state.get(parameter, {})
        return held

    def _keeps_master(self, parameter: nn.Parameter) -> bool:
        group = next((g for g in self.param_groups if any(p is parameter for p in g["params"])), None)
        if group is None:
            raise WeftError(
                "This parameter belongs to no group of the optimizer; add it before choosing entries of it."
            )
        return bool(group["master"]) and parameter.dtype in (torch.bfloat16, torch.float16)


def _wide(parameter: Tensor) -> torch.dtype:
    return torch.promote_types(parameter.dtype, torch.float32)


def _gather(tensor: Tensor, index: Tensor, axis: int | None) -> Tensor:
    return tensor.reshape(-1)[index] if axis is None else tensor.index_select(axis, index)


def _count(parameter: Tensor, axis: int | None) -> int:
    if axis is not None and (parameter.dim() != 2 or axis not in (0, 1)):
        raise WeftError(
            f"Rows (axis 0) and columns (axis 1) are chosen of a matrix; "
            f"this is axis {axis} of a {tuple(parameter.shape)} tensor."
        )
    if axis is None and not parameter.is_contiguous():
        raise WeftError(
            "Entries are chosen by flat position, which needs a contiguous parameter; call .contiguous() on it first."
        )
    return parameter.numel() if axis is None else parameter.shape[axis]


def _checked(index: Tensor, count: int | None) -> Tensor:
    index = index.flatten().sort().values
    if index.numel() > 1 and bool((index[1:] == index[:-1]).any()):
        raise WeftError("An entry is chosen twice; give distinct indices.")
    if count is not None and index.numel() and (int(index[0]) < 0 or int(index[-1]) >= count):
        raise WeftError(
            f"The chosen entries run from {int(index[0])} to {int(index[-1])}, but there are only 0 to {count - 1}."
        )
    return index
