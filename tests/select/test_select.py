"""Choosing data: what the methods promise, duplicates, and the verb."""

from __future__ import annotations

import json
import math
import tracemalloc

import pytest
import torch
import torch.nn.functional as F
from typer.testing import CliRunner

from weft.cli import app
from weft.errors import WeftError
from weft.runs.loading import load_model, load_tokenizer
from weft.select import SELECTIONS, Duplicates
from weft.select.clusters import spherical_k_means
from weft.select.cures import posterior
from weft.select.gvm_raft import neyman, weights
from weft.select.odis import axes
from weft.verbs.embedding import embedded, weighted_mean
from weft.verbs.select import run, select


def unit(n: int, d: int = 8, seed: int = 0) -> torch.Tensor:
    return F.normalize(torch.randn(n, d, generator=torch.Generator().manual_seed(seed)), dim=1)


def test_rds_plus_lets_each_query_choose_in_turn():
    E, Q = unit(50), unit(3, seed=1)
    E[7] = Q[2]
    found = select(E, "rds-plus", 9, query=Q)
    order = found.order.tolist()
    assert order[2] == 7 and found.scores[7] == pytest.approx(1, abs=1e-6) and len(set(order)) == 9
    taken: set[int] = set()
    for place, choice in enumerate(order):  # an independent loop: the nearest that none has taken
        left = [i for i in range(50) if i not in taken]
        assert choice == max(left, key=lambda i: float(E[i] @ Q[place % 3]))
        taken.add(choice)
    assert sorted(select(E, "rds-plus", 50, query=Q).order.tolist()) == list(range(50))


def test_data_pruning_scores_by_the_nearest_prototype():
    E = unit(40)
    one = select(E, "data-pruning", 40, clusters=1)
    mean = F.normalize(E.mean(0), dim=0)
    torch.testing.assert_close(one.scores, 1 - E @ mean, atol=1e-5, rtol=1e-4)
    assert select(E, "data-pruning", 40, clusters=40).scores.abs().max() < 1e-5
    hard = select(E, "data-pruning", 8, clusters=4, floor=0.0).order.tolist()
    assert set(hard[:4]) <= set(select(E, "data-pruning", 16, clusters=4, floor=0.0).order.tolist())
    turned = E @ torch.linalg.qr(torch.randn(8, 8, generator=torch.Generator().manual_seed(2)))[0]
    assert set(select(turned, "data-pruning", 8, clusters=4, floor=0.0).order.tolist()) == set(hard)
    easy = select(E, "data-pruning", 8, clusters=4, floor=0.0, hard=False).order.tolist()
    assert not set(easy) & set(hard)


def test_data_pruning_keeps_a_part_of_every_cluster():
    E = torch.cat([F.normalize(torch.eye(8)[i] + 0.01 * unit(20, seed=i) * (i + 1), dim=1) for i in range(4)])
    kept = select(E, "data-pruning", 20, clusters=4, floor=1.0).order
    assert (kept // 20).bincount().tolist() == [5, 5, 5, 5]
    assert (select(E, "data-pruning", 20, clusters=4, floor=0.0).order // 20).bincount(minlength=4)[3] > 5


def test_scales_stand_for_all_and_their_weights_sum_to_one():
    E = unit(30)
    found = select(E, "scales-plus-plus", 6)
    assert float(found.scores.sum()) == pytest.approx(1, abs=1e-5) and len(found.order) == 6
    whole = select(E, "scales-plus-plus", 30)
    torch.testing.assert_close(whole.scores, torch.full((30,), 1 / 30))
    assert spherical_k_means(E, 6, 3).equal(spherical_k_means(E, 6, 3))


def test_odis_takes_the_best_of_uncorrelated_axes_in_turn():
    draws = torch.Generator().manual_seed(0)
    a, b = torch.randn(2, 200, generator=draws, dtype=torch.float64)
    S = torch.stack([a, a + 1e-9 * b, b, 3 * b + 5], 1)  # two axes under four rubrics
    z = axes(S, 0.1)
    covariance = z.mT @ z / len(z)
    assert z.shape[1] == 2 and abs(float(covariance[0, 1])) < 1e-8
    assert float(covariance.trace()) == pytest.approx(4)
    first, second = axes(torch.stack([b, a, a + 1e-9 * b], 1), 0.1).var(0, correction=0).tolist()
    assert (first, second) == pytest.approx((2, 1), rel=0.2), "the axis that most rubrics share chooses first"
    order = select(S, "odis", 40).order
    assert len(set(order.tolist())) == 40
    assert set(order[::2].tolist()) | set(order[1::2].tolist()) == set(order.tolist())
    for column, mine in zip(z.mT, (order[::2], order[1::2]), strict=True):
        assert float(column[mine].mean()) > float(column.topk(40).values.mean()) - 0.3
    with pytest.raises(WeftError, match="same scores"):
        select(torch.ones(5, 2), "odis", 1)


def test_cures_prefers_middling_difficulty():
    S = torch.tensor([[0.0, 4], [2, 4], [4, 4], [1, 4]])
    torch.testing.assert_close(posterior(*S.double().unbind(1)), torch.tensor([1 / 6, 0.5, 5 / 6, 1 / 3]).double())
    exactly = select(S, "cures", 2, tau=0.0)
    assert exactly.order.tolist() == [1, 3]
    assert exactly.scores.tolist() == pytest.approx([math.sqrt(5) / 6, 0.5, math.sqrt(5) / 6, math.sqrt(2) / 3])
    many = torch.cat([S[:1]] * 500 + [S[1:2]] * 500)
    drawn = select(many, "cures", 300, tau=0.05).order
    assert float((drawn >= 500).double().mean()) > 0.85  # exp((0.5 - 0.373) / 0.05) = 13 times as likely
    assert abs(float((select(many, "cures", 300, tau=100.0).order >= 500).double().mean()) - 0.5) < 0.1


def test_cures_draws_each_as_often_as_its_score_says():
    S = torch.cat([torch.tensor([[2.0, 4]]), torch.tensor([[0.0, 4]]).expand(50, 2)])
    first = [int(select(S, "cures", 1, seed=seed, tau=0.05).order) == 0 for seed in range(400)]
    better = math.exp((0.5 - math.sqrt(5) / 6) / 0.05)
    assert sum(first) / 400 == pytest.approx(better / (better + 50), abs=0.08)


def test_scores_of_rubrics_are_those_of_their_names():
    rows = [{"scores": {"b": 2, "a": 1}}, {"scores": {"a": 1, "b": 2}}]
    assert [SELECTIONS["odis"].figures(row) for row in rows] == [[1, 2], [1, 2]]


def test_samples_are_spread_as_the_least_variance_asks():
    G, p = torch.tensor([1.0, 2, 0.5, 3]).double(), torch.tensor([0.1, 0.5, 0.9, 0.25]).double()
    shares = weights(G, p, alpha=0.0)
    assert neyman(shares, 40).tolist() == [10, 9, 2, 19]  # the best of all whole numbers
    objective = lambda n: float((G**2 / (p * n)).sum())  # noqa: E731
    assert objective(shares / shares.sum() * 40) == pytest.approx(3.9174, abs=1e-4)
    assert neyman(torch.ones(4), 10).sum() == 10 and neyman(weights(5 * G, p), 99).equal(neyman(weights(G, p), 99))
    near = weights(torch.ones(3).double(), torch.tensor([0.01, 0.0316, 0.125]).double())
    torch.testing.assert_close(near, torch.tensor([3.015, 3.976, 2.742]).double(), atol=1e-3, rtol=0)
    assert select(torch.stack([G, p], 1), "gvm-raft", 1).order.tolist() == [3]
    hopeless = weights(torch.tensor([1.0, 0, 2]), torch.tensor([0.0, 0.5, 0.25]), alpha=0.0)
    assert hopeless.tolist() == [0, 0, 4]
    with pytest.raises(WeftError, match="No stratum has anything to gain"):
        neyman(torch.zeros(3), 5)


@pytest.mark.parametrize("row", [[-1, 0.5], [1, -0.1], [1, 1.1]])
def test_gradients_and_shares_that_are_none_are_refused(row):
    with pytest.raises(WeftError, match="a gradient norm from 0 and an accepted share between 0 and 1"):
        select(torch.tensor([[1, 0.5], row]).double(), "gvm-raft", 1)


def test_gvm_raft_reads_two_figures_and_repeats_are_counted_where_both_are_kept(tmp_path):
    path = tmp_path / "tried.jsonl"
    rows = [("a", 2, 0.5), ("b", 3, 0.9), ("a", 4, 0.5), ("c", 4, 0.8)]  # the last but one first, then c, b and a
    keys = ("text", "gradient", "accepted")
    path.write_text("".join(json.dumps(dict(zip(keys, row, strict=True))) + "\n" for row in rows))
    for keep, kept, repeats in ((1, "a", 0), (3, "bac", 0), (4, "abac", 1)):
        out = tmp_path / f"{keep}.jsonl"
        said = run(path, out, model="/none", method="gvm-raft", keep=str(keep))
        assert "".join(json.loads(line)["text"] for line in out.read_text().splitlines()) == kept
        assert (said["records"], said["duplicates"], said["repeats_among_kept"]) == (4, 1, repeats)


def test_figures_of_the_records_take_no_model(tmp_path):
    path = tmp_path / "tried.jsonl"
    path.write_text("".join(json.dumps({"text": f"q {i}", "right": i, "tried": 4}) + "\n" for i in range(5)))
    said = run(path, tmp_path / "k.jsonl", model="/none", method="cures", keep="2", tau=0.0)
    assert said["kept"] == 2 and '"right": 2' in (tmp_path / "k.jsonl").read_text()
    with pytest.raises(WeftError, match="odis reads .* of every record, which record 1 lacks"):
        run(path, tmp_path / "o.jsonl", model="/none", method="odis")


def test_records_stream_by(tmp_path):
    path, size, count = tmp_path / "large.jsonl", 100_000, 200
    with path.open("w") as file:
        for i in range(count):
            file.write(json.dumps({"text": f"{i}" + "x" * size, "right": i % 5, "tried": 4}) + "\n")
    tracemalloc.start()
    run(path, tmp_path / "kept.jsonl", model="/none", method="cures", keep="50%", report=tmp_path / "page.html")
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert most < size * count / 5
    assert len((tmp_path / "kept.jsonl").read_text().splitlines()) == count / 2


def test_the_mean_leaves_padding_out_and_weighs_later_tokens():
    h = torch.randn(1, 5, 4, generator=torch.Generator().manual_seed(0))
    padded = torch.cat([h, torch.full((1, 3, 4), 9.0)], 1)
    mask = torch.tensor([[1] * 5 + [0] * 3])
    by_hand = sum((t + 1) / 15 * h[0, t] for t in range(5))
    torch.testing.assert_close(weighted_mean(padded, mask)[0], F.normalize(by_hand, dim=0))


def test_a_batch_embeds_as_its_texts_do_alone(tiny_directory):
    model, tokenizer = load_model(tiny_directory), load_tokenizer(tiny_directory)
    texts = ["a", "a longer text of many words", "some words"]
    together = torch.cat([*embedded(model, tokenizer, texts, 16, 3)])
    alone = torch.cat([*embedded(model, tokenizer, texts, 16, 1)])
    torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-3)


def test_duplicates_exact_and_near():
    seen = Duplicates()
    words = [f"word{i}" for i in range(200)]
    assert seen.of(" ".join(words), 0) is None
    assert seen.of("  ".join(words).upper(), 1) == (0, True)
    assert seen.of(" ".join([*words[:198], "other", "end"]), 2) == (0, False)
    assert seen.of(" ".join(reversed(words)), 3) is None and seen.of("", 4) is None


@pytest.fixture
def data(tmp_path):
    lines = [{"text": f"def f{i}(x): return {i} + x * {i * i}", "id": i} for i in range(20)]
    lines.append({"text": lines[3]["text"], "id": 20})
    path = tmp_path / "data.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "query.jsonl").write_text(json.dumps({"text": lines[5]["text"]}) + "\n")
    return path


def test_the_exact_call(data, tiny_directory):
    here = data.parent
    line = f"select {data} --method rds-plus --model {tiny_directory} --query {here / 'query.jsonl'} --keep 20% "
    line += f"-o {here / 'kept.jsonl'} --report {here / 'page.html'} --json"
    result = CliRunner().invoke(app, line.split())
    assert result.exit_code == 0, result.output
    said = json.loads(result.stdout)
    kept = [json.loads(line)["id"] for line in (here / "kept.jsonl").read_text().splitlines()]
    assert said["kept"] == len(kept) == 4 and 5 in kept and kept == sorted(kept) and said["duplicates"] == 1
    page = (here / "page.html").read_text()
    assert "Not kept (17)" in page and "Kept (4)" in page and not (here / "kept.jsonl.partial").exists()


def test_an_interrupted_selection_goes_on(data, tiny_directory, monkeypatch):
    here, ask = data.parent, {"model": str(tiny_directory), "method": "data-pruning", "keep": "5"}
    monkeypatch.setattr("weft.verbs.select._STEP", 8)
    real, calls = embedded, []

    def stops(*arguments):
        if len(calls) == 2:
            raise KeyboardInterrupt
        calls.append(arguments[2])
        return real(*arguments)

    monkeypatch.setattr("weft.verbs.select.embedded", stops)
    with pytest.raises(KeyboardInterrupt):
        run(data, here / "kept.jsonl", **ask)
    assert len(list((here / "kept.jsonl.partial").glob("*.safetensors"))) == 2
    with pytest.raises(WeftError, match="unfinished work of another command"):
        run(data, here / "kept.jsonl", **ask, window=8)
    calls.clear()
    run(data, here / "kept.jsonl", **ask)
    assert len(calls) == 1
    monkeypatch.setattr("weft.verbs.select.embedded", real)
    run(data, here / "again.jsonl", **ask)
    assert (here / "kept.jsonl").read_bytes() == (here / "again.jsonl").read_bytes()


def test_bad_input_is_one_sentence(data, tiny_directory, tmp_path):
    bad = tmp_path / "bad.jsonl"
    bad.write_text('{"text": "a"}\n{oops\n')
    for change, words in (
        ({}, "give them by --query"),
        ({"method": "rds"}, "nearest are"),
        ({"method": "data-pruning", "keep": "3 bits"}, "neither a share"),
        ({"method": "data-pruning", "keep": "200%"}, "--keep '200%' is neither a share"),
        ({"method": "data-pruning", "keep": "900"}, "only 21 records"),
        ({"method": "data-pruning", "data": bad}, "line 2"),
        ({"method": "data-pruning", "data": tmp_path / "none.jsonl"}, "no file of records"),
        ({"method": "data-pruning", "out": tmp_path / "k.txt"}, "must end in .jsonl"),
        ({"method": "data-pruning", "folds": 3}, "no option 'folds'"),
        ({"method": "data-pruning", "window": 0}, "--window is 0: give at least 1"),
        ({"method": "data-pruning", "batch": -1}, "--batch is -1: give at least 1"),
    ):
        with pytest.raises(WeftError, match=words):
            run(**{"data": data, "out": tmp_path / "k.jsonl", "model": str(tiny_directory), **change})
    assert not list(tmp_path.glob("k.jsonl*"))
