"""ifairy against complex arithmetic and its lines in fp64, entry by entry."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from tests.methods.one_layer import One, close
from tests.methods.test_structures import IN, OUT, STEPS, PlainAdam, batches, drawn, run, start
from weft.errors import WeftError
from weft.kernels.complex_codes import block, parts, to_codes
from weft.terms import ComplexCode, ComplexLatent, RoundedInputs, SumLinear
from weft.verbs.fresh import Structure, finish, restructure
from weft.verbs.merge import merge


def quantised(V: Tensor) -> Tensor:
    """Of complex numbers, one after another."""
    real = [[abs(v.real) >= abs(v.imag) for v in row] for row in V.tolist()]
    sizes = {axis: [] for axis in (True, False)}
    for row, marks in zip(V.tolist(), real, strict=True):
        for v, mark in zip(row, marks, strict=True):
            sizes[mark].append(abs(v.real) if mark else abs(v.imag))
    s_r, s_i = (max(sum(s) / max(len(s), 1), 1e-5) for s in (sizes[True], sizes[False]))
    sign = lambda x: -1.0 if x < 0 else 1.0  # noqa: E731
    return torch.tensor(
        [
            [
                complex(s_r * sign(v.real), 0) if mark else complex(0, s_i * sign(v.imag))
                for v, mark in zip(*pair, strict=True)
            ]
            for pair in zip(V.tolist(), real, strict=True)
        ],
        dtype=torch.complex128,
    )


def complex_of(x: Tensor) -> Tensor:
    """Halves of the last dimension as the parts of complex numbers."""
    return torch.complex(*x.double().chunk(2, -1))


def real_of(z: Tensor) -> Tensor:
    return torch.cat([z.real, z.imag], -1)


def latent(W: Tensor) -> Tensor:
    """The complex matrix nearest to a real one."""
    (a, b), (c, d) = ([*half.chunk(2, 1)] for half in W.double().chunk(2))
    return torch.complex((a - d) / 2, (b + c) / 2)


def test_a_layer_is_the_complex_product_with_the_conjugate_of_its_inputs():
    x = batches()[0][0].float()
    term = ComplexLatent.from_matrix(drawn().float())
    wanted = real_of(complex_of(x).conj() @ quantised(latent(drawn().float())).T)
    close(term(x), wanted, 1e-6)
    assert torch.equal(term.dense(), term.finished().dense())
    codes, scales = to_codes(*torch.randn(2, 5, 7, dtype=torch.float64))
    close(
        real_of(complex_of(x[:, :14]).conj() @ torch.complex(*parts(codes, scales)).T),
        x[:, :14].double() @ block(*parts(codes, scales)).T,
        1e-12,
    )


@pytest.mark.parametrize("activations", [None, 8])
def test_it_follows_its_lines(activations):
    options = {"activations": activations}
    model = start("ifairy", None, **options)
    V, adams, losses = latent(drawn()), [PlainAdam(), PlainAdam()], []
    for x, y in batches():
        u = x
        if activations:
            u = torch.cat(
                [
                    torch.stack([(h * (127 / h.abs().max())).round() / (127 / h.abs().max()) for h in half])
                    for half in x.chunk(2, 1)
                ],
                1,
            )
        residual = real_of(complex_of(u).conj() @ quantised(V).T) - y
        losses.append(float(residual.square().mean()))
        pull = complex_of(2 / residual.numel() * residual)  # of outputs
        inputs = complex_of(u)
        by_real = pull.real.T @ inputs.real - pull.imag.T @ inputs.imag
        by_imaginary = pull.real.T @ inputs.imag + pull.imag.T @ inputs.real
        V = V - torch.complex(adams[0].step(by_real), adams[1].step(by_imaginary))
    assert len(losses) == STEPS and losses[-1] < losses[0]
    assert run(model, Structure.of("ifairy", None, options)) == pytest.approx(losses, rel=1e-8)


def test_a_quarter_turn_of_the_latents_turns_the_codes_and_exchanges_the_scales():
    V = torch.randn(200, 300, dtype=torch.complex128, generator=torch.Generator().manual_seed(0))
    codes, scales = to_codes(V.real, V.imag)
    turned, exchanged = to_codes((1j * V).real, (1j * V).imag)
    assert torch.equal(turned, (codes + 1) % 4)
    close(exchanged, scales.flip(0), 1e-12)
    shares = codes.flatten().long().bincount(minlength=4) / codes.numel()
    assert shares.tolist() == pytest.approx([0.25] * 4, abs=0.01)
    again, same = to_codes(*parts(codes, scales))
    assert torch.equal(again, codes)
    close(same, scales, 1e-12)


def test_ties_zeros_and_an_axis_that_nobody_is_on_have_a_rule():
    codes, scales = to_codes(torch.tensor([[0.0, -1.0, 2.0]]), torch.tensor([[0.0, 1.0, -2.0]]))
    assert codes.tolist() == [[0, 2, 0]] and scales.tolist() == pytest.approx([1.0, 1e-5])


def test_it_starts_nearest_to_what_was_drawn_with_parts_of_its_size_over_the_root_of_two():
    W = torch.randn(400, 300, generator=torch.Generator().manual_seed(0))
    term = ComplexLatent.from_matrix(W)
    for part in (term.V_r, term.V_i):
        assert float(part.detach().std()) == pytest.approx(0.5**0.5, rel=0.05)
    near = block(term.V_r, term.V_i).detach()
    for _ in range(3):
        other = block(term.V_r + 0.1 * torch.randn_like(term.V_r), term.V_i)
        assert float((other - W).norm()) > float((near - W).norm())


def test_what_is_left_takes_two_bits_a_complex_weight_and_merges_without_rounded_inputs():
    assert ComplexLatent.from_matrix(drawn().float()).finished().nbytes == -(-OUT * IN // 16) + 8
    for activations in (None, 8):
        model = restructure(One(drawn().float()), "ifairy", activations=activations)
        structure, x = Structure.of("ifairy", None, {"activations": activations}), batches()[0][0].float()
        before = model.eval()(x)
        finish(model, structure)
        torch.testing.assert_close(model(x), before)
        term = model.layer.terms["complex"]
        if activations is None:
            assert isinstance(model.layer, SumLinear) and type(term) is ComplexCode
            torch.testing.assert_close(merge(model)(x), before)
        else:
            assert isinstance(term, RoundedInputs) and type(term.term) is ComplexCode and term.spec()["parts"] == 2


def test_a_matrix_of_odd_sides_is_refused_by_name():
    with pytest.raises(WeftError, match="layer: A matrix of 5 x 4 has no halves"):
        restructure(One(torch.zeros(5, 4)), "ifairy")
