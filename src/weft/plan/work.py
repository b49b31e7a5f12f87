"""What a step computes, and how long that takes on this machine.

    seconds = f (sum over dtypes t of operations_t / P_t  +  bytes / B  +  N t_0)

Counted, while the step runs on tensors without values: the operations of matrix products (a multiply and an add are
two) by dtype, the bytes that everything reads and writes, and the number of calls N. Measured, once a process, when
first asked for: P_t, the rate of a product; B, that of a sum of vectors beyond a cache; t_0, the time of a call with
hardly any numbers in it; and f, by which a step of a small decoder takes longer than the rest of the formula says.
"""

from __future__ import annotations

import functools
import math
import statistics
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import flop_registry
from transformers import LlamaConfig, LlamaForCausalLM

from weft.memory import lean
from weft.memory.live import Live, tensors_in

__all__ = ["Rates", "Work", "Working", "rates_of"]

_aten = torch.ops.aten
_SIDE = {"cpu": 256}
"""Of the matrices whose product is timed; 4096 elsewhere."""
_LONG = {"cpu": 2**23}
"""Numbers of the vectors whose sum is timed, 32 MB each, which is beyond a cache; eight times as many elsewhere."""
_CALLS = 200
_ROUNDS = 5
"""Of each measurement, whose median counts."""
_PROBE: dict[str, Any] = {
    "vocab_size": 4096, "hidden_size": 256, "intermediate_size": 688, "num_hidden_layers": 2, "num_attention_heads": 8,
}  # fmt: skip


@dataclass(frozen=True)
class Work:
    """What is computed. Work adds up, and whole multiples of it can be taken."""

    products: Mapping[torch.dtype, int] = field(default_factory=dict)  # operations of matrix products
    moved: int = 0  # bytes that are read or written
    calls: int = 0

    def plus(self, other: Work, times: int = 1) -> Work:
        """With so many times another work, which may be negative."""
        both = {**self.products, **other.products}
        products = {d: self.products.get(d, 0) + times * other.products.get(d, 0) for d in both}
        return Work(products, self.moved + times * other.moved, self.calls + times * other.calls)

    def seconds(self, rates: Rates) -> float:
        """How long it takes at these rates."""
        products = math.fsum(n / rates.product(dtype) for dtype, n in self.products.items() if n)
        return rates.factor * (products + self.moved / rates.bandwidth + self.calls * rates.call)


class Working(Live):  # type: ignore[no-untyped-call]
    """Within the block, `work` is what was computed in it, beside what is alive."""

    def __init__(self, device: str | None = None) -> None:
        super().__init__(device)
        self.products: Counter[torch.dtype] = Counter()
        self.moved = self.calls = 0

    @property
    def work(self) -> Work:
        """So far."""
        return Work(dict(self.products), self.moved, self.calls)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = super().__torch_dispatch__(func, types, args, kwargs)
        if isinstance(func, torch._ops.OpOverload) and func not in _FREE:
            self._count(func, args, kwargs or {}, made)
        return made

    def _count(self, func: torch._ops.OpOverload, args: Any, kwargs: Mapping[str, Any], made: Any) -> None:
        self.calls += 1
        if func.is_view or func.overloadpacket in _MAKES:
            return
        written = sum(x.nbytes for x in tensors_in(made))
        if func.overloadpacket in _CHOOSES:  # no more of a table is read than is taken
            self.moved += 2 * written
            return
        given = [*tensors_in(args), *tensors_in(kwargs)]
        self.moved += written + sum(x.nbytes for x in given)
        count = _OWN.get(func.overloadpacket) or flop_registry.get(func.overloadpacket)
        if count is not None:
            self.products[given[-1].dtype] += int(count(*args, **kwargs, out_val=made))


def _attention(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """Logits, and the mean of the values."""
    return 2 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def _attention_back(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    """The logits again; the gradients of queries, keys and values, and of the logits."""
    return 2 * query[..., 0].numel() * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


def _product(*args: Any, **_: Any) -> int:
    """Of two matrices, or stacks of them, which come last."""
    return int(2 * args[-2].numel() * args[-1].shape[-1])


_OWN: dict[Any, Callable[..., int]] = {  # what torch counts ten times slower, or of other devices alone
    **dict.fromkeys((_aten.mm, _aten.bmm, _aten.addmm, _aten.baddbmm), _product),
    _aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    _aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_back,
}
_FREE = {torch.ops.prim.device.default, _aten.detach.default, _aten.alias.default}
_MAKES = (_aten.empty, _aten.empty_like, _aten.new_empty, _aten.empty_strided, _aten.new_empty_strided)
_CHOOSES = (_aten.embedding, _aten.index, _aten.index_select, _aten.gather, _aten.slice)


class Rates:
    """What a device does in a second, each measured when it is first asked for.

    On a CPU it is processor time by the threads in use, which other work on the machine does not lengthen; it is by the
    clock elsewhere.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._products: dict[torch.dtype, float] = {}

    def product(self, dtype: torch.dtype) -> float:
        """Operations of a matrix product."""
        if dtype not in self._products:
            side = _SIDE.get(self.device.type, 4096)
            A, B = (torch.ones(side, side, dtype=dtype, device=self.device) for _ in range(2))
            self._products[dtype] = 2 * side**3 / self._usual(lambda: A @ B)
        return self._products[dtype]

    @functools.cached_property
    def bandwidth(self) -> float:
        """Bytes that a sum of two vectors reads and writes."""
        length = _LONG.get(self.device.type, 2**26)
        x, y = (torch.ones(length, device=self.device) for _ in range(2))
        return 3 * x.nbytes / self._usual(lambda: x.add_(y))

    @functools.cached_property
    def call(self) -> float:
        """Seconds of a call, forward and backward, of a module that computes on few numbers."""
        model, x = nn.Sequential(*(nn.Tanh() for _ in range(_CALLS // 2))), torch.ones(8, device=self.device)
        x.requires_grad_()
        return self._usual(lambda: torch.autograd.grad(model(x).sum(), x)) / _CALLS

    @functools.cached_property
    def factor(self) -> float:
        """Of the step of a small decoder, what it takes by what is said of it."""
        probe = _Probe(self.device)
        probe.step()
        with Working() as live:
            probe.step()
        self.__dict__["factor"] = 1.0  # of what is said
        return self._usual(probe.step) / live.work.seconds(self)

    def _usual(self, run: Callable[[], object]) -> float:
        run()
        return statistics.median(self._timed(run) for _ in range(_ROUNDS))

    def _timed(self, run: Callable[[], object]) -> float:
        if self.device.type == "cpu":
            began = time.process_time()
            run()
            return max(time.process_time() - began, 1e-9) / torch.get_num_threads()
        torch.accelerator.synchronize(self.device)
        began = time.perf_counter()
        run()
        torch.accelerator.synchronize(self.device)
        return time.perf_counter() - began


class _Probe:
    """A small decoder that is trained, lean and in fp32."""

    def __init__(self, device: torch.device) -> None:
        with torch.device(device), torch.random.fork_rng():
            self.model = LlamaForCausalLM(LlamaConfig(**_PROBE))
            self.ids = torch.zeros(2, 128, dtype=torch.long)
        lean(self.model.train())
        self.optimizer = torch.optim.AdamW(self.model.parameters(), foreach=True)

    def step(self) -> None:
        self.model(input_ids=self.ids, labels=self.ids, use_cache=False).loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


@functools.cache
def rates_of(device: torch.device, threads: int) -> Rates:
    """Those of a device; `threads` are those in use, for which they hold."""
    return Rates(device)
