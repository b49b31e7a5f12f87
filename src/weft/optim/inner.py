"""The rules that turn a (projected) gradient into a direction: Adam in two forms, 8-bit Adam, SGD, Lion, Adafactor.

`R (k, n, r)` is the gradient; moments have its shape. Arithmetic is in fp32 (fp64 for fp64) whatever dtype the state is
kept in.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.kernels.cells import Cells, bucketize, cells, once
from weft.optim.base import Field, Inner, Matrix, Move, Rows, Scalar, State

__all__ = ["SGD", "Adafactor", "Adam", "Adam8bit", "AdamW", "Lion"]

Form = Literal["galore", "torch"]
Code = Literal["dynamic", "float8"]


def _high(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _store(state: State, name: str, value: Tensor) -> None:
    if state[name] is not value:
        state[name].copy_(value)


def _corrections(betas: tuple[float, float], t: Scalar, dtype: torch.dtype) -> tuple[Scalar, Scalar]:
    """sqrt(1 - b2^t) and 1 - b1^t, found in fp64."""
    if isinstance(t, Tensor):
        return (1 - betas[1] ** t).sqrt().to(dtype), (1 - betas[0] ** t).to(dtype)
    return math.sqrt(1 - betas[1] ** t), 1 - betas[0] ** t


def _adam(R: Tensor, m: Tensor, v: Tensor, t: Scalar, rule: Adam | Adam8bit) -> tuple[Tensor, Scalar]:
    """Advance m and v in place; m / (sqrt(v) + eps) and the bias correction sqrt(1 - b2^t) / (1 - b1^t)."""
    b1, b2 = rule.betas
    R = R.to(m.dtype)
    m.mul_(b1).add_(R, alpha=1 - b1)
    v.mul_(b2).addcmul_(R, R, value=1 - b2)
    root, first = _corrections(rule.betas, t, R.dtype)
    eps = rule.eps if rule.form == "galore" else rule.eps * root
    return m / v.sqrt().add_(eps), root / first


def _fusible(R: Tensor, m: Tensor, v: Tensor) -> bool:
    """Whether torch's fused kernel applies: one dtype, dense."""
    return R.dtype == m.dtype == v.dtype and R.numel() > 0 and all(x.is_contiguous() for x in (R, m, v))


def _fused_adam(R: Tensor, m: Tensor, v: Tensor, t: float, rule: Adam) -> tuple[Tensor, Scalar]:
    """`_adam` in one pass over memory: torch's AdamW kernel on a zero weight, lr and eps such that it ends at N."""
    b1, b2 = rule.betas
    root, out = math.sqrt(1 - b2**t), torch.zeros_like(R)
    c = root / (1 - b1**t)
    eps = rule.eps / root if rule.form == "galore" else rule.eps
    step = torch.full((), t, device=R.device)
    torch._fused_adamw_(
        [out], [R], [m], [v], [], [step],
        lr=-1 / c, beta1=b1, beta2=b2, weight_decay=0.0, eps=eps, amsgrad=False, maximize=False,
    )  # fmt: skip
    return out, c


@dataclass(frozen=True)
class Adam(Inner):
    """Adam (Kingma & Ba 2015). State: m and v, 2 n r numbers.

    form "galore": eps is added to the uncorrected sqrt(v) and weight decay comes after the update, as in GaLore, Fira
    and APOLLO; "torch": eps is added to the corrected sqrt(v) and decay comes first, as in torch.optim.AdamW.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    form: Form = "galore"

    @property
    def decay_first(self) -> bool:
        return self.form == "torch"

    def fields(self, matrix: Matrix) -> dict[str, Field]:
        moment = Field((matrix.rows, matrix.cols), matrix.dtype, rows=True)
        return {"exp_avg": moment, "exp_avg_sq": moment}

    def update(self, R: Tensor, state: State, t: Scalar, rows: Rows) -> tuple[Tensor, Scalar]:
        if isinstance(t, float) and _fusible(R, state["exp_avg"], state["exp_avg_sq"]):
            return _fused_adam(R, state["exp_avg"], state["exp_avg_sq"], t, self)
        m, v = _high(state["exp_avg"]), _high(state["exp_avg_sq"])
        direction = _adam(R, m, v, t, self)
        _store(state, "exp_avg", m)
        _store(state, "exp_avg_sq", v)
        return direction

    def transfer(self, state: State, move: Move) -> None:
        state["exp_avg"].copy_(move(_high(state["exp_avg"]), 1))
        state["exp_avg_sq"].copy_(move(_high(state["exp_avg_sq"]), 2))


def AdamW(betas: tuple[float, float] = (0.9, 0.999), eps: float = 1e-8) -> Adam:
    """torch.optim.AdamW's form of `Adam` (Loshchilov & Hutter 2019)."""
    return Adam(betas, eps, "torch")


@once
def _dynamic_code(signed: bool, device: torch.device) -> Tensor:
    """256 values in [-1, 1] or [0, 1] (Dettmers 2016's dynamic tree): 7 decades, finer near the top, with 0 and 1."""
    extra = 0 if signed else 1
    positive = [
        (lo + hi) / 2 * 10.0 ** (decade - 6)
        for decade in range(7)
        for edges in [torch.linspace(0.1, 1, 2 ** (decade + extra) + 1).tolist()]
        for lo, hi in itertools.pairwise(edges)
    ]
    values = [*positive, 0.0, 1.0] + ([-x for x in positive] if signed else [])
    return torch.tensor(sorted(values), device=device)


def _encode(x: Tensor, block: int, signed: bool, code: Code) -> tuple[Tensor, Tensor]:
    """Codes (k, n, r) uint8 and scales (k, n, ceil(r / block)) fp32; unsigned values are rounded up, so that a positive
    second moment never becomes 0."""
    blocks = F.pad(x.float(), (0, -x.shape[-1] % block)).reshape(*x.shape[:-1], -1, block)
    scale = blocks.abs().amax(-1)
    unit = (blocks / scale.clamp_min(torch.finfo(torch.float32).tiny).unsqueeze(-1)).clamp_(-1, 1)
    codes = bucketize(unit, _edges(signed, unit.device)) if code == "dynamic" else _to_float8(unit, signed)
    return codes.flatten(-2)[..., : x.shape[-1]], scale


def _to_float8(unit: Tensor, signed: bool) -> Tensor:
    """The bits of 448 unit in e4m3; unsigned, of 448 sqrt(unit), rounded up."""
    value = (unit if signed else unit.sqrt()) * _TOP
    codes = value.to(torch.float8_e4m3fn)
    bits = codes.view(torch.uint8)
    return bits if signed else bits + (codes.float() < value)  # positive numbers are in the order of their bits


@once
def _edges(signed: bool, device: torch.device) -> Cells:
    code = _dynamic_code(signed, device)
    return cells((code[1:] + code[:-1]) / 2 if signed else code[:-1])


def _decode(codes: Tensor, scale: Tensor, block: int, signed: bool, code: Code) -> Tensor:
    if code == "dynamic":
        values = _dynamic_code(signed, codes.device).index_select(0, codes.int().flatten()).view(codes.shape)
    else:
        unit = codes.contiguous().view(torch.float8_e4m3fn).float() / _TOP
        values = unit if signed else unit.square()
    return values * scale.repeat_interleave(block, dim=-1)[..., : codes.shape[-1]]


_TOP = 448.0  # the largest number of e4m3


@dataclass(frozen=True)
class Adam8bit(Inner):
    """Adam with both moments in 8 bits: runs of up to `block` entries of a row share an fp32 scale and a code, dynamic
    or float8 (e4m3), of the second moment's root.

    Weights with fewer than `threshold` entries of R (or rows shorter than 16) keep fp32 moments. Pure torch, on any
    device. Source: Dettmers et al. 2022, arXiv 2110.02861; float8 as torchao's AdamWFp8.
    Deviations: blocks do not cross rows, so that rows can be sharded; the second moment is rounded up, so that no step
    is enlarged by rounding to zero, and its root is what float8 keeps, whose range is too short for squares.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6
    form: Form = "galore"
    block: int = 256
    threshold: int = 4096
    code: Code = "dynamic"

    @property
    def decay_first(self) -> bool:
        return self.form == "torch"

    def fields(self, matrix: Matrix) -> dict[str, Field]:
        shape = (matrix.rows, matrix.cols)
        if matrix.rows * matrix.cols < self.threshold or matrix.cols < 16:
            return {name: Field(shape, torch.float32, rows=True) for name in ("exp_avg", "exp_avg_sq")}
        codes = Field(shape, torch.uint8, rows=True)
        scale = Field((matrix.rows, -(-matrix.cols // self.block)), torch.float32, rows=True)
        return {"exp_avg": codes, "exp_avg_scale": scale, "exp_avg_sq": codes, "exp_avg_sq_scale": scale}

    def update(self, R: Tensor, state: State, t: Scalar, rows: Rows) -> tuple[Tensor, Scalar]:
        R = _high(R)
        m, v = self._read(state, "exp_avg", R), self._read(state, "exp_avg_sq", R)
        direction = _adam(R, m, v, t, self)
        self._write(state, "exp_avg", m)
        self._write(state, "exp_avg_sq", v)
        return direction

    def transfer(self, state: State, move: Move) -> None:
        for power, name in enumerate(("exp_avg", "exp_avg_sq"), start=1):
            self._write(state, name, move(self._read(state, name), power))

    def _read(self, state: State, name: str, like: Tensor | None = None) -> Tensor:
        if name + "_scale" not in state:
            return state[name] if like is None else state[name].to(like.dtype)
        value = _decode(state[name], state[name + "_scale"], self.block, name == "exp_avg", self.code)
        return value if like is None else value.to(like.dtype)

    def _write(self, state: State, name: str, value: Tensor) -> None:
        if name + "_scale" not in state:
            return _store(state, name, value)
        codes, scale = _encode(value, self.block, name == "exp_avg", self.code)
        state[name].copy_(codes)
        state[name + "_scale"].copy_(scale)


@dataclass(frozen=True)
class SGD(Inner):
    """b <- momentum b + R, N = b (torch.optim.SGD without dampening). State: n r numbers, none without momentum."""

    momentum: float = 0.9

    def fields(self, matrix: Matrix) -> dict[str, Field]:
        return {"momentum": Field((matrix.rows, matrix.cols), matrix.dtype, rows=True)} if self.momentum else {}

    def update(self, R: Tensor, state: State, t: Scalar, rows: Rows) -> tuple[Tensor, Scalar]:
        R = _high(R)
        if not self.momentum:
            return R, 1.0
        b = _high(state["momentum"]).mul_(self.momentum).add_(R)
        _store(state, "momentum", b)
        return b, 1.0

    def transfer(self, state: State, move: Move) -> None:
        if self.momentum:
            state["momentum"].copy_(move(_high(state["momentum"]), 1))


@dataclass(frozen=True)
class Lion(Inner):
    """N = sign(b1 m + (1 - b1) R), m <- b2 m + (1 - b2) R (Chen et al. 2023, arXiv 2302.06675). State: n r numbers."""

    betas: tuple[float, float] = (0.9, 0.99)

    def fields(self, matrix: Matrix) -> dict[str, Field]:
        return {"exp_avg": Field((matrix.rows, matrix.cols), matrix.dtype, rows=True)}

    def update(self, R: Tensor, state: State, t: Scalar, rows: Rows) -> tuple[Tensor, Scalar]:
        R, m = _high(R), _high(state["exp_avg"])
        direction = torch.lerp(R, m, self.betas[0]).sign_()
        _store(state, "exp_avg", m.mul_(self.betas[1]).add_(R, alpha=1 - self.betas[1]))
        return direction, 1.0

    def transfer(self, state: State, move: Move) -> None:
        state["exp_avg"].copy_(move(_high(state["exp_avg"]), 1))


@dataclass(frozen=True)
class Adafactor(Inner):
    """Second moments as row x column averages: N = R / sqrt(row col^T / mean(row)), RMS at most `clip`; n + r numbers.

    b2 = 1 - t^decay. Source: Shazeer & Stern 2018, arXiv 1804.04235, without momentum or relative step sizes (the
    learning rate is the optimizer's).
    """

    decay: float = -0.8
    eps: float = 1e-30
    clip: float = 1.0
    rowwise: ClassVar[bool] = False

    def fields(self, matrix: Matrix) -> dict[str, Field]:
        high = torch.promote_types(matrix.dtype, torch.float32)
        return {
            "row": Field((matrix.rows, 1), high, rows=True),
            "column": Field((1, matrix.cols), high),
        }

    def update(self, R: Tensor, state: State, t: Scalar, rows: Rows) -> tuple[Tensor, Scalar]:
        R = _high(R)
        weight = (torch.as_tensor(t, dtype=R.dtype) ** self.decay).to(R.device)
        square = R.square() + self.eps
        row, column = state["row"], state["column"]
        row.lerp_(square.mean(dim=-1, keepdim=True), weight.amin(-1, keepdim=True) if weight.ndim else weight)
        column.lerp_(rows.sum(square.sum(dim=-2, keepdim=True)) / rows.total, weight)
        mean = rows.sum(row.sum(dim=-2, keepdim=True)) / rows.total
        N = R * ((row / mean).rsqrt() * column.rsqrt())
        rms = rows.norm(N) / math.sqrt(rows.total * max(R.shape[-1], 1))
        return N / (rms / self.clip).clamp_min(1), 1.0

    def transfer(self, state: State, move: Move) -> None:
        state["column"].copy_(move(state["column"], 2))
