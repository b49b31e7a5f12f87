"""`weft pretrain --shard`: two gloo processes, each with its rows of everything, train what one does, and their
checkpoints are those of one.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import launched
from weft.errors import WeftError
from weft.runs.loading import load_tokenizer
from weft.train.recipe import Recipe
from weft.train.sharding import is_sharded
from weft.train.sizes import SIZES
from weft.verbs.fresh import Structure
from weft.verbs.pretrain import build, pretrain, run

TEXT = "".join(f"def function_{i}(value):\n    return value * {i}\n\n\n" for i in range(150))
CASES = {  # method, optimizer, its options
    "dense": (None, "adamw", {}),
    "sltrain": ("sltrain", "adamw", {}),
    "galore": (None, "galore", {"rank": 4, "refresh": 3}),  # shards are projected on their other side
}
STEPS, HALF = 6, 4


def go(directory: Path, case: str, batch: int, steps: int = STEPS) -> dict[str, torch.Tensor]:
    """Weights after a run of so many steps of a schedule of `STEPS`, or after going on with what is there."""
    SIZES["nano"] = (32, 48, 2, 2)
    method, optimizer, options = CASES[case]
    structure = None if method is None else Structure.of(method, 8, {"density": 0.05})
    words = load_tokenizer("pico")
    model, _ = build("nano", words, 32, 0, structure=structure)
    recipe = Recipe(steps=STEPS, batch=batch, window=32, lr=1e-2, save_every=HALF, log_every=1, clip=1.0)
    directory.mkdir(exist_ok=True)
    before = type(model), {name: type(m) for name, m in model.named_modules()}
    found = pretrain(
        model, words, [directory.parent / "text.txt"], recipe, directory, structure=structure, optimizer=optimizer,
        schedule="constant", evaluation=TEXT, eval_windows=2, shard=batch == 2, **options,
    )  # fmt: skip
    assert (type(model), {name: type(m) for name, m in model.named_modules()}) == before and not is_sharded(model)
    assert found["perplexity"] > 1
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def process(rank, directory):
    for case in CASES:
        torch.save(go(Path(directory) / f"{case}-two", case, batch=2), Path(directory) / f"{case}-{rank}.pt")
    for case in ("dense", "sltrain"):  # goes on with one process's checkpoint
        torch.save(go(Path(directory) / f"{case}-spread", case, batch=2), Path(directory) / f"{case}-spread-{rank}.pt")
    if rank == 0:
        half(Path(directory) / "galore-two", "galore-again")
    torch.distributed.barrier()
    torch.save(go(Path(directory) / "galore-again", "galore", batch=2), Path(directory) / f"galore-again-{rank}.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


def half(directory: Path, name: str) -> None:
    """A copy of a run's directory as it was when half of the steps were done."""
    shutil.copytree(directory, directory.parent / name)
    shutil.rmtree(directory.parent / name / f"checkpoint-{STEPS}")


def close(found, expected):
    for name, weight in expected.items():
        torch.testing.assert_close(found[name], weight, atol=2e-5, rtol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.distributed
def test_two_processes_with_a_part_each_train_what_one_does(tmp_path):
    (tmp_path / "text.txt").write_text(TEXT)  # once, and not by a process while the other reads
    alone = {case: go(tmp_path / f"{case}-one", case, batch=4) for case in ("dense", "sltrain")}
    for case in alone:
        half(tmp_path / f"{case}-one", f"{case}-spread")
    launched(process, str(tmp_path))
    found = {path.stem: torch.load(path, weights_only=True) for path in tmp_path.glob("*.pt")}
    for case in CASES:
        for name, weight in found[f"{case}-0"].items():
            assert torch.equal(weight, found[f"{case}-1"][name]), name
    close(found["galore-again-0"], found["galore-0"])
    for case, expected in alone.items():
        close(found[f"{case}-0"], expected)
        files = (tmp_path / f"{case}-{n}/checkpoint-{STEPS}/weft_weights.safetensors" for n in ("one", "two"))
        one, two = ({name: t.shape for name, t in load_file(file).items()} for file in files)
        assert one == two
        close(found[f"{case}-spread-0"], expected)  # from one to two processes, and from two to one
        half(tmp_path / f"{case}-two", f"{case}-gathered")
        close(go(tmp_path / f"{case}-gathered", case, batch=4), expected)


def test_one_process_has_nothing_to_spread_over(tmp_path):
    with pytest.raises(WeftError, match="--shard spreads a model over processes, and there is one"):
        run(tmp_path / "out", size="9m", shard=True, device="cpu")
    assert not (tmp_path / "out").exists()


def test_accelerates_fsdp_is_understood(tmp_path, monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(WeftError, match="--shard spreads a model over processes, and there is one"):
        run(tmp_path / "out", size="9m", device="cpu")
