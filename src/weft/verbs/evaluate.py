"""Perplexity, size and speed of a causal language model on a text.

    loss = -1/N sum_t log p(x_t | the tokens before x_t in its window)        N scored tokens, natural logarithm, fp32
    perplexity = exp(loss)

Papers report this token perplexity; lm-evaluation-harness reports word perplexity, exp(total nll / words), and byte
perplexity under the same word. Both are given: they are perplexity ** (tokens / words) and perplexity ** (tokens /
bytes).

Deviations: lm-evaluation-harness scores a window's first token from one token of context. Published tables leave it
out, and so does this file; in the two derived figures those tokens are charged the mean loss.
"""

from __future__ import annotations

import math
import re
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from weft.embedded.text import default_text
from weft.errors import WeftError
from weft.io.adapter_places import check_directory
from weft.io.adapters import load_adapter
from weft.io.precision import bits_per_weight
from weft.io.precision import saved_size as model_size
from weft.runs.calibration import say_default
from weft.runs.loading import has_tokenizer, load_config, load_model, load_tokenizer
from weft.runs.record import Result
from weft.seeds import check_seed
from weft.train.sources import read_texts
from weft.train.windows import Window, check_ids, cut, evaluation_windows, opening, token_stream
from weft.verbs.tasks import check_tasks, evaluate_tasks

__all__ = ["check_causal", "check_context", "evaluate", "model_size", "peak_memory", "reset_peak_memory", "run"]

LOGIT_BYTES = 2**28  # one batch's logits stay below this, unless a single window's exceed it
FLOAT_ROWS = 256  # positions turned into fp32 log-probabilities at a time


def evaluate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    text: str | Sequence[str],
    window: int = 512,
    stride: int | None = None,
    windows: int | None = None,
    bos: bool | None = None,
) -> dict[str, Any]:
    """Perplexity of `model` on `text` (one text or several), with its size, speed and peak memory.

    Args:
        window: tokens the model sees at once.
        stride: tokens between two window starts; `window` (the default) makes windows disjoint, less gives context.
        windows: how many windows from the beginning of the text; all of them by default.
        bos: whether every window begins with the beginning-of-text token; None for what the tokenizer itself puts in
            front of a text. The first token of the text in a window is scored with or without it by the same rule.

    Returns: JSON-able: perplexity, word_perplexity, byte_perplexity, loss (nats a token), tokens (scored), words, bos
    (whether windows began with such a token), window, stride, windows, parameters, bytes (as they lie on the disk:
    stored parameters and buffers), bits_per_weight (of the linear layers, everything stored for them; None without
    any), tokens_per_second (through the model), seconds, peak_memory_bytes (CUDA allocations of this call, else the
    high-water mark of the process).

    Raises WeftError when the text is too short or the window exceeds the model's context.

    Example:
        >>> weft.evaluate(model, tokenizer, text, window=64)["windows"] > 0
        True
    """
    check_context(model, window)
    stream, before = token_stream(tokenizer, text), opening(tokenizer, bos)
    plan = plan_of(stream, before, window, stride, windows)
    device = next(model.parameters()).device
    reset_peak_memory(device)
    began = time.perf_counter()
    nll, tokens = total_loss(model, stream, plan, window, device, before)
    seconds = time.perf_counter() - began
    loss = nll / tokens
    parameters, nbytes = model_size(model)
    return Result(
        {
            "perplexity": exponential(loss),
            **text_perplexities(tokenizer, stream, plan, window - len(before), loss),
            "loss": loss,
            "tokens": tokens,
            "bos": bool(before),
            "window": window,
            "stride": min(stride or window, window - len(before)),
            "windows": len(plan),
            "parameters": parameters,
            "bytes": nbytes,
            "bits_per_weight": bits_per_weight(model),
            "tokens_per_second": len(plan) * window / seconds,
            "seconds": seconds,
            "peak_memory_bytes": peak_memory(device),
        }
    )


def plan_of(
    stream: Tensor, before: Sequence[int], window: int, stride: int | None, windows: int | None
) -> list[Window]:
    """The windows of a text in a model's windows of `window` tokens, which begin with the ids `before`."""
    return evaluation_windows(len(stream), window - len(before), None if stride == window else stride, windows)


def check_context(model: PreTrainedModel | PreTrainedConfig, window: int) -> None:
    """Raises WeftError when a window is longer than the model (or the configuration of one) can attend to."""
    config = model.config if isinstance(model, PreTrainedModel) else model
    context = getattr(config.get_text_config(), "max_position_embeddings", None)
    if context is not None and window > context:
        raise WeftError(f"The window is {window} tokens and the model's context {context}: give a smaller --window.")


def check_causal(config: PreTrainedConfig) -> None:
    """Raises WeftError for a model that does not predict the next token, before it is loaded."""
    architecture = next(iter(config.architectures or []), None)
    custom = bool(getattr(config, "auto_map", None))
    if architecture and not custom and architecture not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        raise WeftError(
            f"{architecture} is no causal language model: perplexity and this training are not defined for it."
        )


def run(
    model: str,
    *,
    text: str | Path | Sequence[str | Path] | None = None,
    window: int = 512,
    stride: int | None = None,
    windows: int | None = None,
    bos: bool | None = None,
    tasks: Sequence[str] | None = None,
    limit: int | None = None,
    adapter: str | Path | None = None,
    seed: int = 0,
    device: str | None = None,
    dtype: str | None = None,
    trust_remote_code: bool = False,
) -> dict[str, Any]:
    """`weft eval`: `evaluate` on a model directory, Hub id or embedded name, and on files.

    Args:
        text: files or directories as `weft.train.sources.read_texts` takes them; None for the held-out Python sources.
        tasks: of lm-evaluation-harness, by name or file, to be measured instead of text, `limit` questions of each.
        adapter: directory of an adapter, weft's or PEFT's, to put on first.
        seed: of the examples that a task shows; on text nothing is random.

    Raises WeftError for any argument that cannot work, before the model is loaded where it can be told.
    """
    check_seed(seed)
    of_text = {
        "text": text,
        "window": None if window == 512 else window,
        "stride": stride,
        "windows": windows,
        "bos": bos,
    }
    _check_beside(tasks, limit, of_text)
    if adapter is not None:
        check_directory(adapter)
    if tasks is not None:
        return _run_tasks(
            model, tasks, limit, adapter, seed, device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )
    evaluation_windows(window, window, stride)  # says what is wrong with either
    if text is None:
        say_default(model, "evaluation", "Python sources held out", "--text")
    texts = read_texts(text) if text is not None else [default_text("evaluation")]
    config = load_config(model, trust_remote_code=trust_remote_code)
    check_causal(config)
    check_context(config, window)
    tokenizer = _tokenizer(model, adapter, trust_remote_code)
    stream = token_stream(tokenizer, texts)
    check_ids(stream, config, tokenizer)
    plan_of(stream, opening(tokenizer, bos), window, stride, windows)  # says whether the text is too short
    source = load_model(model, device=device, dtype=dtype, trust_remote_code=trust_remote_code)
    if adapter is not None:
        load_adapter(source, adapter)
    found = evaluate(source, tokenizer, texts, window=window, stride=stride, windows=windows, bos=bos)
    return {"model": model, **found}


def _check_beside(tasks: Sequence[str] | None, limit: int | None, of_text: Mapping[str, Any]) -> None:
    """Raises WeftError where what is given has no part in what is measured."""
    if tasks is None and limit is not None:
        raise WeftError("--limit counts questions of --tasks: give tasks too, or for a text --windows, such as 24.")
    strange = next((name for name, value in of_text.items() if value is not None), None)
    if tasks is not None and strange is not None:
        raise WeftError(f"--tasks measures tasks instead of a text: leave --{strange} out, or the tasks.")


def _run_tasks(
    model: str, tasks: Sequence[str], limit: int | None, adapter: str | Path | None, seed: int, **how: Any
) -> dict[str, Any]:
    """The same on tasks of lm-evaluation-harness: task -> what it measures."""
    check_tasks(tasks)
    tokenizer = _tokenizer(model, adapter, how["trust_remote_code"])
    source = load_model(model, **how)
    if adapter is not None:
        load_adapter(source, adapter)
    return {"model": model, "tasks": evaluate_tasks(source, tokenizer, tasks, limit=limit, seed=seed)}


def _tokenizer(model: str, adapter: str | Path | None, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The adapter's own where it brings one."""
    home = model if adapter is None or not has_tokenizer(adapter) else str(adapter)
    return load_tokenizer(home, trust_remote_code=trust_remote_code)


@torch.no_grad()
def total_loss(
    model: nn.Module,
    stream: Tensor,
    plan: Sequence[Window],
    window: int,
    device: torch.device,
    before: Sequence[int] = (),
) -> tuple[float, int]:
    """Sum of the negative log-likelihoods of all scored tokens, and how many they are; every window begins with the
    ids `before`, which are not scored.
    """
    was_training = model.training
    model.eval()
    total, tokens = torch.zeros((), dtype=torch.float64), 0
    rows = 1
    try:
        while plan:
            batch, plan = plan[:rows], plan[rows:]
            ids = cut(stream, [w.start for w in batch], window, before).to(device)
            logits = model(input_ids=ids, use_cache=False).logits  # (rows, window, vocabulary)
            scored = scored_positions([Window(w.start, w.context + len(before)) for w in batch], window, device)
            total += summed_nll(logits, ids, scored)
            tokens += int(scored.sum())
            rows = max(1, LOGIT_BYTES // (logits[0].numel() * logits.element_size()))
    finally:
        model.train(was_training)
    return total.item(), tokens


def scored_positions(batch: Sequence[Window], window: int, device: torch.device) -> Tensor:
    """Which targets count: (rows, window - 1), position j standing for the prediction of token j + 1."""
    context = torch.tensor([w.context for w in batch], device=device)
    return torch.arange(1, window, device=device) >= context[:, None]


def summed_nll(logits: Tensor, ids: Tensor, scored: Tensor) -> Tensor:
    """Sum over the scored positions of -log p(next token), in fp32 by rows, accumulated in fp64."""
    predictions, targets = logits[:, :-1][scored], ids[:, 1:][scored]
    chunks = zip(torch.split(predictions, FLOAT_ROWS), torch.split(targets, FLOAT_ROWS), strict=True)
    losses = [nn.functional.cross_entropy(p.float(), t, reduction="none").double().sum() for p, t in chunks]
    return torch.stack(losses).sum().cpu()


def text_perplexities(
    tokenizer: PreTrainedTokenizerBase, stream: Tensor, plan: Sequence[Window], window: int, loss: float
) -> dict[str, Any]:
    """Word and byte perplexity over the text that the windows cover; words as lm-evaluation-harness counts them."""
    covered = torch.zeros(len(stream), dtype=torch.bool)
    for w in plan:
        covered[w.start : w.start + window] = True
    ids = stream[covered]
    text = str(tokenizer.decode(ids, skip_special_tokens=True))
    words, nbytes = len(re.split(r"\s+", text)), len(text.encode())
    return {
        "word_perplexity": exponential(loss * len(ids) / words),
        "byte_perplexity": exponential(loss * len(ids) / max(nbytes, 1)),
        "words": words,
    }


def exponential(loss: float) -> float:
    """e^loss, infinite where a float does not hold it."""
    return math.exp(loss) if loss < 700 else math.inf


def reset_peak_memory(device: torch.device) -> None:
    """Start `peak_memory` anew; without effect on a CPU, whose high-water mark is the process'."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def peak_memory(device: torch.device) -> int:
    """Bytes: the most that CUDA held since the last reset, or the process' resident high-water mark on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # kilobytes everywhere but on macOS
