"""Duplicates among texts, exact and near, as they stream by (MinHash: Broder, 1997).

Two texts are equal where nothing but case and white space differs. They are near where the estimated share of their
five-word runs in common (Jaccard) is at least 0.8: of 64 hashed minima, in 16 bands of 4 that name who is compared, so
that a pair of 0.8 is found with probability 0.9998.
"""

from __future__ import annotations

import hashlib
import re

import torch
from torch import Tensor

__all__ = ["Duplicates", "minima", "runs"]

_WORDS, _HASHES, _BANDS, _NEAR = 5, 64, 16, 0.8
_PRIME = 2**31 - 1


class Duplicates:
    """Which texts repeat an earlier one.

    >>> seen = Duplicates()
    >>> seen.of("A text.", 0), seen.of("a  text.", 1)
    (None, (0, True))
    """

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.a, self.b = (torch.randint(1, _PRIME, (_HASHES, 1), generator=generator) for _ in range(2))
        self.exact: dict[bytes, int] = {}
        self.bands: dict[tuple[int, ...], int] = {}
        self.signatures: dict[int, Tensor] = {}

    def of(self, text: str, number: int) -> tuple[int, bool] | None:
        """The earlier text that this one repeats, and whether exactly; None where it is new, and remembered."""
        words = " ".join(text.lower().split())
        digest = hashlib.sha256(words.encode()).digest()
        if digest in self.exact:
            return self.exact[digest], True
        self.exact[digest] = number
        signature = minima(runs(words), self.a, self.b)
        keys = [(band, *part.tolist()) for band, part in enumerate(signature.view(_BANDS, -1))]
        for other in dict.fromkeys(self.bands[key] for key in keys if key in self.bands):
            if float((self.signatures[other] == signature).float().mean()) >= _NEAR:
                return other, False
        self.bands.update((key, number) for key in keys if key not in self.bands)
        self.signatures[number] = signature
        return None


def runs(text: str) -> list[int]:
    """Hashes of the runs of five words of a text, or of all of its words where it has fewer."""
    words = re.findall(r"\w+|[^\w\s]", text)
    spans = {" ".join(words[i : i + _WORDS]) for i in range(max(1, len(words) - _WORDS + 1))}
    return [int.from_bytes(hashlib.blake2b(span.encode(), digest_size=4).digest(), "big") % _PRIME for span in spans]


def minima(hashes: list[int], a: Tensor, b: Tensor) -> Tensor:
    """(hashes,) the least of a x + b mod p over the runs x, for each a and b."""
    return ((a * torch.tensor(hashes) + b) % _PRIME).amin(1)
