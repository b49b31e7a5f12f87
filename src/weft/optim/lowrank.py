"""`LowRank`: any projection x inner rule x residual x limiter as one `torch.optim.Optimizer` (contract:
`optim.base`)."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any, Literal

import torch
from torch import Tensor

from weft.errors import WeftError
from weft.optim.base import Frame, Inner, Projection, Refresh, Residual, Rows, Scalar, State
from weft.optim.batch import Batch, Member, Recipe, member_of, part, steps_apart
from weft.optim.distributed import local
from weft.optim.inner import Adam
from weft.optim.limiter import NormGrowth
from weft.optim.projections import Blocks, DenseFrame, Subspace, Whole
from weft.optim.refresh import refresh_subspaces
from weft.optim.state import followed, restore
from weft.seeds import mix

__all__ = ["LowRank"]

# Entries of one elementwise piece of work, and of one batch of matrices: they bound the workspace.
_SLICE = {"cpu": 1 << 17, "cuda": 1 << 25}
_BATCH = {"cpu": 1 << 20, "cuda": 1 << 25}
_RECIPE = tuple(f.name for f in fields(Recipe))


class LowRank(torch.optim.Optimizer):
    """Full-parameter training with optimizer state in a subspace of each weight's gradient.

        R = X P;  (N, c) = inner(R);  W <- W - lr (scale c N P^T + limiter(residual(X, R, N)))

    Args:
        groups: parameters, (name, parameter) pairs, or dictionaries with "params" and any of the keyword arguments
            below (lr, weight_decay, projection, inner, ...), which then hold for that group. With
            `projection=Whole()` a group may hold tensors of any shape.
        lr: learning rate. Schedulers change it through `param_groups` as ever.
        projection: the subspace (`weft.optim.projections`); default `Subspace(128)`.
        inner: the rule inside it (`weft.optim.inner`); default Adam in GaLore's form.
        residual: what happens to the rest of the gradient (`weft.optim.residual`); default nothing.
        limiter: bounds the growth of the residual's norm; default none.
        refresh: steps between two choices of the subspace, or a `Refresh`.
        moments: at a refresh "keep" them as they are, "rotate" them into the new basis, or "reset" them and their age.
        scale: factor of the update inside the subspace.
        side: which side is projected: the "short" one, or "left" (out) or "right" (in). Weights sharded on dimension
            0 are projected on the right, the side every process holds whole.
        weight_decay: decoupled; before the update for AdamW's form and after it for GaLore's.
        rounding: of bfloat16 weights: "nearest", "stochastic" (unbiased), or "master" (fp32 copies in the state).
        state_dtype: dtype of basis and moments; default each weight's own.
        nonfinite: NaN or infinite gradients: None does not look (a refresh still raises), "skip" leaves the whole step
            out, "raise" raises. Looking costs one number sent to the host a step.
        seed: of random projections and stochastic rounding.
        compiled: run the arithmetic of a step through torch.compile, which fuses what lies between the products: the
            same numbers to rounding, after some seconds of compilation. Refreshes stay as they are.

    Raises WeftError for a group that does not fit its recipe, a repeated parameter, or a state_dict of another recipe.
    """

    in_batches = True  # of several matrices of one shape, as `weft.plan` asks

    def __init__(
        self,
        groups: Iterable[Any],
        lr: float = 1e-3,
        *,
        projection: Projection | Blocks | None = None,
        inner: Inner | None = None,
        residual: Residual | None = None,
        limiter: NormGrowth | None = None,
        refresh: int | Refresh = 200,
        moments: Literal["keep", "rotate", "reset"] = "keep",
        scale: float = 1.0,
        side: Literal["short", "left", "right"] = "short",
        weight_decay: float = 0.0,
        rounding: Literal["nearest", "stochastic", "master"] = "nearest",
        state_dtype: torch.dtype | None = None,
        nonfinite: Literal["skip", "raise"] | None = None,
        seed: int = 0,
        compiled: bool = False,
    ) -> None:
        self._default = Recipe(
            projection or Subspace(128), inner or Adam(), residual, limiter, _refresh(refresh), moments, scale, side,
            rounding, state_dtype,
        )  # fmt: skip
        self._recipes: list[Recipe] = []
        self._members: list[list[Member]] = []
        self._batches: list[Batch] = []
        self._places: dict[Tensor, tuple[Batch, int]] = {}
        self._built: list[Tensor] | None = None
        self.nonfinite, self.seed, self.compiled = nonfinite, seed, compiled
        self._arithmetic = _arithmetic(compiled)
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its dictionary may override any piece of the recipe."""
        group = dict(param_group)
        changes = {name: group.pop(name) for name in _RECIPE if name in group}
        if "refresh" in changes:
            changes["refresh"] = _refresh(changes["refresh"])
        recipe = _checked(Recipe(**{name: getattr(self._default, name) for name in _RECIPE} | changes))
        given = group["params"]
        group["params"] = [given] if isinstance(given, Tensor) else list(given)
        self._refuse_repeats(group["params"])
        super().add_param_group(group)
        added, number = self.param_groups[-1], len(self._recipes)
        added["recipe"] = recipe.describe()
        names = added.get("param_names") or [f"parameter {i} of group {number}" for i in range(len(added["params"]))]
        try:
            members = [member_of(p, n, i, recipe) for i, (p, n) in enumerate(zip(added["params"], names, strict=True))]
        except WeftError:
            self.param_groups.pop()
            raise
        self._recipes.append(recipe)
        self._members.append(members)
        self._built = None

    def _refuse_repeats(self, params: Sequence[Any]) -> None:
        seen = {p for group in self.param_groups for p in group["params"]}
        for entry in params:
            name, p = entry if isinstance(entry, tuple) else ("A parameter", entry)
            if p in seen:
                raise WeftError(f"{name} is in the groups twice (tied weights?); give each parameter once.")
            seen.add(p)

    # --- the step -----------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """One step for every parameter that has a gradient. A closure is evaluated once, with gradients enabled."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.prepare()
        work = [(batch, ready) for batch in self._batches if (ready := _ready(batch))]
        if self.nonfinite is None or self._all_finite(work):
            for batch, ids in work:
                self._advance(batch, ids)
        return loss

    @torch.no_grad()
    def step_one(self, parameter: Tensor) -> None:
        """Step a single parameter, for per-layer updates; it must have a gradient."""
        self.prepare()
        batch, i = self._places[parameter]
        if self.nonfinite is None or self._all_finite([(batch, [i])]):
            self._advance(batch, [i])

    def prepare(self) -> None:
        """Stack parameters of one shape into batches, if the trainable ones are not those of the last step."""
        trainable = [m.parameter for members in self._members for m in members if m.parameter.requires_grad]
        same = self._built is not None and len(trainable) == len(self._built)
        same = same and all(a is b for a, b in zip(trainable, self._built or [], strict=True))
        if same and not any(_new_period(batch) for batch in self._batches):
            return
        self._batches = [
            batch
            for number, recipe in enumerate(self._recipes)
            for batch in self._group_batches(number, recipe)
        ]  # fmt: skip
        for batch in self._batches:
            batch.allocate(self.state)
        self._places = {m.parameter: (batch, i) for batch in self._batches for i, m in enumerate(batch.members)}
        self._built = trainable

    def _group_batches(self, number: int, recipe: Recipe) -> list[Batch]:
        members = [m for m in self._members[number] if m.parameter.requires_grad]
        kinds: dict[Any, list[Member]] = {}
        for m in members:
            projection = self._resolve(recipe, m, number)
            here = (m.parameter.dtype, m.parameter.device, m.layout)
            kinds.setdefault((projection, m.matrix, m.transposed, here), []).append(m)
        batches = []
        for (projection, matrix, *_), alike in kinds.items():
            limit = _BATCH.get(alike[0].parameter.device.type, 1 << 25)
            size = max(1, limit // max(1, matrix.rows * matrix.cols))
            apart = not self.compiled and steps_apart(recipe, projection, alike[0])
            held = max(1, limit // max(1, matrix.rows * projection.width(matrix))) if apart else size
            batches += [
                Batch(number, recipe, projection, alike[i : i + held], size, apart)
                for i in range(0, len(alike), held)
            ]  # fmt: skip
        return batches

    def _resolve(self, recipe: Recipe, member: Member, number: int) -> Projection:
        """The member's own projection; for `Blocks`, whether it is active, with its moments dropped in a new period."""
        if not isinstance(recipe.projection, Blocks):
            return recipe.projection
        state = self.state[member.parameter]
        period = int(state.get("count", 0)) // recipe.refresh.every
        if int(state.get("round", 0)) != period + 1:
            self.state[member.parameter] = {k: v for k, v in state.items() if k in ("count", "norm", "master")}
            self.state[member.parameter]["round"] = torch.tensor(period + 1)
        count = len(self._members[number])
        return recipe.projection.chosen(member.index, count, period, mix(self.seed, number))

    def _all_finite(self, work: Sequence[tuple[Batch, list[int]]]) -> bool:
        for batch, ids in work:
            gradients = [grad for i in ids if (grad := batch.members[i].parameter.grad) is not None]
            norms = torch.stack(torch._foreach_norm([local(grad) for grad in gradients]))
            bad = batch.rows.sum((~norms.isfinite()).int())
            if bool(bad.any()):
                if self.nonfinite == "skip":
                    return False
                names = [batch.members[i].name for i, b in zip(ids, bad.tolist(), strict=True) if b]
                raise WeftError(
                    f"The gradient of {names[0]} is not finite; lower the learning rate, look at the data, or build "
                    'the optimizer with nonfinite="skip" to leave such steps out.'
                )
        return True

    def _advance(self, batch: Batch, ids: list[int]) -> None:
        """One step of some members of a batch."""
        group = self.param_groups[batch.group]
        lr, decay = float(group["lr"]), float(group["weight_decay"])
        if batch.apart:
            return self._advance_apart(batch, ids, lr, decay)
        X = batch.gradients(ids)
        with part(batch.state, ids) as state:
            if "master" in state:
                _copy_masters(batch, ids, state)
            refresh_subspaces(batch, ids, state, X, self.seed, len(self._members[batch.group]))
            for name in ("step", "count"):
                state[name] += 1
            t = _ages(state, X.device)
            seed = mix(self.seed, int(state["count"][0]))
            if _sliceable(batch):
                for rows in _slices(X):
                    view = {n: s[:, rows] if n in batch.inner_fields else s for n, s in state.items()}
                    N, c = batch.recipe.inner.update(X[:, rows], view, t, batch.rows)
                    batch.apply(ids, N, c * batch.recipe.scale, state, lr, decay, seed, rows)
            else:
                frame = batch.projection.frame(state, batch.seeds(ids, state, self.seed), X)
                update = self._arithmetic(batch.recipe, batch.rows, X, frame, dict(state), t)
                batch.apply(ids, *update, state, lr, decay, seed)

    def _advance_apart(self, batch: Batch, ids: list[int], lr: float, decay: float) -> None:
        """The same for a batch whose gradients are taken one by one."""
        X, recipe = batch.views(ids), batch.recipe
        with part(batch.state, ids) as state:
            refresh_subspaces(batch, ids, state, None, self.seed, len(self._members[batch.group]))
            for name in ("step", "count"):
                state[name] += 1
            frame = batch.projection.frame(state, batch.seeds(ids, state, self.seed), X[0].unsqueeze(0))
            assert isinstance(frame, DenseFrame)
            R = frame.down_each(X)
            N, c = recipe.inner.update(R, state, _ages(state, R.device), batch.rows)
            if recipe.residual is None:
                N, c = (N * c, 1.0) if isinstance(c, Tensor) else (N, c)
                batch.add_products(ids, N, frame.P, c * recipe.scale, lr, decay)
                return
            # E is the gradient, which is only passed on
            _, f = recipe.residual.term(X, R, N, frame, batch.rows)  # type: ignore[arg-type]
            if recipe.limiter is not None:
                f = f * recipe.limiter.factor(X, f, state, batch.rows)
            f, c = (f * c, 1.0) if isinstance(c, Tensor) else (f, c)
            batch.add_scaled(ids, X, f, c if recipe.residual.corrected else 1.0, lr, decay)  # type: ignore[arg-type]

    # --- state --------------------------------------------------------------------------------------------------------

    def state_bytes(self) -> int:
        """Bytes of optimizer state this process holds: bases, moments, counters, master copies."""
        tensors = [local(t) for state in self.state.values() for t in state.values()]
        return sum(t.numel() * t.element_size() for t in tensors)

    def planned_bytes(self) -> int:
        """What `state_bytes` will be after the first step, from the declared fields; works on meta parameters."""
        batches = [b for n, recipe in enumerate(self._recipes) for b in self._group_batches(n, recipe)]
        return sum(len(b.members) * b.member_bytes() for b in batches)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:  # type: ignore[override]
        """Restore a state_dict of the same recipe, in the dtypes it was saved in; the run goes on bit for bit."""
        saved = [group.get("recipe") for group in state_dict.get("param_groups", [])]
        own = [group["recipe"] for group in self.param_groups]
        for theirs, ours in zip(saved, own, strict=False):
            if theirs != ours:
                raise WeftError(
                    f"The state_dict was saved by another optimizer ({theirs or 'not a LowRank one'}); "
                    f"this one has {ours}."
                )
        restore(self, state_dict)
        self._built = None

    def __getstate__(self) -> dict[str, Any]:
        own = ("_default", "_recipes", "_members", "nonfinite", "seed", "compiled")
        return super().__getstate__() | {name: getattr(self, name) for name in own}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._batches, self._places, self._built = [], {}, None
        self._arithmetic = _arithmetic(self.compiled)


def _refresh(rule: int | Refresh) -> Refresh:
    return Refresh(rule) if isinstance(rule, int) else rule


def _checked(recipe: Recipe) -> Recipe:
    """Refuse combinations that mean nothing."""
    p = recipe.projection
    if recipe.refresh.every < 1:
        raise WeftError(f"refresh is {recipe.refresh.every}; it is a number of steps, 1 or more.")
    if isinstance(p, Blocks):
        if recipe.moments != "reset":
            raise WeftError('Blocks drops the moments of the weights it releases; use moments="reset".')
    elif recipe.moments == "rotate" and not p.orthonormal:
        raise WeftError(f'{p!r} has no orthonormal basis to rotate moments into; use moments="keep" or "reset".')
    if recipe.limiter is not None and recipe.residual is None:
        raise WeftError(
            "A limiter bounds the residual's growth, and there is no residual; give one or drop the limiter."
        )
    return recipe


def _ready(batch: Batch) -> list[int]:
    return [i for i, m in enumerate(batch.members) if m.parameter.grad is not None]


def _new_period(batch: Batch) -> bool:
    """Whether a group of `Blocks` has come to its next choice."""
    if not isinstance(batch.recipe.projection, Blocks):
        return False
    period = batch.state["count"] // batch.recipe.refresh.every + 1
    return bool((period != batch.state["round"]).any())


def _sliceable(batch: Batch) -> bool:
    return batch.projection == Whole() and batch.recipe.residual is None and batch.recipe.inner.rowwise


def _slices(X: Tensor) -> list[slice]:
    """Runs of rows small enough for the cache, or for the workspace."""
    size = max(1, _SLICE.get(X.device.type, 1 << 25) // max(1, X.shape[0] * X.shape[-1]))
    found = [slice(a, a + size) for a in range(0, X.shape[-2], size)]
    # of a tensor without values, as a plan of memory has them, two runs say what all of them take
    return found[:2] if type(X).__name__ == "FakeTensor" else found


def _ages(state: State, device: torch.device) -> Scalar:
    """t: one number where all members agree, else (k, 1, 1), or (k, 1, r) where columns have their own age."""
    if "age" in state:
        state["age"] += 1
        return state["age"].unsqueeze(-2).double()
    steps = state["step"].tolist()
    if len(set(steps)) == 1:
        return float(steps[0])
    return state["step"].double().to(device)[:, None, None]


def _arithmetic(compiled: bool) -> Callable[..., tuple[Tensor, Scalar]]:
    """`_update`, as it is or compiled: then t is a tensor, for a new number would be a new graph."""
    if not compiled:
        return _update
    run = torch.compile(_update, dynamic=False)  # kernels of fixed sizes are faster, and a model has few shapes

    def update(recipe: Recipe, rows: Rows, X: Tensor, frame: Frame, state: State, t: Scalar) -> tuple[Tensor, Scalar]:
        age = torch.tensor(t, dtype=torch.float64, device=X.device) if isinstance(t, float) else t
        with torch._dynamo.config.patch(recompile_limit=64):  # a graph a shape; the default is 8
            return run(recipe, rows, X, frame, state, age)

    return update


def _update(recipe: Recipe, rows: Rows, X: Tensor, frame: Frame, state: State, t: Scalar) -> tuple[Tensor, Scalar]:
    """U (k, n, s) of the contract, scale c up(N) + limited f E, as a tensor and a factor of it."""
    R = frame.down(X)
    N, c = recipe.inner.update(R, state, t, rows)
    if recipe.residual is None:
        by_column = isinstance(c, Tensor) and c.dim() > 0 and c.shape[-1] > 1
        return (frame.up(N * c, X), recipe.scale) if by_column else (frame.up(N, X), c * recipe.scale)
    E, f = recipe.residual.term(X, R, N, frame, rows)
    if recipe.limiter is not None:
        f = f * recipe.limiter.factor(E, f, state, rows)
    if recipe.residual.corrected:
        f = f * c
    if recipe.scale == 0:
        return E, f
    inside = frame.up(N * (c * recipe.scale), X)
    if isinstance(f, Tensor):
        return torch.addcmul(inside, E, f.to(E.dtype)), 1.0
    return torch.add(inside, E, alpha=f), 1.0


def _copy_masters(batch: Batch, ids: Sequence[int], state: State) -> None:
    """A master copy begins as the weight itself, and follows what others than the optimizer write into it."""
    for j, count in enumerate(state["count"].tolist()):
        member, master = batch.members[ids[j]], state["master"][j]
        weight = member.view(member.parameter)
        master.copy_(weight if count == 0 else followed(master, weight))
