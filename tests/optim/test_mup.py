"""Width scaling: its factors, its equality with the form that multiplies in the forward pass, the coordinate check."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from weft.errors import WeftError
from weft.optim.mup import mup_groups, scale_init_, widths

INPUTS, CLASSES = 7, 5


class Net(nn.Module):
    """Embedding, two hidden layers, norm gain, head; `multiplier` is the forward factor of muP's other form."""

    def __init__(self, width: int, multiplier: float = 1.0, seed: int = 0) -> None:
        super().__init__()
        self.embed = nn.Embedding(INPUTS, width)
        self.a, self.b = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, CLASSES, bias=False)
        self.multiplier = multiplier
        generator = torch.Generator().manual_seed(seed)
        for p in self.parameters():
            if p.dim() == 2:
                p.data = torch.randn(p.shape, generator=generator) * 0.1
        # torch draws biases at random
        nn.init.zeros_(self.a.bias)
        nn.init.zeros_(self.b.bias)
        self.double()

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        h = self.norm(h + self.b(self.a(h).relu()))
        return self.head(h) * self.multiplier


def rates(model: nn.Module, groups: list[dict[str, object]]) -> dict[str, tuple[float, float]]:
    names = {id(p): name for name, p in model.named_parameters()}
    return {names[id(p)]: (g["lr"], g["weight_decay"]) for g in groups for p in g["params"]}  # type: ignore


def test_factors_at_four_times_the_width() -> None:
    model, base = Net(32), Net(8)
    adam = rates(model, mup_groups(model, base, 1.0, weight_decay=0.1))
    assert adam["a.weight"] == pytest.approx((0.25, 0.2))
    assert adam["b.weight"] == pytest.approx((0.25, 0.2))
    assert adam["head.weight"] == pytest.approx((0.25, 0.0))
    assert all(adam[name] == (1.0, 0.0) for name in ("embed.weight", "a.bias", "norm.weight", "norm.bias"))
    sgd = rates(model, mup_groups(model, base, 1.0, weight_decay=0.1, rule="sgd", decay="independent"))
    assert sgd["a.weight"] == pytest.approx((1.0, 0.4))
    assert sgd["embed.weight"] == pytest.approx((4.0, 0.1))
    assert sgd["head.weight"] == pytest.approx((0.25, 0.4))
    factors = widths(model, base)
    assert [factors[n].init for n in ("embed.weight", "a.weight", "head.weight")] == pytest.approx([1.0, 0.5, 0.25])


def test_decay_composes_over_widths() -> None:
    def decay(wide: int, narrow: int, weight_decay: float) -> float:
        model = Net(wide)
        return rates(model, mup_groups(model, Net(narrow), 1.0, weight_decay=weight_decay))["a.weight"][1]

    assert decay(32, 16, decay(16, 8, 0.1)) == pytest.approx(decay(32, 8, 0.1), abs=1e-12)
    assert decay(8, 8, 0.1) == 0.1


def test_base_width_is_the_standard_training_bit_for_bit() -> None:
    scaled, plain = Net(8), Net(8)
    scale_init_(scaled, Net(8))
    opts = [torch.optim.Adam(mup_groups(scaled, Net(8), 1e-2)), torch.optim.Adam(plain.parameters(), lr=1e-2)]
    for _ in range(5):
        for model, opt in zip((scaled, plain), opts, strict=True):
            step(model, opt)
    assert all(torch.equal(a, b) for a, b in zip(scaled.parameters(), plain.parameters(), strict=True))


def step(model: nn.Module, opt: torch.optim.Optimizer) -> None:
    x = torch.arange(INPUTS)
    opt.zero_grad()
    nn.functional.cross_entropy(model(x), x % CLASSES).backward()
    opt.step()


@pytest.mark.parametrize("rule", ["adam", "sgd"])
def test_equals_the_form_with_a_forward_multiplier(rule: str) -> None:
    """Tensor Programs V, table 8: a constant head times 1/m_in in the forward pass, lr eta (Adam) or eta m_in (SGD)."""
    base, m = Net(8), 4.0
    ours, theirs = Net(32), Net(32, multiplier=1.0 / m)
    scale_init_(ours, base)
    with torch.no_grad():
        for layer in (theirs.a, theirs.b):
            layer.weight.mul_(m**-0.5)
    hidden = [theirs.a.weight, theirs.b.weight]
    vectors = [p for n, p in theirs.named_parameters() if n not in ("a.weight", "b.weight", "head.weight")]
    eta = 1e-2
    if rule == "adam":
        lrs = [(hidden, eta / m), (vectors, eta), ([theirs.head.weight], eta)]
        opts: list[torch.optim.Optimizer] = [
            torch.optim.Adam(mup_groups(ours, base, eta), eps=1e-30),
            torch.optim.Adam([{"params": p, "lr": lr} for p, lr in lrs], eps=1e-30),
        ]
    else:
        lrs = [(hidden, eta), (vectors, eta * m), ([theirs.head.weight], eta * m)]
        opts = [
            torch.optim.SGD(mup_groups(ours, base, eta, rule="sgd")),
            torch.optim.SGD([{"params": p, "lr": lr} for p, lr in lrs]),
        ]
    x = torch.arange(INPUTS)
    for _ in range(5):
        torch.testing.assert_close(ours(x), theirs(x), rtol=1e-9, atol=1e-9)
        step(ours, opts[0])
        step(theirs, opts[1])


def slope(values: dict[int, float]) -> float:
    xs = torch.tensor([math.log(width) for width in values])
    ys = torch.tensor([math.log(value) for value in values.values()])
    xs, ys = xs - xs.mean(), ys - ys.mean()
    return float((xs @ ys) / (xs @ xs))


def test_coordinate_check() -> None:
    """After five steps of Adam the logits have moved alike at every width; unscaled they move more and more."""
    x, moved = torch.arange(INPUTS), {"scaled": {}, "plain": {}}
    for width in (32, 64, 128, 256):
        for kind in moved:
            total = 0.0
            for seed in range(3):
                model, base = Net(width, seed=seed), Net(32)
                groups: object = model.parameters()
                if kind == "scaled":
                    scale_init_(model, base)
                    groups = mup_groups(model, base, 1e-2)
                opt = torch.optim.Adam(groups, lr=1e-2)  # type: ignore
                before = model(x).detach()
                for _ in range(5):
                    step(model, opt)
                total += float((model(x).detach() - before).abs().mean())
            moved[kind][width] = total
    assert abs(slope(moved["scaled"])) < 0.15
    assert slope(moved["plain"]) > 0.4


def test_stored_orientation_and_named_heads() -> None:
    transformers = pytest.importorskip("transformers")

    def gpt(width: int) -> nn.Module:
        config = transformers.GPT2Config(n_embd=width, n_head=2, n_layer=1, vocab_size=11, tie_word_embeddings=False)
        with torch.device("meta"):
            return transformers.GPT2LMHeadModel(config)

    found = widths(gpt(32), gpt(8))
    up = found["transformer.h.0.mlp.c_fc.weight"]
    assert (up.kind, up.m_in, up.m_out) == ("hidden", 4.0, 4.0)
    assert found["lm_head.weight"].kind == "output" and found["transformer.wte.weight"].kind == "vector"
    assert found["transformer.wte.weight"].m_out == 4.0


def test_mistakes_are_answered_in_a_sentence() -> None:
    with pytest.raises(WeftError, match="the narrower one"):
        widths(Net(8), Net(16))
    with pytest.raises(WeftError, match="more than width"):
        widths(Net(8), nn.Linear(2, 2))
    tied = Net(8)
    tied.head = nn.Linear(8, INPUTS, bias=False)
    tied.head.weight = tied.embed.weight
    with pytest.raises(WeftError, match="tie_word_embeddings=False"):
        widths(tied, tied)
    fixed = nn.Sequential(nn.Linear(4, 16), nn.Linear(16, 3), nn.Linear(3, 16), nn.Linear(16, 2))
    narrow = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(3, 8), nn.Linear(8, 2))
    with pytest.raises(WeftError, match="only on its input side"):
        widths(fixed, narrow)
