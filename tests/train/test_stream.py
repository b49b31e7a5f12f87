"""Streamed rows: a pure function of files, seed and index; each window once an epoch; the thread's errors passed on."""

from __future__ import annotations

import json
import time

import pytest
import torch

from weft.errors import WeftError
from weft.train import stream
from weft.train.packing import IGNORED
from weft.train.stream import StreamedRows

END, BEGIN = 0, 1


class Letters:
    """A tokenizer of one token a character, with a token before each text as Llama's has; `delay` makes it slow."""

    eos_token_id = END
    is_fast = False

    def __init__(self, delay=0.0, fails_at=None):
        self.delay, self.fails_at, self.calls = delay, fails_at, 0

    def __call__(self, text, add_special_tokens=True, **_):
        self.calls += 1
        if self.calls == self.fails_at:
            raise RuntimeError("no such letter")
        time.sleep(self.delay)
        return {"input_ids": ([BEGIN] if add_special_tokens else []) + [ord(c) for c in text]}


@pytest.fixture
def files(tmp_path):
    """Three files of 20 documents, 1,220 tokens with begin and end of each."""
    paths = []
    for name in "abc":
        documents = [f"{name}{i:02d} " * (2 + i % 5) for i in range(20)]
        paths.append(tmp_path / f"{name}.jsonl")
        paths[-1].write_text("".join(json.dumps({"text": d}) + "\n" for d in documents))
    return paths


def rows_of(files, tmp_path, count=70, seed=0, window=8, tokenizer=None):
    return StreamedRows(files, tokenizer or Letters(), window, count, seed, tmp_path / "tokens.bin")


def collect(rows, indices):
    with rows:
        return {i: rows[i]["input_ids"].tolist() for i in indices}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(stream, "BLOCK", 16)


def test_rows_do_not_depend_on_when_they_are_asked_for(files, tmp_path):
    with rows_of(files, tmp_path) as patient:
        patient.thread.join()
        expected = [patient[i]["input_ids"].tolist() for i in range(70)]
    hasty = collect(rows_of(files, tmp_path, tokenizer=Letters(delay=0.002)), range(70))
    assert [hasty[i] for i in range(70)] == expected
    later = collect(rows_of(files, tmp_path, tokenizer=Letters(delay=0.001)), [69, 3, 40])
    assert all(later[i] == expected[i] for i in later)


def test_seed_decides_the_order_of_files_and_windows(files, tmp_path):
    first, second = (collect(rows_of(files, tmp_path, seed=seed), range(70)) for seed in (0, 1))
    assert sum(first[i] == second[i] for i in range(70)) < 10
    assert {tuple(rows_of(files, tmp_path, seed=seed).files) for seed in range(20)} > {tuple(files)}


def test_every_window_comes_once_an_epoch_and_each_epoch_has_its_own_order(files, tmp_path):
    with rows_of(files, tmp_path, count=10_000, seed=3) as rows:
        rows.thread.join()
        total = rows.windows
        stored = torch.from_numpy(stream.np.fromfile(rows.path, dtype="int32"))[: total * 8].reshape(total, 8)
        inside = stored[:, :1] != BEGIN  # windows that begin within a document get its beginning in front
        stored = torch.where(inside, torch.cat([torch.full((total, 1), BEGIN), stored[:, :-1]], 1), stored)
        epochs = [[tuple(rows[e * total + i]["input_ids"].tolist()) for i in range(total)] for e in range(3)]
    windows = sorted(map(tuple, stored.tolist()))
    assert all(sorted(epoch) == windows for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and epochs[0] != list(map(tuple, stored.tolist()))


def test_the_thread_stops_when_it_has_enough(files, tmp_path):
    with rows_of(files, tmp_path, count=5) as rows:
        rows.thread.join()
        assert 5 <= rows.windows < 20
        assert sorted(rows.order(5, 0)) == list(range(5)) and len(rows) == 5


def test_positions_restart_with_every_document_and_no_loss_is_on_its_first_token(files, tmp_path):
    with rows_of(files, tmp_path, window=64, count=10) as rows:
        for i in range(10):
            row = rows[i]
            expected, position = [], 0
            for token in row["input_ids"].tolist():
                expected.append(position)
                position = 0 if token == END else position + 1
            assert row["position_ids"].tolist() == expected and 0 in expected[1:]
            learned = row["position_ids"] != 0
            assert torch.equal(row["labels"][learned], row["input_ids"][learned])
            assert (row["labels"][~learned] == IGNORED).all()


def test_a_text_shorter_than_a_window_is_a_sentence(tmp_path):
    (tmp_path / "short.txt").write_text("abc")
    said = pytest.raises(WeftError, match="too short: 5 tokens, fewer than one window of 8")
    with rows_of([tmp_path / "short.txt"], tmp_path) as rows, said:
        rows[0]


def test_an_error_in_the_thread_reaches_who_asks_for_rows(files, tmp_path):
    failing, said = Letters(fails_at=30), pytest.raises(RuntimeError, match="no such letter")
    with rows_of(files, tmp_path, tokenizer=failing) as rows, said:
        [rows[i] for i in range(70)]
    (tmp_path / "bad.jsonl").write_text('{"text": "fine"}\n{"text": \n')
    with rows_of([tmp_path / "bad.jsonl"], tmp_path) as rows, pytest.raises(WeftError, match=r"bad\.jsonl"):
        rows[0]


def test_leaving_early_stops_the_thread_and_removes_the_tokens(files, tmp_path):
    slow = Letters(delay=0.01)
    with pytest.raises(KeyboardInterrupt), rows_of(files, tmp_path, tokenizer=slow) as rows:
        rows[0]
        raise KeyboardInterrupt
    assert not rows.thread.is_alive() and slow.calls < 60 and not rows.path.exists()


def test_a_tokenizer_without_an_end_is_refused(files, tmp_path):
    endless = Letters()
    endless.eos_token_id = None
    with pytest.raises(WeftError, match="end-of-text token"):
        rows_of(files, tmp_path, tokenizer=endless)
