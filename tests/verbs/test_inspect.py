"""Spectra: every measure against numpy in fp64, every matrix once, and a page that stands alone."""

from __future__ import annotations

import copy
import html
import json
import re
import shlex
import weakref
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import weft
from weft.errors import WeftError
from weft.measures import MEASURES, Measure
from weft.memory.live import Live
from weft.runs import loading
from weft.terms import LowRank, SumLinear
from weft.terms.layers import weight_of
from weft.testing_measures import texts
from weft.verbs.compress import compress
from weft.verbs.inspect import inspect, run
from weft.verbs.prospects import NATS, SHARE
from weft.verbs.quantize import quantize


@pytest.fixture(scope="module")
def model(tiny_directory: Path) -> nn.Module:
    from weft.runs.loading import load_model

    return load_model(tiny_directory, device="cpu")


@pytest.fixture(scope="module")
def batches() -> list[dict[str, Any]]:
    return texts(4, 30)


def test_measures_equal_numpy_in_fp64(model: nn.Module) -> None:
    report = inspect(model)
    weights = {name.removesuffix(".weight"): p for name, p in model.named_parameters() if p.dim() == 2}
    assert [m.name for m in report.matrices] == list(weights)
    for m in report.matrices:
        s = np.linalg.svd(weights[m.name].detach().double().numpy(), compute_uv=False)
        p, energy = s / s.sum(), np.cumsum(s**2) / np.sum(s**2)
        expected = [
            np.sum(s**2) / s[0] ** 2,
            np.exp(-np.sum(p * np.log(p))),
            s[0],
            np.linalg.norm(s),
            s.sum(),
        ]
        got = [m.stable_rank, m.effective_rank, m.spectral_norm, m.frobenius_norm, m.nuclear_norm]
        np.testing.assert_allclose(got, expected, rtol=1e-5)
        ranks = [int(np.argmax(energy >= share)) + 1 for share in (0.9, 0.95, 0.99)]
        assert [m.rank_90, m.rank_95, m.rank_99] == ranks
        assert m.shape == tuple(weights[m.name].shape) and m.parameters == weights[m.name].numel()


def test_a_tied_matrix_is_listed_once_and_marked(model: nn.Module) -> None:
    tied = [m.name for m in inspect(model).matrices if m.tied]
    assert tied == ["model.embed_tokens"]


def test_layers_choose(model: nn.Module) -> None:
    report = inspect(model, "*q_proj")
    assert [m.name for m in report.matrices] == [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    with pytest.raises(WeftError, match="matches no linear layer"):
        inspect(model, "*r_proj")


def test_a_sum_of_terms_is_measured_as_its_matrix() -> None:
    torch.manual_seed(0)
    B, A = torch.randn(12, 3), torch.randn(3, 8)
    net = nn.Sequential(SumLinear({"low_rank": LowRank.from_factors(B, A)}, torch.zeros(12)))
    (m,) = inspect(net).matrices
    assert (m.name, m.shape, m.parameters, m.rank_99) == ("0", (12, 8), 60, 3)
    assert m.frobenius_norm == pytest.approx(float((B @ A).norm()), rel=1e-5)


def test_experts_are_measured_one_by_one_and_codes_left_out() -> None:
    net = nn.Module()
    net.experts = nn.Parameter(torch.randn(3, 4, 5))
    net.codes = nn.Parameter(torch.ones(4, 4, dtype=torch.uint8), requires_grad=False)
    assert [m.name for m in inspect(net).matrices] == ["experts[0]", "experts[1]", "experts[2]"]


def test_zero_matrices_and_bad_numbers() -> None:
    zero = nn.Sequential(nn.Linear(4, 4, bias=False))
    nn.init.zeros_(zero[0].weight)
    (m,) = inspect(zero).matrices
    assert (m.stable_rank, m.effective_rank, m.rank_90, m.nuclear_norm) == (0, 0, 0, 0)
    nn.init.constant_(zero[0].weight, float("nan"))
    with pytest.raises(WeftError, match="matrix 0 holds NaN or infinite numbers"):
        inspect(zero)
    with pytest.raises(WeftError, match="no weight matrix"):
        inspect(nn.LayerNorm(4))


def test_the_public_name_is_this_function() -> None:
    assert weft.inspect is inspect


class Tags(HTMLParser):
    """Tags that are open, and every reference to something outside the page."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.references: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.references += [str(value) for key, value in attrs if key in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass


def test_the_page_is_well_formed_complete_and_stands_alone(model: nn.Module, tmp_path: Path) -> None:
    report = inspect(model, name="tiny <b>&</b>")
    report.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    tags = Tags()
    tags.feed(text)
    assert not tags.open and not tags.references and "url(" not in text
    assert "tiny &lt;b&gt;" in text and "<b>" not in text
    assert all(m.name in text for m in report.matrices)
    assert text.count("<svg") == 2 + len({re.sub(r"\d", "", m.name) for m in report.matrices})
    assert "nan" not in text


def test_json_is_the_measures(model: nn.Module, tmp_path: Path) -> None:
    report = inspect(model)
    report.save(tmp_path / "report.json")
    saved = json.loads((tmp_path / "report.json").read_text())
    assert saved == report.to_dict()
    assert saved["model"]["parameters"] == sum(m.parameters for m in report.matrices)


@pytest.mark.parametrize("name", ["report.pdf", "report", "missing/report.html"])
def test_a_report_that_cannot_be_written_is_refused_before_loading(name: str, tmp_path: Path) -> None:
    with pytest.raises(WeftError, match=r"must end in \.html|no directory"):
        run("pico", report=tmp_path / name)


def test_run_reads_a_directory_and_records_itself(tiny_directory: Path, tmp_path: Path, monkeypatch: Any) -> None:
    result = run(str(tiny_directory), report=tmp_path / "r.html")
    assert result["model"]["name"] == str(tiny_directory) and len(result["matrices"]) == 15
    assert json.loads((tmp_path / "r.run.json").read_text())["arguments"]["model"] == str(tiny_directory)


def test_measures_stand_beside_the_spectra(model: nn.Module, tmp_path: Path) -> None:
    before = copy.deepcopy(model)
    with torch.no_grad():
        model.get_submodule("model.layers.0.mlp.up_proj").weight.add_(0.01)
    report = inspect(model, measures=["farms", "drift"], against=before)
    rows = {row["name"]: row for row in report.to_dict()["matrices"]}
    assert all({"alpha", "drift", "drift_rank"} <= set(row) and "figures" not in row for row in rows.values())
    moved = [name for name, row in rows.items() if row["drift"] > 0]
    assert moved == ["model.layers.0.mlp.up_proj"] and rows[moved[0]]["drift_rank"] == pytest.approx(1, rel=1e-4)
    report.save(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert f"compared with {report.against}" in text
    assert text.index("<th data-sorts>drift rank") < text.index("<th data-sorts>shape"), "what was asked for is first"
    pairs = inspect(model, "*q_proj", against=before).to_dict()["matrices"]
    assert all({"intruders", "kept", "drift"} <= set(row) for row in pairs), "all measures of pairs where none is named"


def test_measures_that_cannot_be_taken_are_refused_before_loading(model: nn.Module) -> None:
    with pytest.raises(WeftError, match="no method to measure called 'farm'; the nearest are: farms"):
        run("nowhere", measures="farm")
    with pytest.raises(WeftError, match="'drift' compares two models: say which other one, by --against"):
        run("nowhere", measures="farms, drift")
    other = nn.Sequential(nn.Linear(3, 4))
    with pytest.raises(WeftError, match="The other model has no such matrix as model.embed_tokens"):
        inspect(model, measures=["drift"], against=other)


def test_weights_of_sums_are_made_one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sums = {
        str(i): SumLinear({"low_rank": LowRank.from_factors(torch.randn(6, 2), torch.randn(2, 5))}) for i in range(4)
    }
    alive: list[weakref.ref[torch.Tensor]] = []
    whole = LowRank.dense

    def counted(self: LowRank, dtype: torch.dtype | None = None) -> torch.Tensor:
        made = whole(self, dtype)
        assert sum(ref() is not None for ref in alive) <= 1
        alive.append(weakref.ref(made))
        return made

    monkeypatch.setattr(LowRank, "dense", counted)
    assert len(inspect(nn.ModuleDict(sums)).matrices) == 4 and len(alive) == 4


def test_a_row_says_what_compress_would_do(model: nn.Module) -> None:
    """Against the survey's own losses, in the metric of nothing known: the first size that keeps the share."""
    report = inspect(model)
    rows = {m.name: m.compress for m in report.matrices}
    assert rows["model.embed_tokens"] is None and report.to_dict()["predicted"]["by"] == "weights"
    for m in report.matrices[1:]:
        W, prospect = model.get_submodule(m.name).weight.detach(), m.compress
        assert prospect is not None and prospect.dense_bytes == 4 * W.numel()
        s = np.linalg.svd(W.double().numpy(), compute_uv=False) ** 2
        keeps = [r for r in range(1, len(s)) if s[r:].sum() <= SHARE * s.sum() and 4 * r * sum(W.shape) < 4 * W.numel()]
        assert prospect.rank == (keeps[0] if keeps else None)
        lost = {}
        for bits in range(2, 9):
            coded = quantize(nn.Sequential(copy.deepcopy(model.get_submodule(m.name))), bits=bits, scheme="rtn")
            D = weight_of(coded[0], torch.float32) - W
            lost[bits] = float(D.square().sum() / W.square().sum())
        assert prospect.bits == min(bits for bits, loss in lost.items() if loss <= SHARE)
        assert (
            prospect.bytes == min(b for b in (prospect.rank_bytes, prospect.bits_bytes) if b) and prospect.loss <= SHARE
        )


def test_with_data_losses_are_nats_and_share_the_limit(model: nn.Module, batches: list[dict[str, Any]]) -> None:
    report = inspect(model, batches=batches)
    prospects = [m.compress for m in report.matrices if m.compress is not None]
    assert len(prospects) == 14 and sum(p.loss for p in prospects) <= NATS
    assert report.to_dict()["predicted"]["by"] == "data" and report.data == "the text"
    done = compress(copy.deepcopy(model), "rtn", budget="4.5 bits", allocate="best", batches=batches)
    name, info = next((n, i) for n, i in done.layers.items() if rows_of(report)[n].bits is not None)
    expected = next(
        c.size for c in info.sizes if c.loss / 2 <= NATS * info.shape.nbytes / sum(p.dense_bytes for p in prospects)
    )
    assert rows_of(report)[name].bits == expected, "the survey's own losses of the same codes"


def rows_of(report: Any) -> dict[str, Any]:
    return {m.name: m.compress for m in report.matrices}


def test_one_width_for_all_is_what_the_neediest_matrix_needs(model: nn.Module) -> None:
    report = inspect(model)
    widths = [m.compress.bits for m in report.matrices if m.compress is not None]
    assert f"--scheme rtn --bits {max(widths)}" in report.commands[1]


def test_the_page_ends_with_the_commands_and_sorts_with_a_keyboard(model: nn.Module, tmp_path: Path) -> None:
    report = inspect(model, measures=["farms"])
    report.save(tmp_path / "page.html")
    text = (tmp_path / "page.html").read_text()
    assert html.escape(report.commands[0]) in text.split("What follows")[1] and 'event.key === "Enter"' in text
    assert text.count("compress would") == 1 and MEASURES["farms"].reads["alpha"] in text


def test_what_follows_are_commands_that_parse(model: nn.Module, batches: list[dict[str, Any]]) -> None:
    import typer

    from weft.cli import app

    report = inspect(
        model, "*layers.0.*", batches=batches, against=model, name="a model/", data="t.txt", against_name="b"
    )
    verbs = typer.main.get_command(app).commands
    assert [shlex.split(line)[1] for line in report.commands] == ["compress", "quantize", "eval", "eval"]
    for line in report.commands:
        program, verb, *arguments = shlex.split(line)
        assert program == "weft"
        verbs[verb].make_context(verb, arguments)
    assert "--layers '*layers.0.*' --calibration t.txt" in report.commands[0] and "'a model/'" in report.commands[0]


def test_figures_of_texts_stand_by_layer_and_by_model(
    tiny_directory: Path, batches: list[dict[str, Any]], tmp_path: Path
) -> None:
    text = tmp_path / "text.txt"
    text.write_text("one two three four five six seven eight nine ten " * 40)
    asked = "farms,ppl-sparsity,w-pca,gradient-quality,matrix-nuclear-norm"
    found = run(str(tiny_directory), measures=asked, data=text, windows=2, window=32)
    rows = {row["name"]: row for row in found["matrices"]}
    down, q = (rows[f"model.layers.0.{n}"] for n in ("mlp.down_proj", "self_attn.q_proj"))
    assert {"alpha", "sparsity", "components", "gradient_rank"} <= down.keys()
    assert "sparsity" not in q and "components" not in rows["model.embed_tokens"]
    assert {"name", "ppl_sparsity", "w_pca", "gradient_rank", "matrix_nuclear_norm"} <= found["model"].keys()
    assert found["reads"].keys() >= {"alpha", "ppl_sparsity"} and str(text) in found["commands"][0]
    with pytest.raises(WeftError, match="--windows has to be at least 1"):
        run(str(tiny_directory), data=text, windows=0)
    with pytest.raises(WeftError, match="The text is too short"):
        run(str(tiny_directory), data=text, windows=999, window=32)


def test_by_weights_alone_the_model_stays_in_its_files(
    tiny_directory: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is computed with a text needs memory of its own, for the sake of bits."""
    copied = []
    monkeypatch.setattr(loading, "own_memory", copied.append)
    alone = run(str(tiny_directory), measures="drift", against=str(tiny_directory))
    assert not copied and len(alone["matrices"]) == 15
    (tmp_path / "text.txt").write_text("one two three four five six seven eight " * 40)
    run(str(tiny_directory), data=tmp_path / "text.txt", windows=2, window=32)
    assert len(copied) == 1


def test_layers_fed_one_tensor_are_measured_once(model: nn.Module, batches: list[dict[str, Any]]) -> None:
    seen = []

    def value(moments: Any) -> dict[str, float]:
        seen.append(moments["input_moment"])
        return {"one": 1.0}

    counted = Measure(
        name="counted",
        summary="s",
        paper="p",
        cost="c",
        of="input",
        needs=("input_moment",),
        value=value,
        reads={"one": "1"},
    )
    inspect(model, measures=[counted], batches=batches)
    assert len(seen) == 8, "q, k and v; o; gate and up; down: of two blocks"


def test_the_loss_of_all_matrices_is_predicted_as_compress_predicts_it(model, batches) -> None:
    """With the ranks that it would take; beside it the share removed times the mean stable rank."""
    report = inspect(model, "*mlp*", batches=batches)
    losses = [one.loss for one in report.outlook]
    assert None not in losses and losses == sorted(losses) and losses[0] < losses[-1]
    mean = sum(m.stable_rank for m in report.matrices) / len(report.matrices)
    assert [one.score for one in report.outlook] == pytest.approx([(1 - one.keep) * mean for one in report.outlook])
    keep = report.outlook[2].keep
    done = compress(copy.deepcopy(model), "kfac-svd", layers="*mlp*", budget=keep, batches=batches)
    assert losses[2] == pytest.approx(sum(c.loss for c in done.allocation.choices.values()) / 2, rel=1e-3)
    blind = inspect(model, "*mlp*")
    assert {one.loss for one in blind.outlook} == {None} and blind.outlook[2].score == report.outlook[2].score
    assert blind.to_dict()["outlook"][2] == {"keep": keep, "loss": None, "score": report.outlook[2].score}


def test_a_matrix_is_in_memory_at_a_time() -> None:
    """However many there are; what stays are the singular values."""
    from transformers import LlamaConfig, LlamaForCausalLM

    peaks = []
    for blocks in (2, 6):
        config = LlamaConfig(
            vocab_size=64, hidden_size=64, intermediate_size=96, num_hidden_layers=blocks, num_attention_heads=4
        )
        model = LlamaForCausalLM(config)
        with Live() as live:
            known = live.count(model.parameters())
            inspect(model)
        peaks.append(live.peak - known)
    assert 8 * 64 * 96 < peaks[0] < peaks[1] < 1.2 * peaks[0]


def test_options_reach_what_is_measured_on_disk(tiny_directory: Path) -> None:
    alphas = [
        [matrix["alpha"] for matrix in run(str(tiny_directory), measures="farms", **options)["matrices"]]
        for options in ({}, {"block": 4})
    ]
    assert len(alphas[0]) == len(alphas[1]) and alphas[0] != alphas[1]
    for name, value in (("block", 0), ("ratio", 0.0)):
        with pytest.raises(WeftError, match=f"The option {name} of 'farms' is {value}: give a number above 0"):
            run(str(tiny_directory), measures="farms", **{name: value})
