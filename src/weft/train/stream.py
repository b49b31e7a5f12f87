"""Pre-training data: files tokenised in the background while training runs, packed into rows of `window` tokens.

The files, in an order drawn from the seed, become one stream of tokens on disk, each document ending with the
end-of-text token. Row i is a window of it, shuffled within blocks of 1024 windows; once the text is used up, the next
epoch takes the windows in another order. A window that begins within a document has in front what the tokenizer puts
in front of a text, and loses as many tokens at its end. Positions restart with each document, so that none attends to
the one before it (`weft.train.packing`). All of it is a pure function of files, seed and i.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset, SequentialSampler
from transformers import PreTrainedTokenizerBase

from weft.errors import WeftError
from weft.files import digest
from weft.progress import Bar
from weft.seeds import derived_seed
from weft.train.encoding import token_pieces
from weft.train.packing import IGNORED
from weft.train.sources import texts_of
from weft.train.windows import closed, opening

__all__ = ["StreamedRows"]

BLOCK = 1024  # windows shuffled together


class StreamedRows(Dataset[dict[str, Tensor]]):
    """`count` training rows of `window` tokens: input_ids, labels, position_ids, each (window,) int64.

    A context manager: the thread that tokenises starts with the block and ends with it.

    Args:
        tokens: the file to write the token stream to; overwritten.
        count: rows that training will ask for; the thread stops when it has enough.
        bos: as in `weft.train.windows.opening`.
    """

    packed = True

    def __init__(
        self,
        files: Sequence[Path],
        tokenizer: PreTrainedTokenizerBase,
        window: int,
        count: int,
        seed: int,
        tokens: Path,
        bos: bool | None = None,
    ) -> None:
        if tokenizer.eos_token_id is None:
            raise WeftError("Pre-training needs a tokenizer with an end-of-text token, which ends every document.")
        order = torch.randperm(len(files), generator=torch.Generator().manual_seed(derived_seed(seed, 0, 0)))
        self.files, self.tokenizer, self.path = [files[i] for i in order.tolist()], tokenizer, tokens
        self.window, self.count, self.seed = window, count, seed
        self.before = torch.tensor(opening(tokenizer, bos), dtype=torch.int64)
        self.written, self.finished, self.stopped = 0, False, False
        self.error: BaseException | None = None
        self.news = threading.Condition()
        self.thread = threading.Thread(target=self._run, name="tokenise", daemon=True)

    def __enter__(self) -> StreamedRows:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_bytes(b"")
        self.thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stopped = True
        self.thread.join()
        self.path.unlink(missing_ok=True)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        start = self._place(index) * self.window
        ids = torch.from_numpy(self._read(start).astype(np.int64))
        if len(self.before) and not torch.equal(ids[: len(self.before)], self.before):
            ids = torch.cat([self.before, ids])[: self.window]
        positions = _positions(ids, int(self.tokenizer.eos_token_id))  # type: ignore[arg-type]
        return {"input_ids": ids, "labels": ids.masked_fill(positions == 0, IGNORED), "position_ids": positions}

    def order(self, count: int, seed: int) -> SequentialSampler:
        """The sampler of these rows: in turn, since they come shuffled."""
        return SequentialSampler(range(count))

    def digest(self) -> str:
        """A digest of what the rows are made from: the files' bytes, and how they are cut and tokenised."""
        inside = (p for file in self.files for p in (sorted(file.rglob("*")) if file.is_dir() else [file]))
        probe = self.tokenizer("All that is gold does not glitter; 1 + 1 = 2.")["input_ids"]
        made_of = [self.window, self.seed, self.before.tolist(), probe, *(digest(p) for p in inside if p.is_file())]
        return hashlib.blake2b(str(made_of).encode(), digest_size=12).hexdigest()

    @property
    def windows(self) -> int:
        """Whole windows tokenised so far."""
        return self.written // self.window

    def _place(self, index: int) -> int:
        """Which window row `index` is: waits until its block is tokenised."""
        needed = min((index // BLOCK + 1) * BLOCK, self.count)
        with self.news:
            self.news.wait_for(lambda: self.finished or self.windows >= needed)
            total = min(self.windows, self.count)  # all that is read so far, and the block of this row whole
        if self.error is not None:
            raise self.error
        if total == 0:
            raise WeftError(f"The text is too short: {self.written} tokens, fewer than one window of {self.window}.")
        epoch, place = divmod(index, total)
        if epoch:
            return int(_permutation(total, self.seed, epoch, 0)[place])
        block = place // BLOCK
        size = min(BLOCK, total - block * BLOCK)
        return block * BLOCK + int(_permutation(size, self.seed, 0, block + 1)[place % BLOCK])

    def _read(self, start: int) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
        with open(self.path, "rb") as file:
            file.seek(start * 4)
            return np.frombuffer(file.read(self.window * 4), dtype=np.int32)

    def _run(self) -> None:
        try:
            with open(self.path, "ab") as file:
                for ids in self._runs():
                    np.asarray(ids, dtype=np.int32).tofile(file)
                    file.flush()
                    with self.news:
                        self.written += len(ids)
                        self.news.notify_all()
                    if self.stopped or self.windows >= self.count:
                        break
        except BaseException as error:  # handed to the thread that trains
            self.error = error
        with self.news:
            self.finished = True
            self.news.notify_all()

    def _runs(self) -> Iterator[list[int]]:
        with Bar("tokenise", len(self.files), leave=False, lines=False) as bar:
            for file in self.files:
                for text in texts_of(file):
                    yield from self._tokenised(text)
                bar.update()

    def _tokenised(self, text: str) -> Iterator[list[int]]:
        """The tokens of a document, piece by piece, the last closed by the end-of-text token."""
        ids = self.before.tolist()
        for piece in token_pieces(self.tokenizer, text):
            yield ids
            ids = piece.tolist()
        yield closed(ids, self.tokenizer.eos_token_id)


def _positions(ids: Tensor, end: int) -> Tensor:
    """Positions (window,) that restart at 0 behind each end-of-text token."""
    places = torch.arange(len(ids))
    starts = torch.where(torch.cat([torch.tensor([True]), ids[:-1] == end]), places, 0)
    return places - starts.cummax(0).values


def _permutation(size: int, seed: int, epoch: int, block: int) -> Tensor:
    return torch.randperm(size, generator=torch.Generator().manual_seed(derived_seed(seed, epoch, block)))
