"""SM3 on scattered entries against the dense algorithm, written as loops."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.optim.sm3 import SM3

OUT, IN = 5, 4


def gradients(count: int, steps: int = 6) -> list[Tensor]:
    return [torch.randn(count, generator=torch.Generator().manual_seed(step)) for step in range(steps)]


def dense_sm3(weight: Tensor, grads: list[Tensor], lr: float) -> Tensor:
    """Anil et al., 2019, algorithm SM3-II, covers: rows and columns; entry by entry, in fp64."""
    weight = weight.double().clone()
    row, column = [0.0] * OUT, [0.0] * IN
    for grad in grads:
        new_row, new_column = list(row), list(column)
        for i in range(OUT):
            for j in range(IN):
                g = float(grad[i * IN + j])
                nu = min(row[i], column[j]) + g * g
                weight[i * IN + j] -= lr * g / (nu + 1e-8) ** 0.5
                new_row[i], new_column[j] = max(new_row[i], nu), max(new_column[j], nu)
        row, column = new_row, new_column
    return weight


def test_all_entries_are_dense_sm3() -> None:
    weight = nn.Parameter(torch.randn(OUT * IN, generator=torch.Generator().manual_seed(9)))
    expected = dense_sm3(weight.detach(), gradients(OUT * IN), 0.1)
    optimizer = SM3([weight], lr=0.1)
    optimizer.place(weight, torch.arange(OUT * IN), (OUT, IN))
    for grad in gradients(OUT * IN):
        weight.grad = grad
        optimizer.step()
    torch.testing.assert_close(weight.detach(), expected.float(), atol=1e-6, rtol=1e-5)


def test_accumulators_bound_the_sum_of_squares_of_each_entry() -> None:
    weight, positions = nn.Parameter(torch.zeros(7)), torch.tensor([0, 2, 5, 6, 11, 12, 19])
    optimizer = SM3([weight], lr=0.1)
    optimizer.place(weight, positions, (OUT, IN))
    total = torch.zeros(7)
    for grad in gradients(7):
        weight.grad = grad
        optimizer.step()
        total += grad.square()
        state = optimizer.state[weight]
        bound = torch.minimum(state["row"][positions // IN], state["column"][positions % IN])
        assert (bound >= total * (1 - 1e-6)).all()
    assert state["row"].shape == (OUT,) and state["column"].shape == (IN,)


def test_a_moved_choice_keeps_the_accumulators_and_resumes_exactly() -> None:
    straight, halfway = (nn.Parameter(torch.zeros(3)) for _ in range(2))
    ends = []
    for weight, interrupted in ((straight, False), (halfway, True)):
        optimizer = SM3([weight], lr=0.1)
        optimizer.place(weight, torch.tensor([0, 6, 9]), (OUT, IN))
        for step, grad in enumerate(gradients(3)):
            if step == 3:
                held = optimizer.state[weight]["row"].clone()
                optimizer.place(weight, torch.tensor([3, 6, 19]), (OUT, IN))
                assert torch.equal(optimizer.state[weight]["row"], held)
            if step == 4 and interrupted:
                state = copy.deepcopy(optimizer.state_dict())
                optimizer = SM3([weight], lr=0.1)
                optimizer.load_state_dict(state)
                optimizer.place(weight, torch.tensor([3, 6, 19]), (OUT, IN))
            weight.grad = grad
            optimizer.step()
        ends.append(weight.detach())
    assert torch.equal(*ends)


def test_it_must_be_told_the_places() -> None:
    weight = nn.Parameter(torch.zeros(3))
    weight.grad = torch.ones(3)
    with pytest.raises(WeftError, match="place"):
        SM3([weight]).step()
