"""What fits: the memory of a job by every method, from a model's configuration alone.

The model is made without storage, with a few blocks that stand for all, and the job's own step is run on tensors
without values (`weft.plan`). Nothing here knows what a method keeps: its own code says so.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from weft.allocate import Budget
from weft.errors import WeftError
from weft.grafts import Graft
from weft.memory import lean as make_lean
from weft.memory.cross_entropy import CHUNK_LOGITS
from weft.methods.base import Method, one_stream
from weft.plan import BLOCKS, Held, Stepped, Supposed, held, stepped, unmasked
from weft.plan.layers import Passes, blocks_of
from weft.plan.work import rates_of
from weft.progress import track
from weft.runs.loading import resolve_device, resolve_dtype
from weft.terms.layers import linear_layers
from weft.train.modes import HALF, checkpointing, wide
from weft.train.optimizers import chosen_options, find_optimizer
from weft.train.optimizers import make_optimizer as named_optimizer
from weft.verbs.adapt import adapt, make_optimizer
from weft.verbs.evaluate import check_causal, check_context
from weft.verbs.fresh import Structure, restructure
from weft.verbs.plan_compress import Compressing
from weft.verbs.plan_jobs import Job, jobs
from weft.verbs.quantize import quantize
from weft.verbs.sources import Source, source_of

__all__ = ["run"]

_TRIED = 2**28
"""Logits of the largest batch that is run, in chunks of 2^24."""


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is the same for all methods of a plan."""

    task: str
    memory: int
    batch: int
    window: int
    rank: int | None
    lean: bool
    checkpointing: bool
    time: bool
    device: torch.device
    dtype: torch.dtype

    @property
    def training(self) -> bool:
        """Whether something is trained."""
        return self.task in ("finetune", "pretrain")


def run(
    model: str | None = None,
    *,
    size: str | None = None,
    memory: str,
    task: str = "finetune",
    methods: str | Sequence[str] = (),
    batch: int = 1,
    window: int = 512,
    rank: int | None = None,
    lean: bool = True,
    checkpointing: bool = False,
    time: bool = True,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """`weft plan`: what each method would hold of a model, of which nothing but the configuration is read.

    Args:
        size: a published size of `weft pretrain`, in the place of a model.
        memory: what there is, such as 8GB (10^9 bytes) or 24GiB.
        task: finetune, pretrain, compress or serve.
        methods: names with commas between them, such as lora,nf4+lora,full+galore, or "all"; the usual ones by default.
        batch: the rows for which the parts are given; the largest that fits is found besides.
        time: whether to predict the seconds of a step, for which the machine is measured for about one.
        device: cpu or cuda, which this machine must have. `seed` is accepted as by every verb; nothing here is random.

    Raises:
        WeftError: memory below what any of the methods takes for one row; and whatever is no size, method or model.
    """
    asked_for = jobs(task, methods)
    if not memory:
        raise WeftError("Say what memory there is, such as --memory 8GB.")
    there = Budget.read(memory, "bytes")
    if there is None:
        raise WeftError(f"--memory {memory!r} is no size: give one such as 8GB or 24GiB.")
    for name, value, lowest in (("batch", batch, 1), ("window", window, 2), ("rank", rank, 1)):
        if value is not None and value < lowest:
            raise WeftError(f"--{name} is {value}: give at least {lowest}.")
    target = resolve_device(device)
    source = source_of(model, size, window, trust_remote_code=trust_remote_code)
    check_causal(source.config)
    check_context(source.config, window)
    asked = Asked(
        task=task, memory=int(there), batch=batch, window=window, rank=rank, lean=lean,
        checkpointing=checkpointing, time=time, device=target,
        dtype=resolve_dtype(dtype, target) or (torch.bfloat16 if size is not None else source.dtype),
    )  # fmt: skip
    rows = _rows(asked_for, source, asked)
    known = [row for row in rows if row["peak_bytes"] is not None]
    if known and all(row["batch"] == 0 for row in known):
        least = min(known, key=lambda row: row["least_bytes"])
        rows_of = "" if task == "compress" else f" with one row of {window} tokens"
        raise WeftError(
            f"{memory} is too little for {source.name}: {task} takes at least {_words(least['least_bytes'])}, by "
            f"{least['name']}{rows_of}, of which the weights are {_words(least['weights'])}."
        )
    facts: dict[str, Any] = {
        "model": source.name,
        "task": task,
        "device": target.type,
        "dtype": str(asked.dtype).split(".")[1],
    }
    facts |= {"parameters": source.parameters, "memory_bytes": asked.memory, "window": window, "rows": batch}
    return {**facts, "methods": rows}


def _rows(asked_for: Sequence[Job], source: Source, asked: Asked) -> list[dict[str, Any]]:
    """What is known of each job; those that differ by their optimizer alone share the passes of one model, and those
    that differ by the code of their frozen weights the steps of one optimizer.
    """
    known: dict[tuple[str | None, str | None], _Plan] = {}
    steps: dict[Any, Stepped] = {}
    compressing = Compressing(source, asked.dtype, asked.device, asked.window)

    def planned(job: Job) -> dict[str, Any]:
        if asked.task == "compress":
            return compressing.row(job.name, asked.memory)
        alike = (job.scheme, job.method)
        known[alike] = known[alike].stepped_by(job) if alike in known else _Plan(job, source, asked, steps)
        return known[alike].row()

    return [_row(job, planned) for job in track(asked_for, "plans")]


def _row(job: Job, planned: Callable[[Job], dict[str, Any]]) -> dict[str, Any]:
    """What is known of one job, or why nothing is."""
    try:
        return planned(job)
    except (WeftError, RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        parts = ("weights", "gradients", "optimizer", "activations", "workspace", "batch", "seconds")
        return {
            "name": job.name,
            **dict.fromkeys(("fits", "peak_bytes", *parts)),
            "reason": " ".join(str(error).split())[:200],
        }


class _Plan:
    """One job on a few blocks, or on all where they are not equal."""

    def __init__(self, job: Job, source: Source, asked: Asked, steps: dict[Any, Stepped]) -> None:
        self.job, self.asked, self.whole, self.steps = job, asked, source.whole, steps
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        record = job.record
        alone = isinstance(record, Graft) or (record is not None and record.share not in (None, one_stream))
        self.blocks = BLOCKS["training" if asked.training else "inference"]
        self.layers = None if alone or not source.equal or source.layers <= self.blocks else source.layers
        self.model = self._made(source.empty(self.blocks if self.layers else source.layers, asked.dtype))
        self.vocabulary = source.config.get_text_config().vocab_size
        self.known: dict[tuple[Passes, int, str], Held] = {}

    def stepped_by(self, job: Job) -> _Plan:
        """The same model and passes with another job's optimizer."""
        other = copy.copy(self)
        other.job = job
        return other

    def row(self) -> dict[str, Any]:
        """The parts at the batch that was asked for, and the largest batch."""
        asked, here = self.asked, self.asked.batch
        passes = self.passes(here)
        step, peak = self.step(), self.peak(here)
        parts = {"weights": passes.weights, "gradients": passes.gradients if asked.training else 0}
        parts |= {"optimizer": step.state, "activations": passes.activations, "workspace": step.workspace}
        largest = self.largest()
        row = {"name": self.job.name, "fits": peak <= asked.memory, "peak_bytes": peak, **parts, "batch": largest}
        if asked.training:
            row |= self.modes() | {"logits": self.logits()}
        else:
            row |= {"kv_cache": self.cache(passes)}
        return row | {"seconds": self.seconds(passes), "disk": self.disk(step), "least_bytes": min(peak, self.peak(1))}

    def seconds(self, passes: Held) -> float | None:
        """How long a step takes on this machine; of a model that serves, a pass over the windows."""
        if not self.asked.time:
            return None
        return passes.work.plus(self.step().work).seconds(rates_of(self.asked.device, torch.get_num_threads()))

    def passes(self, batch: int) -> Held:
        """What the passes over so many rows hold."""
        return self._held("training" if self.asked.training else "inference", batch)

    def step(self) -> Stepped:
        """What the optimizer holds, once for all that train the same tensors by the same method."""
        if not self.asked.training:
            return Stepped(0, 0)
        trained = ((name, p.shape, p.dtype) for name, p in self.model.named_parameters() if p.requires_grad)
        key = (self.job.method, self.job.optimizer, *trained)
        if key not in self.steps:
            with self._inside():
                self.steps[key] = stepped(self.model, self._optimizer, self.layers)
        return self.steps[key]

    def peak(self, batch: int) -> int:
        """The most that is held at the same time."""
        passes, step = self.passes(batch), self.step()
        return max(passes.peak + step.state, passes.weights + passes.gradients + step.state + step.workspace)

    def largest(self) -> int:
        """The largest batch that fits: what a row takes follows from two batches, of which the second is near."""
        memory, low = self.asked.memory, self.asked.batch
        if self.peak(low) > memory:
            low = 1
            if self.peak(1) > memory:
                return 0
        here, most = self.passes(low), _TRIED // (self.asked.window * self.vocabulary)
        fixed = here.weights + here.gradients + self.step().state
        guess = int((memory - fixed) * low // max(here.peak - fixed, 1))
        high = max(low + 1, min(guess, most))
        found = self._between(low, high)
        for _ in range(2):  # where another moment than those two batches' is the fullest
            if low < found <= most and self.peak(found) > memory:
                found = self._between(low, found)
        return max(low, found)

    def _between(self, low: int, high: int) -> int:
        """The largest batch by what two others hold between any two borders."""
        left = self.asked.memory - self.step().state
        pairs = zip(self.passes(low).peaks, self.passes(high).peaks, strict=True)
        return min(low + int((left - few) // max((many - few) / (high - low), 1.0)) for few, many in pairs)

    def modes(self) -> dict[str, int]:
        """Activations of the other ways to keep them."""
        return {
            "activations_plain": self._held("forward", self.asked.batch, "plain").activations,
            "activations_checkpointed": self._held("forward", self.asked.batch, "checkpointed").activations,
        }

    def logits(self) -> int:
        """Bytes of the logits that are there at the same time, in fp32."""
        tokens = self.asked.batch * self.asked.window
        if self.asked.lean:
            tokens = min(tokens, max(CHUNK_LOGITS // self.vocabulary, 1))
        return 4 * self.vocabulary * tokens

    def cache(self, passes: Held) -> int:
        """Bytes of keys and values of all rows at the end of their windows, with the logits of one token each."""
        return passes.activations

    def disk(self, step: Stepped) -> int:
        """Bytes that are written at most: two checkpoints of what is trained with the optimizer, and the output."""
        more = 0 if self.layers is None else self.layers - self.blocks
        trained = self._bytes(lambda p: p.requires_grad, more)
        if not self.asked.training:
            return self.passes(self.asked.batch).weights
        adapts = self.job.method is not None and getattr(self.job.record, "kind", "") == "adapt"
        return 2 * (trained + step.state) + (trained if adapts else self.passes(self.asked.batch).weights)

    def _bytes(self, chosen: Callable[[nn.Parameter], bool], more: int) -> int:
        blocks = blocks_of(self.model)
        whole = sum(p.nbytes for p in self.model.parameters() if chosen(p))
        if not more or blocks is None:
            return whole
        return whole + more * sum(p.nbytes for p in blocks[1].parameters() if chosen(p))

    def _held(self, passes: Passes, batch: int, mode: str = "") -> Held:
        key = (passes, batch, mode)
        if key not in self.known:
            self.known[key] = self._counted(*key)
        return self.known[key]

    def _counted(self, passes: Passes, batch: int, mode: str) -> Held:
        again = mode == "checkpointed" or (not mode and self.asked.checkpointing)
        make_lean(self.model, not mode and self.asked.lean)
        with ExitStack() as stack:
            for context in (checkpointing(self.model, again), self._inside(), self._autocast()):  # type: ignore[arg-type]
                stack.enter_context(context)
            found = held(self.model, self._inputs(batch), self.layers, passes)
        if found is None:
            raise WeftError("its blocks do not follow one another, so that a few cannot stand for all.")
        return found

    def _inside(self) -> AbstractContextManager[Any]:
        stack = ExitStack()
        for context in (self.mode, Supposed(), unmasked()):
            stack.enter_context(context)
        if self.asked.training:
            stack.enter_context(wide(self.model))
        return stack

    def _autocast(self) -> AbstractContextManager[Any]:
        half = self.asked.device.type == "cuda" or any(p.dtype in HALF for p in self.model.parameters())
        return torch.autocast(self.asked.device.type, torch.bfloat16, enabled=half and self.asked.training)

    def _inputs(self, batch: int) -> dict[str, Any]:
        ids = torch.zeros(batch, self.asked.window, dtype=torch.long, device=self.asked.device)
        if self.asked.training:
            return {"input_ids": ids, "labels": ids.clone(), "use_cache": False}
        return {"input_ids": ids, "use_cache": True, "logits_to_keep": 1}

    def _made(self, model: nn.Module) -> nn.Module:
        """The model as the job trains or serves it."""
        job, record, asked = self.job, self.job.record, self.asked
        if asked.task == "pretrain" and job.method is not None:
            with torch.device("meta"):
                restructure(model, Structure.of(job.method, asked.rank))
        with self.mode, Supposed(), unmasked():
            model.to_empty(device=asked.device)
            model.tie_weights()  # type: ignore[operator]
            if job.scheme is not None:
                quantize(model, job.scheme)
            if asked.task == "finetune" and isinstance(record, Method) and record.kind != "adapt":
                if record.kind == "train" and record.split is not None:
                    restructure(model, Structure(record, None, record.options({})))
                record.freeze(model)
            elif asked.task == "finetune" and record is not None:
                _put(model, record, asked.rank)
        return model.train(asked.training)

    def _optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        name = self.job.optimizer or ("adamw" if self.asked.task == "pretrain" else None)
        if name is None:
            return make_optimizer(model, 1e-4)
        find_optimizer(name)
        adapts = getattr(self.job.record, "kind", None) == "adapt"
        own = {} if self.asked.rank is None or adapts or self.job.method else {"rank": self.asked.rank}
        return named_optimizer(name, model, 1e-4, 0.0, 0, chosen_options(name, own, 1000, self.whole))


def _put(model: nn.Module, record: Method | Graft, rank: int | None) -> None:
    """An adapter or a graft; of one whose ranks follow from the data, with the same rank everywhere."""
    ids = torch.zeros(1, 32, dtype=torch.long, device=next(model.parameters()).device)
    batches = [{"input_ids": ids, "labels": ids.clone(), "attention_mask": torch.ones_like(ids)}]
    if isinstance(record, Graft):
        adapt(model, record, batches=batches if record.start else None)
        return
    ranks: Mapping[str, int] | None = None
    if record.spread is not None:
        ranks = dict.fromkeys(linear_layers(model), rank or 16)
    adapt(model, record, rank, batches=batches if record.needs else None, ranks=ranks)


def _words(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.1f} MB"
