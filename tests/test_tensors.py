"""Tensors of files and slices: in aligned memory of their own, so that products give the same bits."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import weft
from tests.train.test_trainer import assert_same, go, model_of
from weft.io.checkpoint import Checkpoint
from weft.io.save import save_model
from weft.runs.loading import load_model
from weft.tensors import ALIGNMENT, own_memory, owned, read_metadata, read_tensor, read_tensors
from weft.terms import LowRank

SOURCE = Path(weft.__file__).parent


def placed(tensor: Tensor, offset: int) -> Tensor:
    """A copy that starts `offset` entries behind an aligned place, amid other numbers."""
    memory = torch.full((tensor.numel() + offset + 32,), 7.0, dtype=tensor.dtype)
    return memory[offset : offset + tensor.numel()].view(tensor.shape).copy_(tensor)


def aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % ALIGNMENT == 0 and tensor.is_contiguous()


@given(
    st.tuples(*[st.integers(1, 24)] * 3),
    st.integers(0, 16),
    st.integers(0, 16),
    st.sampled_from([torch.float32, torch.float64]),
    st.integers(0, 99),
)
def test_products_of_owned_operands_do_not_depend_on_where_they_lay(
    sizes: tuple[int, int, int], left: int, right: int, dtype: torch.dtype, seed: int
) -> None:
    m, k, n = sizes
    generator = torch.Generator().manual_seed(seed)
    a, b = (torch.randn(*shape, dtype=dtype, generator=generator) for shape in ((m, k), (n, k)))
    here, there = owned(placed(a, left)), owned(placed(b, right))
    assert aligned(here) and aligned(there) and torch.equal(here, a) and torch.equal(there, b)
    for ours, plain in ((here @ there.mT, a @ b.mT), (there @ here.mT, b @ a.mT), (here.mT @ here, a.mT @ a)):
        assert torch.equal(ours, plain)


def test_what_is_owned_already_is_not_copied() -> None:
    x = torch.randn(6, 4)
    assert owned(x) is x and owned(x.mT).is_contiguous()
    part = owned(x[:2])  # aligned, but it would keep the rest alive
    assert part.untyped_storage().nbytes() == part.numel() * part.element_size()


def test_factors_do_not_keep_the_matrices_alive_that_they_were_cut_from() -> None:
    U, s, V = torch.linalg.svd(torch.randn(40, 30), full_matrices=False)
    term = LowRank.from_factors((U * s)[:, -3:], V[-3:])
    for parameter in term.parameters():
        assert aligned(parameter) and parameter.untyped_storage().nbytes() == 4 * parameter.numel()


@settings(max_examples=20)
@given(st.lists(st.integers(0, 9), min_size=1, max_size=5), st.integers(0, 9))
def test_tensors_of_a_file_are_aligned(tmp_path_factory: pytest.TempPathFactory, lengths: list[int], note: int) -> None:
    file = tmp_path_factory.mktemp("file") / "x.safetensors"
    tensors = {f"{i}": torch.randn(length, 3) for i, length in enumerate(lengths)}
    save_file(tensors, file, metadata={"note": "n" * note})  # the length of the header moves them all
    found = read_tensors(file)
    assert found.keys() == tensors.keys() and read_metadata(file) == {"note": "n" * note}
    for name, tensor in tensors.items():
        for read in (found[name], read_tensor(file, name), Checkpoint(file.parent)[name]):
            assert torch.equal(read, tensor) and (aligned(read) or not read.numel())


def test_only_one_module_reads_tensors_from_files() -> None:
    """Whoever opens a file himself has tensors that lie anywhere."""
    reading = re.compile(r"\b(get_tensor|load_file)\b")
    found = {str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py") if reading.search(path.read_text())}
    assert found == {"tensors.py"}


def moved(model: nn.Module, offset: int) -> nn.Module:
    for parameter in model.parameters():
        parameter.data = placed(parameter.data, offset)
    return model


def test_models_that_are_read_lie_in_memory_of_their_own(tmp_path: Path) -> None:
    model = model_of()
    save_model(model, None, tmp_path / "plain")
    weft.compress(model, "svd", budget=0.5)
    save_model(model, None, tmp_path / "weft")
    found = AutoModelForCausalLM.from_pretrained(tmp_path / "weft", dtype="auto")
    for loaded in (load_model(tmp_path / "plain"), load_model(tmp_path / "weft"), found):
        assert all(aligned(p) for p in loaded.parameters())
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        assert torch.equal(found(input_ids=ids).logits, model(input_ids=ids).logits)


def test_own_memory_leaves_what_overlaps() -> None:
    model = nn.Module()
    whole = placed(torch.randn(8, 3), 1)
    model.whole, model.alone = nn.Parameter(whole), nn.Parameter(placed(torch.randn(5, 3), 2).mT)
    model.register_buffer("part", whole[2:])
    before = {name: t.detach().clone() for name, t in model.state_dict().items()}
    own_memory(model)
    assert aligned(model.alone) and not aligned(model.whole)
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    model.whole.data[2] = 5.0
    assert (model.part[0] == 5).all()
    model.to("meta")
    own_memory(model)


def test_training_moves_weights_that_lie_anywhere_before_its_first_step(tmp_path: Path) -> None:
    """Where those of a checkpoint lie, so that a run which goes on from one gives the same bits."""
    whole, _ = go(tmp_path / "a", moved(model_of(), 1), steps=4)
    shutil.copytree(tmp_path / "a" / "checkpoint-2", tmp_path / "b" / "checkpoint-2")
    shutil.copy(tmp_path / "a" / "metrics.jsonl", tmp_path / "b")
    resumed, _ = go(tmp_path / "b", moved(model_of(), 3), steps=4)
    assert_same(whole, resumed)
    for model in (whole, resumed):
        assert all(aligned(p) for p in model.parameters())
