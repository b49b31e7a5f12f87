"""Per-entry state against a dense, masked AdamW, and the laws of changing, freezing and resuming."""

from __future__ import annotations

import io

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from weft.errors import WeftError
from weft.optim.entries import Entries, EntryAdamW

SHAPE = (4, 3)
AXES = [None, 0, 1]


def dense_masked_adamw(
    weight: Tensor,
    grads: list[Tensor],
    masks: list[Tensor],
    lr: float,
    betas: tuple[float, float],
    decay: float,
) -> Tensor:
    """The slow truth, entry by entry: moments and an age for each; an entry that leaves the mask forgets them."""
    weight = weight.double().clone()
    m, v, age = (torch.zeros(weight.shape, dtype=torch.float64) for _ in range(3))
    for grad, mask in zip(grads, masks, strict=True):
        for i in range(weight.shape[0]):
            for j in range(weight.shape[1]):
                if not mask[i, j]:
                    m[i, j] = v[i, j] = age[i, j] = 0.0
                    continue
                g = grad[i, j].double()
                age[i, j] += 1
                m[i, j] = betas[0] * m[i, j] + (1 - betas[0]) * g
                v[i, j] = betas[1] * v[i, j] + (1 - betas[1]) * g * g
                hat_m, hat_v = m[i, j] / (1 - betas[0] ** age[i, j]), v[i, j] / (1 - betas[1] ** age[i, j])
                weight[i, j] -= lr * decay * weight[i, j] + lr * hat_m / (hat_v.sqrt() + 1e-6)
    return weight


def size(axis: int | None) -> int:
    return SHAPE[0] * SHAPE[1] if axis is None else SHAPE[axis]


def mask_of(index: Tensor, axis: int | None) -> Tensor:
    mask = torch.zeros(SHAPE, dtype=torch.bool)
    if axis is None:
        mask.view(-1)[index] = True
    else:
        mask.index_fill_(axis, index, True)
    return mask


def parameter(seed: int = 0, dtype: torch.dtype = torch.float64) -> nn.Parameter:
    return nn.Parameter(
        torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)
    )


@st.composite
def choices(draw: st.DrawFn) -> tuple[int | None, list[list[int]]]:
    """An axis and one choice of slots for each of a few steps, so that slots come, stay, go and come again."""
    axis = draw(st.sampled_from(AXES))
    slots = st.lists(st.integers(0, size(axis) - 1), unique=True, min_size=1, max_size=size(axis))
    distinct = draw(st.lists(slots, min_size=1, max_size=4))
    return axis, [choice for choice in distinct for _ in range(draw(st.integers(1, 3)))]


@settings(max_examples=40, deadline=None)
@given(choices(), st.integers(0, 2**16))
def test_equals_a_dense_masked_adamw_through_any_changes(chosen: tuple[int | None, list[list[int]]], seed: int) -> None:
    axis, steps = chosen
    w = parameter(seed)
    start = w.detach().clone()
    generator = torch.Generator().manual_seed(seed + 1)
    grads = [torch.randn(SHAPE, generator=generator, dtype=torch.float64) for _ in steps]
    opt = EntryAdamW([w], lr=0.05, betas=(0.8, 0.95), weight_decay=0.1)
    for grad, choice in zip(grads, steps, strict=True):
        opt.choose(w, torch.tensor(choice), axis)
        w.grad = grad
        opt.step()
    masks = [mask_of(torch.tensor(choice), axis) for choice in steps]
    expected = dense_masked_adamw(start, grads, masks, 0.05, (0.8, 0.95), 0.1)
    torch.testing.assert_close(w.detach(), expected, rtol=1e-12, atol=1e-12)
    never = ~torch.stack(masks).any(0)
    assert torch.equal(w.detach()[never], start[never])


@settings(max_examples=40, deadline=None)
@given(st.data(), st.sampled_from(AXES))
def test_a_change_keeps_what_stays_and_zeroes_what_comes(data: st.DataObject, axis: int | None) -> None:
    slots = st.lists(st.integers(0, size(axis) - 1), unique=True, max_size=size(axis))
    before, after = torch.tensor(data.draw(slots), dtype=torch.int64), torch.tensor(data.draw(slots), dtype=torch.int64)
    entries = Entries.of(parameter(), before, axis)
    for seed in range(3):
        entries.step(entries.gather(parameter(seed)), (0.9, 0.999), 1e-8)
    entries = entries.freeze(before[: len(before) // 2])
    changed = entries.change(after)
    assert torch.equal(changed.index, after.sort().values)
    for name in ("exp_avg", "exp_avg_sq"):
        full = torch.zeros(SHAPE, dtype=torch.float64)
        entries.scatter_(full, getattr(entries, name))
        # what left the choice is forgotten, so only the overlap may be nonzero
        assert torch.equal(getattr(changed, name), changed.gather(full))
    stays = torch.isin(changed.index, before)
    assert (changed.age[stays] == 3).all() and (changed.age[~stays] == 0).all()
    assert torch.equal(changed.frozen, torch.isin(changed.index, before[: len(before) // 2]))


@pytest.mark.parametrize("axis", AXES)
def test_gather_and_scatter_are_inverse(axis: int | None) -> None:
    w = parameter()
    entries = Entries.of(w, torch.tensor([2, 0]), axis)
    target = torch.zeros_like(w)
    entries.scatter_(target, entries.gather(w.detach()))
    mask = mask_of(torch.tensor([0, 2]), axis)
    assert torch.equal(target, torch.where(mask, w.detach(), torch.zeros_like(w)))


def test_all_entries_equal_torch_adamw() -> None:
    ours, theirs = parameter(), parameter()
    opt = EntryAdamW([ours], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    reference = torch.optim.AdamW([theirs], lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.01)
    opt.choose(ours, torch.arange(ours.numel()))
    for seed in range(20):
        ours.grad = parameter(seed).detach()
        theirs.grad = ours.grad.clone()
        opt.step()
        reference.step()
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("axis", AXES)
def test_frozen_slots_do_not_move_decay_or_age(axis: int | None) -> None:
    w = parameter()
    opt = EntryAdamW([w], lr=0.1, weight_decay=0.5)
    opt.choose(w, torch.tensor([0, 1, 2]), axis)
    w.grad = torch.ones_like(w)
    opt.step()
    opt.freeze(w, torch.tensor([1]))
    before, held = w.detach().clone(), opt.entries(w)
    first = held.exp_avg.clone()
    for _ in range(3):
        opt.step()
    moved = (w.detach() != before) & mask_of(torch.tensor([0, 1, 2]), axis)
    assert torch.equal(moved, mask_of(torch.tensor([0, 2]), axis))
    after = opt.entries(w)
    assert after.age.tolist() == [4, 1, 4]
    position = torch.tensor([1])
    assert torch.equal(after.exp_avg.index_select(axis or 0, position), first.index_select(axis or 0, position))
    opt.freeze(w, torch.tensor([1]), frozen=False)
    opt.step()
    assert opt.entries(w).age.tolist() == [5, 2, 5]


@pytest.mark.parametrize("axis", AXES)
def test_seeded_slots_return_the_means_after_correction(axis: int | None) -> None:
    w = parameter()
    opt = EntryAdamW([w], lr=0.1, betas=(0.9, 0.999))
    opt.choose(w, torch.tensor([0, 2]), axis)
    entries = opt.entries(w)
    mean, square, age = torch.randn_like(entries.exp_avg), torch.rand_like(entries.exp_avg), torch.tensor([2, 5])
    opt.seed(w, torch.tensor([0, 2]), mean, square, age)
    seeded = opt.entries(w)
    assert seeded.age.tolist() == [2, 5]
    torch.testing.assert_close(seeded.exp_avg / seeded.per_slot(1 - 0.9 ** age.double()), mean)
    torch.testing.assert_close(seeded.exp_avg_sq / seeded.per_slot(1 - 0.999 ** age.double()), square)


def test_the_first_update_of_a_late_slot_is_lr() -> None:
    w = nn.Parameter(torch.zeros(4))
    opt = EntryAdamW([w], lr=0.01, betas=(0.9, 0.999), eps=0.0)
    opt.choose(w, torch.tensor([0]))
    w.grad = torch.full((4,), 0.3)
    for _ in range(50):
        opt.step()
    opt.choose(w, torch.tensor([0, 2]))
    opt.step()
    assert w[2].item() == pytest.approx(-0.01, rel=1e-5)


def test_masters_keep_what_bf16_rounds_away_and_survive_a_change() -> None:
    w = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    plain = nn.Parameter(torch.ones(8, dtype=torch.bfloat16))
    opt = EntryAdamW([{"params": [w], "master": True}, {"params": [plain]}], lr=1e-4)
    for p in (w, plain):
        opt.choose(p, torch.tensor([1, 5]))
        p.grad = torch.ones(8, dtype=torch.bfloat16)
    for step in range(100):
        if step == 50:
            opt.choose(w, torch.tensor([1, 6]))
        opt.step()
    assert plain.eq(1).all()
    assert w[1].item() == pytest.approx(0.99, abs=4e-3)
    assert opt.state[w]["master"].tolist() == pytest.approx([0.99, 0.995], abs=1e-4)


def test_masters_follow_what_others_write_into_the_weight() -> None:
    w = nn.Parameter(torch.full((8,), 2.0, dtype=torch.bfloat16))
    opt = EntryAdamW([w], lr=1e-3, master=True)
    opt.choose(w, torch.tensor([1, 5]))
    for change in (False, True):
        if change:
            with torch.no_grad():
                w[1] = 0.0
        w.grad = torch.ones(8, dtype=torch.bfloat16)
        opt.step()
    assert w[1].item() == pytest.approx(-1e-3, rel=0.1)
    assert opt.state[w]["master"].tolist() == pytest.approx([-1e-3, 1.998], abs=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("axis", AXES)
def test_resume_is_exact(dtype: torch.dtype, axis: int | None) -> None:
    def run(w: nn.Parameter, opt: EntryAdamW, steps: range) -> None:
        for step in steps:
            if step == 10:
                opt.choose(w, torch.tensor([0, 2]), axis)
            if step == 15:
                opt.freeze(w, torch.tensor([2]))
            w.grad = parameter(step, dtype).detach()
            opt.step()

    straight, stopped = parameter(9, dtype), parameter(9, dtype)
    whole, first = (EntryAdamW([p], lr=0.01, master=True) for p in (straight, stopped))
    for p, opt in ((straight, whole), (stopped, first)):
        opt.choose(p, torch.tensor([0, 1]), axis)
    run(straight, whole, range(40))
    run(stopped, first, range(20))
    file = io.BytesIO()
    torch.save(first.state_dict(), file)
    file.seek(0)
    second = EntryAdamW([stopped], lr=0.5, master=True)
    second.load_state_dict(torch.load(file, weights_only=True))
    run(stopped, second, range(20, 40))
    assert torch.equal(straight, stopped)
    assert torch.equal(whole.entries(straight).exp_avg_sq, second.entries(stopped).exp_avg_sq)
    assert second.state_bytes() == whole.state_bytes()


def test_state_bytes_follow_the_slots_and_not_the_parameter() -> None:
    w = nn.Parameter(torch.zeros(100, 100))
    opt = EntryAdamW([w])
    opt.choose(w, torch.arange(10))
    assert opt.state_bytes() == 10 * (8 + 4 + 1 + 4 + 4)


def test_mistakes_are_answered_in_a_sentence() -> None:
    w = parameter()
    opt = EntryAdamW([w])
    w.grad = torch.ones_like(w)
    with pytest.raises(WeftError, match="call choose"):
        opt.step()
    with pytest.raises(WeftError, match="chosen twice"):
        opt.choose(w, torch.tensor([1, 1]))
    with pytest.raises(WeftError, match="only 0 to 11"):
        opt.choose(w, torch.tensor([30]))
    with pytest.raises(WeftError, match="of a matrix"):
        opt.choose(w, torch.tensor([1]), axis=2)
    with pytest.raises(WeftError, match="belongs to no group"):
        opt.choose(parameter(), torch.tensor([1]))
    opt.choose(w, torch.tensor([1]), axis=0)
    with pytest.raises(WeftError, match="along axis 0"):
        opt.choose(w, torch.tensor([1]), axis=1)
    with pytest.raises(WeftError, match="not chosen"):
        opt.freeze(w, torch.tensor([2]))
    before = w.detach().clone()
    w.grad[1, 0] = torch.nan
    with pytest.raises(WeftError, match="not finite"):
        opt.step()
    assert torch.equal(w, before) and opt.entries(w).age.item() == 0
    with pytest.raises(WeftError, match="another optimizer"):
        opt.load_state_dict(torch.optim.SGD([w], lr=0.1).state_dict())
    with pytest.raises(WeftError, match="same model and groups"):
        opt.load_state_dict(EntryAdamW([w, parameter()]).state_dict())
    with pytest.raises(WeftError, match="not an optimizer's state_dict"):
        opt.load_state_dict({"weight": w})
