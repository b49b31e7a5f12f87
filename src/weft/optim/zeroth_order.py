"""Zeroth-order training (the MeZO family): gradients from loss differences along random directions, no backward pass.

    g = (1/q) sum_k d_k / eps * u_k,    d_k = [f(w + eps u_k) - f(w - eps u_k)] / 2   or   f(w + eps u_k) - f(w)
    w <- w - lr * inner(g)

The directions u_k are never stored but drawn again from seeds, and the perturbed weights exist only while the layer
that holds them runs (`weft.optim.perturb`), after which they are restored bit for bit. Memory is that of inference,
plus the moments of the inner rule if it has any. The log of the d_k rebuilds the trained model (`replay`).

Sources: MeZO (Malladi et al., 2023, arXiv 2305.17333); the variants of Zhang et al., 2024 (arXiv 2402.11592).
Deviations: weights are restored exactly (MeZO's code adds, subtracts and adds again, which drifts 12 % in bf16 over
1000 steps); bf16 and fp16 updates are rounded stochastically, since most are below the weights' spacing; masks keep the
stated share (ZO-Bench compares normal numbers with it and keeps others); sign is entrywise, and `conservative` compares
w and w -+ lr g exactly (ZO-Bench passes both through AdamW); with blocks every tensor has its own direction (ZO-Bench
gives equal shapes the same). Forward gradients (a JVP) and the ZO / first-order hybrid are not here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from weft.errors import WeftError
from weft.optim.base import Inner, Matrix, Rows
from weft.optim.closure import average, loss_of, steady
from weft.optim.directions import Directions, Estimator
from weft.optim.inner import SGD, Adam, Lion
from weft.optim.perturb import Edit, InPlace, write
from weft.optim.seed_log import SeedLog
from weft.optim.sinkgd import Sign
from weft.optim.state import restore, state_bytes
from weft.seeds import mix

__all__ = ["Estimator", "ZerothOrder", "mezo", "replay"]


_INNERS: dict[str, Callable[..., Inner]] = {"SGD": SGD, "Adam": Adam, "Lion": Lion, "Sign": Sign}

Run = tuple[int, int, Tensor]
Loss = Callable[[], float]


class ZerothOrder(torch.optim.Optimizer):
    """`step(closure)` trains on the loss that the closure returns, of one fixed batch and without backward.

    Args:
        params: parameters or groups; frozen ones are left out. Groups may set `lr` and `eps` of their own.
        lr: learning rate; it has to fall as one over the number of entries that are trained.
        eps: size of the perturbation of each entry.
        model: the module that holds the parameters. It is evaluated in eval mode, and its layers are perturbed one at a
            time; without it the whole set is perturbed at once, at up to 20 % more memory.
        estimator, inner: how the gradient is estimated, and which rule takes it: SGD, Adam, AdamW, Lion or Sign.
        conservative: of w, w - lr g and w + lr g keep the one of the lowest loss (three more losses; plain SGD only).
        seed: of all directions and roundings.
        nonfinite: raise a WeftError at a loss that is not finite, or skip that step; the weights stay either way.

    In a torch.distributed run the losses are averaged over the processes, which is all that is communicated: every
    process draws the same directions. Each must hold the whole weights.

    Raises WeftError for a missing closure, a loss that is no finite fp32 scalar, sharded or non-contiguous parameters.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-6,
        *,
        eps: float = 1e-3,
        model: nn.Module | None = None,
        estimator: Estimator = Estimator(),  # noqa: B008  (frozen)
        inner: Inner = SGD(momentum=0.0),  # noqa: B008  (frozen)
        conservative: bool = False,
        seed: int = 0,
        nonfinite: Literal["raise", "skip"] = "raise",
    ) -> None:
        super().__init__(_trainable(params), {"lr": lr, "eps": eps})
        self._parameters: list[nn.Parameter] = [p for group in self.param_groups for p in group["params"]]
        names = {id(p): name for name, p in model.named_parameters()} if model is not None else {}
        self._names = [names.get(id(p), str(number)) for number, p in enumerate(self._parameters)]
        for name, parameter in zip(self._names, self._parameters, strict=True):
            _check(parameter, name)
        if type(inner) not in _INNERS.values():
            raise WeftError(
                f"{type(inner).__name__} keeps state that is not entry by entry; the inner rules of zeroth-order "
                "training are "
                f"{', '.join(_INNERS)}."
            )
        if conservative and inner != SGD(momentum=0.0):
            raise WeftError("conservative compares plain steps; leave the inner rule at SGD(momentum=0.0).")
        self.estimator, self.inner, self.seed = estimator, inner, seed
        self._model, self._conservative, self._nonfinite = model, conservative, nonfinite
        self._in_place = InPlace(self._parameters, model)
        self._directions = Directions(estimator, self._parameters)
        self._group_of = [g for g, group in enumerate(self.param_groups) for _ in group["params"]]
        self._blocks = self._numbers_by_group() if estimator.blockwise else [list(range(len(self._parameters)))]
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._updates = [0] * len(self._blocks)
        for number, parameter in enumerate(self._parameters):
            self.state[parameter].update(self._buffers(number))

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Tensor:  # type: ignore[override]
        """One step on the batch whose loss `closure` returns; gives the mean of the losses seen (near f(w)), fp32."""
        if closure is None:
            raise WeftError(
                "Zeroth-order training needs the loss: call step(closure) with a closure that returns it, no backward."
            )
        rates = torch.tensor([[group["lr"], group["eps"]] for group in self.param_groups], dtype=torch.float32)
        differences = torch.full((len(self._blocks), self.estimator.samples), torch.nan)
        finished, seen = False, []
        try:
            with steady(self._model, self._parameters) as again:
                for number in range(len(self._blocks)):
                    seen.append(self._step_block(number, lambda: loss_of(closure, again), differences, rates))
            finished = True
        finally:
            # blocks that moved before an error belong to the log too
            if finished or bool(torch.isfinite(differences).any()):
                self._rows.append((differences, rates))
        return torch.stack(seen).mean().float()

    def log(self) -> SeedLog:
        """What happened so far: seeds and scalars (see `replay`)."""
        return SeedLog.of_rows(self._config(), self._rows, len(self._blocks), len(self.param_groups))

    def state_dict(self) -> dict[str, Any]:
        """torch's, and the log."""
        log = self.log()
        record = {"config": log.config, "differences": log.differences, "rates": log.rates}
        return {**super().state_dict(), "log": record}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Go on from a saved run, bit for bit, the log included.

        Raises WeftError for another optimizer's state or setting.
        """
        if "log" not in state_dict:
            raise WeftError("The state_dict comes from another optimizer: it has no log of zeroth-order steps.")
        log = SeedLog(**state_dict["log"])
        self._must_match(log)
        restore(self, {name: value for name, value in state_dict.items() if name != "log"})
        self.seed = log.config["seed"]
        self._updates = torch.isfinite(log.differences).all(-1).sum(0).tolist()
        self._rows = list(zip(log.differences.clone(), log.rates.clone(), strict=True))

    def state_bytes(self) -> int:
        """Bytes of the inner rule's moments and of the log."""
        return state_bytes(self) + self.log().nbytes

    # one step, from its seed and its numbers

    def _step_block(self, number: int, loss: Loss, differences: Tensor, rates: Tensor) -> Tensor:
        """Measure one block's differences, move it, and write them down in row `number`; the mean of the losses."""
        step = len(self._rows)
        losses = self._losses(loss, number, rates)
        if torch.isfinite(losses).all():
            found = ((losses[:, 0] - losses[:, 1]) / (2.0 if self.estimator.two_sided else 1.0)).float()
            if self._conservative:
                found *= self._best(loss, number, found, rates)
            self._apply(step, number, found, rates)
            differences[number] = found
        elif self._nonfinite == "raise":
            raise WeftError(
                f"The loss of zeroth-order step {step} is not finite; its update was not made. Lower lr or eps, or "
                "pass "
                "nonfinite='skip'."
            )
        return losses.mean()

    def _losses(self, loss: Loss, number: int, rates: Tensor) -> Tensor:
        """(q, 2): f(w + eps u_k), f(w - eps u_k), or f(w) in the second place; fp64, averaged over the processes."""
        sides = (1.0, -1.0) if self.estimator.two_sided else (1.0,)
        here = [] if self.estimator.two_sided else [loss()]
        seen: list[float] = []
        for k in range(self.estimator.samples):
            seen += [
                self._in_place.evaluate(loss, self._perturbation(k, number, rates * side)) for side in sides
            ] + here
        return self._average(seen).view(-1, 2)

    def _perturbation(self, k: int, number: int, rates: Tensor) -> Edit:
        step, block = len(self._rows), self._blocks[number]

        def deltas(i: int) -> Iterator[Run]:
            eps = float(rates[self._group_of[i], 1])
            for first, last, u in self._directions.runs(self.seed, step, k, i, block):
                yield first, last, u.mul_(eps)

        return Edit(block, deltas)

    def _apply(self, step: int, number: int, differences: Tensor, rates: Tensor) -> None:
        """The update of one block: a function of its arguments, the seed, the weights and the moments alone."""
        edit = self._update(step, number, differences, rates)
        for i in self._blocks[number]:
            write(self._parameters[i], i, edit)
        self._updates[number] += 1

    def _update(self, step: int, number: int, differences: Tensor, rates: Tensor) -> Edit:
        t = 1 + self._updates[number]

        def deltas(i: int) -> Iterator[Run]:
            lr, eps = rates[self._group_of[i]].tolist()
            for first, last, g in self._estimate(step, number, i, (differences.double() / eps).tolist()):
                state = {name: value.view(-1)[first:last].view(1, 1, -1) for name, value in self._moments(i).items()}
                N, correction = self.inner.update(g.view(1, 1, -1), state, t, Rows(1))
                yield first, last, (N * (-lr * correction)).view(-1)

        return Edit(self._blocks[number], deltas, lambda i, first: mix(self.seed, step, -1, i, first))

    def _estimate(self, step: int, number: int, i: int, coefficients: list[float]) -> Iterator[Run]:
        """g over parameter i: the mean of the directions times their coefficients."""
        count, block = len(coefficients), self._blocks[number]
        for parts in zip(*(self._directions.runs(self.seed, step, k, i, block) for k in range(count)), strict=True):
            g = torch.zeros_like(parts[0][2])
            for coefficient, (_, _, u) in zip(coefficients, parts, strict=True):
                g.add_(u, alpha=coefficient / count)
            yield parts[0][0], parts[0][1], g

    def _best(self, loss: Loss, number: int, differences: Tensor, rates: Tensor) -> float:
        """0, 1 or -1: which of w, w - lr g, w + lr g has the lowest loss."""
        sides = (0.0, 1.0, -1.0)
        edits = [self._update(len(self._rows), number, differences * side, rates) for side in sides]
        losses = self._average([self._in_place.evaluate(loss, edit) for edit in edits])
        return sides[int(losses.nan_to_num(torch.inf).argmin())]

    def _average(self, losses: list[float]) -> Tensor:
        return average(torch.tensor(losses, dtype=torch.float64), self._parameters[0].device)

    # moments, groups, configuration

    def _buffers(self, number: int) -> dict[str, Tensor]:
        parameter = self._parameters[number]
        matrix = Matrix(1, parameter.numel(), torch.promote_types(parameter.dtype, torch.float32))
        fields = self.inner.fields(matrix)
        return {
            name: torch.zeros(parameter.shape, dtype=field.dtype, device=parameter.device)
            for name, field in fields.items()
        }

    def _moments(self, number: int) -> dict[str, Tensor]:
        return dict(self.state.get(self._parameters[number], {}))

    def _numbers_by_group(self) -> list[list[int]]:
        numbers = iter(range(len(self._parameters)))
        return [[next(numbers) for _ in group["params"]] for group in self.param_groups]

    def _config(self) -> dict[str, Any]:
        sizes = [len(group["params"]) for group in self.param_groups]
        config = {
            "seed": self.seed,
            "estimator": asdict(self.estimator),
            "inner": {"name": type(self.inner).__name__, **asdict(self.inner)},  # type: ignore[call-overload]
            "chunk": self._directions.chunk,
            "groups": sizes,
            "parameters": [
                [name, list(p.shape), str(p.dtype).removeprefix("torch."), p.device.type]
                for name, p in zip(self._names, self._parameters, strict=True)
            ],
        }
        # as it will be read from a file: tuples become lists
        as_read: dict[str, Any] = json.loads(json.dumps(config))
        return as_read

    def _must_match(self, log: SeedLog) -> None:
        own = self._config()
        for name in own:
            if name != "seed" and log.config.get(name) != own[name]:
                raise WeftError(
                    f"The saved zeroth-order run differs in its {name}: it has "
                    f"{_first_difference(log.config.get(name), own[name])}."
                )


def mezo(
    model_or_groups: nn.Module | Iterable[Any],
    lr: float = 1e-6,
    *,
    eps: float = 1e-3,
    samples: int = 1,
    direction: Literal["gaussian", "rademacher", "sphere"] = "gaussian",
    seed: int = 0,
    **options: Any,
) -> ZerothOrder:
    """MeZO: two-sided differences along one Gaussian direction, plain steps (Malladi et al., 2023, arXiv 2305.17333).

    Trains every parameter that requires a gradient. The published settings for OPT-13B: all weights lr 1e-6 or 1e-7
    with eps 1e-3; prefixes lr 1e-2 or 1e-3 with eps 1e-1; LoRA lr 1e-4 or 5e-5 with eps 1e-2; batch 16, 20,000 steps,
    constant learning rate. `options` are those of `ZerothOrder` and `Estimator`.

        optimizer = mezo(model, lr=1e-6)
        loss = optimizer.step(lambda: model(**batch).loss)
    """
    fields = {name: options.pop(name) for name in ("two_sided", "density", "redraw", "blockwise") if name in options}
    estimator = Estimator(samples=samples, direction=direction, **fields)
    if options.pop("rank", None) or options.pop("weight_decay", 0.0):
        raise WeftError("mezo has neither a rank nor weight decay; leave them out (rank None, weight_decay 0).")
    model = model_or_groups if isinstance(model_or_groups, nn.Module) else None
    params: Any = model_or_groups
    if model is not None:
        params = _by_block(model) if estimator.blockwise else list(model.parameters())
    options.setdefault("model", model)
    return ZerothOrder(params, lr, eps=eps, estimator=estimator, seed=seed, **options)  # type: ignore[arg-type]


def _by_block(model: nn.Module) -> list[dict[str, Any]]:
    """A group for each block, and for each module outside of them, such as embeddings and the last norm."""
    found: dict[str, list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        block = re.match(r".*?\.\d+(?=\.)", name)
        found.setdefault(block[0] if block else name.rpartition(".")[0], []).append(parameter)
    return [{"params": params} for params in found.values()]


@torch.no_grad()
def replay(model_or_parameters: nn.Module | Iterable[nn.Parameter], log: SeedLog) -> None:
    """Train again without data: apply a log's steps to the weights the run started from, in place.

    Args:
        model_or_parameters: the model the run was given; or, for a run on bare parameters, those in the same order.

    The weights are then those of the run, bit for bit on the same kind of device. Raises WeftError when a parameter of
    the log is missing, or of another shape, dtype or kind of device.
    """
    model = model_or_parameters if isinstance(model_or_parameters, nn.Module) else None
    named = _named(model_or_parameters)
    names = [row[0] for row in log.config["parameters"]]
    absent = [name for name in names if name not in named]
    if absent:
        raise WeftError(f"The log trained {absent[0]!r}, which is not here; replay it on the model it was made with.")
    frozen = [named[name] for name in names if not named[name].requires_grad]
    try:
        for parameter in frozen:
            parameter.requires_grad_(True)
        _replay([named[name] for name in names], model, log)
    finally:
        for parameter in frozen:
            parameter.requires_grad_(False)


def _replay(parameters: list[nn.Parameter], model: nn.Module | None, log: SeedLog) -> None:
    rest = iter(parameters)
    groups = [{"params": [next(rest) for _ in range(size)]} for size in log.config["groups"]]
    options = dict(log.config["inner"])
    inner = _INNERS[options.pop("name")](**options)
    estimator = Estimator(**log.config["estimator"])
    optimizer = ZerothOrder(groups, model=model, estimator=estimator, inner=inner, seed=log.config["seed"])
    optimizer._must_match(log)
    for step, (differences, rates) in enumerate(zip(log.differences, log.rates, strict=True)):
        for number, row in enumerate(differences):
            if torch.isfinite(row).all():
                optimizer._apply(step, number, row, rates)


def _named(model_or_parameters: nn.Module | Iterable[nn.Parameter]) -> dict[str, nn.Parameter]:
    if isinstance(model_or_parameters, nn.Module):
        return dict(model_or_parameters.named_parameters())
    return {str(number): parameter for number, parameter in enumerate(model_or_parameters)}


def _trainable(params: Iterable[Any]) -> list[Any]:
    """Parameters or groups without the frozen ones. Raises WeftError when nothing is left."""
    given = list(params)
    groups = given if given and isinstance(given[0], dict) else [{"params": given}]
    kept = [{**group, "params": [p for p in group["params"] if p.requires_grad]} for group in groups]
    kept = [group for group in kept if group["params"]]
    if not kept:
        raise WeftError("No parameter requires a gradient, so there is nothing to train; unfreeze some first.")
    return kept


def _check(parameter: nn.Parameter, name: str) -> None:
    if isinstance(parameter, DTensor):
        raise WeftError(f"{name} is sharded; zeroth-order training keeps the whole weights on every process.")
    if not parameter.is_floating_point() or not parameter.is_contiguous():
        raise WeftError(f"{name} is not a contiguous floating-point tensor, so it cannot be perturbed; freeze it.")


def _first_difference(saved: Any, own: Any) -> str:
    if isinstance(saved, list) and isinstance(own, list) and len(saved) == len(own):
        saved, own = next((pair for pair in zip(saved, own, strict=True) if pair[0] != pair[1]), (saved, own))
    return f"{saved}, and this optimizer has {own}"
