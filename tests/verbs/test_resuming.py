"""Every long work before a model is written goes on, after a signal, from what it had finished, to the same bytes."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from weft import signals
from weft.allocate import ALLOCATIONS
from weft.methods import METHODS, lq_lora, minitron
from weft.runs.pieces import Store
from weft.testing_adapters import task, tiny_llama
from weft.verbs.compress import compress, run
from weft.verbs.finetune import finetune
from weft.verbs.quantize import quantize
from weft.verbs.shrink import shrink

Work = Callable[[nn.Module, "Path | None"], dict[str, Tensor]]
BATCHES = task()[:3]
SETTINGS = {"steps": 7, "save_every": 3, "lr": 1e-3, "window": 32, "batch": 2, "log_every": 1}
decompose = lq_lora.decompose


def counted(model: nn.Module, stop: int | None = None) -> list[int]:
    """The passes through the model so far, one entry each; a signal comes in the midst of the one named."""
    passes: list[int] = []

    def before(module: nn.Module, *args: Any) -> None:
        passes.append(len(passes) + 1)
        if passes[-1] == stop:
            signal.raise_signal(signal.SIGTERM)

    model.register_forward_pre_hook(before)
    return passes


def interrupted(work: Work, stop: int, place: Path) -> int:
    """How many passes were made until the work under way was finished."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)  # under nohup it is ignored, and stays so
    passes = counted(model := tiny_llama(), stop)
    try:
        with pytest.raises(KeyboardInterrupt, match="SIGTERM"), signals.listening():
            work(model, place)
    finally:
        signal.signal(signal.SIGTERM, before)
    return len(passes)


def check(work: Work, place: Path, again: int, shares: tuple[float, ...] = (0.1, 0.5, 0.9)) -> None:
    """Interrupted anywhere, the work ends on the same bytes with at most `again` passes made twice; on other weights it
    starts anew.
    """
    straight = counted(model := tiny_llama())
    expected = work(model, None)
    for share in shares:
        own = place / str(share)
        own.mkdir()
        done = interrupted(work, max(int(share * len(straight)), 1), own)
        more = counted(model := tiny_llama())
        same(work(model, own), expected)
        assert done + len(more) <= len(straight) + again, f"{done} + {len(more)} passes in the place of {len(straight)}"
    changed = [tiny_llama(), tiny_llama()]
    for model in changed:
        nn.init.normal_(model.get_submodule("model.layers.0.mlp.up_proj").weight, generator=drawn())  # type: ignore[arg-type]
    same(work(changed[0], own), work(changed[1], None))


def drawn() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert all(torch.equal(t, expected[name]) for name, t in found.items())


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.shrink])
@pytest.mark.parametrize("options", [{}, {"by": "loss", "axes": "blocks,neurons", "multiple": 1}])
def test_a_model_that_is_cut_as_a_whole(name: str, options: dict[str, Any], tmp_path: Path) -> None:
    def work(model: nn.Module, place: Path | None) -> dict[str, Tensor]:
        return dict(shrink(model, name, budget=0.8, batches=BATCHES, progress=place, **options).model.state_dict())

    check(work, tmp_path, again=0)


def test_the_command_keeps_what_such_a_method_found(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    how: dict[str, Any] = {"method": "minitron", "budget": 0.9, "windows": 2, "window": 16, "device": "cpu"}
    run(str(tiny_directory), tmp_path / "whole", **how)

    def interrupted(*args: Any, **more: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(minitron, "block_influence", interrupted)
        run(str(tiny_directory), tmp_path / "out", **how)
    assert len(list((tmp_path / "out.partial" / "progress").glob("importance-*"))) == 1
    run(str(tiny_directory), tmp_path / "out", **how)
    one, other = (tmp_path / name / "model.safetensors" for name in ("whole", "out"))
    assert one.read_bytes() == other.read_bytes() and not (tmp_path / "out.partial").exists()


# llama-nas and lems-search measure as quantune and lems do, only more often
@pytest.mark.parametrize(
    "name", sorted({n for n, how in ALLOCATIONS.items() if how.reads} - {"llama-nas", "lems-search"})
)
def test_what_an_allocation_looks_at(name: str, tmp_path: Path) -> None:
    """The passes of the model as it is, with which cut ones are compared, are made once more."""
    method = "lrp-pruning" if "relevance" in ALLOCATIONS[name].reads else "kfac-svd"

    def work(model: nn.Module, place: Path | None) -> dict[str, Tensor]:
        compress(model, method, budget=0.6, allocate=name, batches=BATCHES, progress=place)
        return dict(model.state_dict())

    check(work, tmp_path, again=len(BATCHES) if "divergence" in ALLOCATIONS[name].reads else 0, shares=(0.6,))


def test_codes_and_factors_that_are_found_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the errors of a layer's formats nor a finished layer are found again."""
    calls: list[int] = []
    stops: list[int] = []

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(len(calls) + 1)
        if calls[-1] in stops:
            raise KeyboardInterrupt
        return decompose(*args, **kwargs)

    def work(place: Path | None) -> dict[str, Tensor]:
        calls.clear()
        model = tiny_llama()
        quantize(model, "lq-lora", rank=2, bits=4.5, progress=None if place is None else Store(place))
        return dict(model.state_dict())

    monkeypatch.setattr(lq_lora, "decompose", counting)
    expected = work(None)
    total = len(calls)
    for stop in (total // 2, total - 1):
        place = tmp_path / str(stop)
        place.mkdir()
        stops.append(stop)
        with pytest.raises(KeyboardInterrupt):
            work(place)
        stops.clear()
        same(work(place), expected)
        assert stop - 1 + len(calls) < total + len(lq_lora.SHORT_GRID)


@pytest.mark.parametrize("name", [name for name, method in METHODS.items() if method.kind == "train"])
def test_a_method_that_trains_the_model(name: str, tiny_directory: Path, tmp_path: Path) -> None:
    """Its power is cut after step 5, with a checkpoint of step 3."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_directory)
    text = "".join(f"def function_{i}(value):\n    return value * {i}\n\n\n" for i in range(60))

    class PowerCut(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if state.global_step == 5:
                raise RuntimeError("power cut")

    def trained(place: Path | None, *callbacks: TrainerCallback) -> dict[str, Tensor]:
        model = AutoModelForCausalLM.from_pretrained(tiny_directory)
        if name in ("pv-tuning", "tiny-training"):
            quantize(model, "rtn", bits=3)
        finetune(model, tokenizer, text, name, directory=place, callbacks=callbacks, **SETTINGS)
        return dict(model.state_dict())

    with pytest.raises(RuntimeError, match="power cut"):
        trained(tmp_path, PowerCut())
    assert (tmp_path / "checkpoint-3").is_dir()
    same(trained(tmp_path), trained(None))
