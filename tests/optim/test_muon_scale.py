"""Muon beside AdamW is torch's two optimizers in one; SCALE against its lines in fp64."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weft.errors import WeftError
from weft.optim import muon, scale


class Small(nn.Module):
    """A table, a block of a matrix, a norm and a head."""

    def __init__(self, tied: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.table, self.head = nn.Embedding(10, 6), nn.Linear(6, 10, bias=False)
        self.layers = nn.ModuleList([nn.Linear(6, 6, bias=False), nn.LayerNorm(6)])
        if tied:
            self.head.weight = self.table.weight
        self.double()

    def loss(self, words: Tensor) -> Tensor:
        h = self.table(words)
        return self.head(h + self.layers[1](self.layers[0](h))).square().mean() + self.table.weight.sum() * 0.01


def words(step: int) -> Tensor:
    return torch.randint(10, (30,), generator=torch.Generator().manual_seed(step))


def steps(model: Small, optimizer: torch.optim.Optimizer, count: range) -> None:
    for step in count:
        optimizer.zero_grad()
        model.loss(words(step)).backward()
        optimizer.step()


def test_muon_is_torch_s_muon_and_adamw():
    model, plain = Small(), Small()
    own = [plain.layers[0].weight]
    rest = [p for p in plain.parameters() if p is not own[0]]
    both = (
        torch.optim.Muon(own, lr=1e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=1e-2, weight_decay=0.0),
    )
    steps(model, muon(model, 1e-2, weight_decay=0.1), range(4))
    for step in range(4):
        for optimizer in both:
            optimizer.zero_grad()
        plain.loss(words(step)).backward()
        for optimizer in both:
            optimizer.step()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True))


def test_parts_share_groups_and_state_through_copies_and_checkpoints():
    model = Small()
    optimizer = muon(model, 1e-2)
    steps(model, optimizer, range(2))
    for twin in (pickle.loads(pickle.dumps(optimizer)), copy.deepcopy(optimizer), muon(Small(), 1e-2)):
        twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        assert all(part.state is twin.state for part in twin.parts)
        assert [id(g) for part in twin.parts for g in part.param_groups] == [id(g) for g in twin.param_groups]
        assert len(twin.state) == len(optimizer.state) == 5
    optimizer.param_groups[0]["lr"] = 0.5  # as a schedule does
    assert optimizer.parts[0].param_groups[0]["lr"] == 0.5
    with pytest.raises(WeftError, match="Give all parameters when the optimizer is made"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2, 2))]})


@pytest.mark.parametrize("tied", [False, True])
def test_scale_follows_its_lines(tied):
    model, plain = Small(tied), Small(tied)
    optimizer = scale(model, 1e-2, weight_decay=0.1, vector_rate=0.5)
    steps(model, optimizer, range(5))
    momentum: Tensor | float = 0.0
    vectors = torch.optim.AdamW(plain.layers[1].parameters(), lr=5e-3, weight_decay=0.0)
    for step in range(5):
        plain.zero_grad()
        plain.loss(words(step)).backward()
        with torch.no_grad():
            W = plain.layers[0].weight
            W -= 1e-2 * 0.1 * W + 1e-2 * W.grad / W.grad.square().mean(1, keepdim=True).sqrt()
            momentum = 0.9 * momentum + 0.1 * plain.head.weight.grad
            plain.head.weight -= 1e-2 * momentum / momentum.square().mean(1, keepdim=True).sqrt()
            if not tied:
                G = plain.table.weight.grad
                plain.table.weight -= 1e-2 * G / G.square().mean(0, keepdim=True).sqrt()
        vectors.step()
    for (name, a), b in zip(model.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12, msg=lambda m, name=name: f"{name}: {m}")
    kept = sum(t.numel() for state in optimizer.state.values() for t in state.values() if t.numel() > 1)
    assert kept == model.head.weight.numel() + 2 * 12, "more is kept than the head's momentum and the vectors' moments"


def test_scale_does_not_see_the_gradient_s_size_and_leaves_zero_rows():
    one, other = Small(), Small()
    for model, size in ((one, 1.0), (other, 1e3)):
        optimizer = scale(model, 1e-2)
        (model.loss(words(0)) * size).backward()
        model.layers[0].weight.grad[2] = 0.0
        optimizer.step()
    before = Small().layers[0].weight
    torch.testing.assert_close(one.layers[0].weight, other.layers[0].weight, atol=1e-10, rtol=0)
    assert torch.equal(one.layers[0].weight[2], before[2])
    moved = (one.layers[0].weight - before)[[0, 1, 3, 4, 5]]
    torch.testing.assert_close(moved.square().mean(1), torch.full((5,), 1e-4, dtype=torch.float64), atol=0, rtol=1e-9)


def test_of_a_conv1d_the_inputs_are_the_rows() -> None:
    torch.manual_seed(0)
    linear, turned = nn.Linear(6, 4, bias=False), Conv1D(4, 6)
    with torch.no_grad():
        turned.weight.copy_(linear.weight.mT)
    x, found = torch.randn(5, 6), []
    for layer in (linear, turned):
        model = nn.ModuleDict({"embedding": nn.Embedding(3, 2), "blocks": nn.ModuleList([layer])})
        optimizer = scale(model, 1e-2, weight_decay=0.1)
        layer(x).square().sum().backward()
        optimizer.step()
        found.append(layer.weight.detach())
    torch.testing.assert_close(found[1].mT, found[0])
