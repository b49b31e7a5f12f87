"""codebook: every row in codes for a table of its own, of any numbers, found by k-means and by what the outputs lose
(the one-dimensional form of GPTVQ, van Baalen et al., 2024, arXiv 2402.15319).

    tables   k-means of each row's numbers, a column weighing as much as its inputs: H_jj, H = E[x x^T]
    codes    the nearest numbers, column after column, each one's error taken up by those after it (as `gptq`)
    tables   anew, those of least tr(D H D^T) for these codes:   (S^T H S) c = S^T H w,   S (in, 2^b) tells who has what

b of 1 to 4 bits a weight, and 2^b numbers of 16 bits a row. x are the inputs in the model quantised so far. `bits` is
the only width (null: what a budget allows).
Deviations: k-means weighs columns by H_jj, where the paper has the inverse's diagonal; the last tables are the exact
solution a row, where it takes gradient steps, and are kept where they lose less; tables in 16 bits, where it has 8, a
table a row where it has one for some thousand weights, and no scales of blocks within.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from weft.errors import WeftError
from weft.kernels.codebooks import kmeans, nearest
from weft.linalg.column_errors import Columns, columns, settle
from weft.methods.base import Method, Shape, Site, Size, Split, Splitter
from weft.methods.rtn import scale_dtype
from weft.terms import Codebook

__all__ = ["METHOD", "WIDTHS", "refitted", "sizes", "table_sizes", "walked"]

WIDTHS = range(1, 5)
_BLOCK, _ROWS = 128, 64


def walked(W: Tensor, how: Columns, books: Tensor) -> Tensor:
    """The codes (out, in) of W in the rows' sorted tables (out, K), each column's error taken up by those after it."""
    rest, codes = how.begin(W), torch.empty_like(W.mT, dtype=torch.long)

    def settled(j: int) -> Tensor:
        codes[j] = nearest(rest[j].unsqueeze(1), books).squeeze(1)
        return books.gather(1, codes[j].unsqueeze(1)).squeeze(1)

    blocks = [(start, min(start + _BLOCK, len(rest))) for start in range(0, len(rest), _BLOCK)]
    settle(rest, how.root.to(rest.dtype), blocks, settled)
    return how.back(codes)


def refitted(W: Tensor, H: Tensor, codes: Tensor, books: Tensor) -> Tensor:
    """The tables (out, K) of least tr(D H D^T) for known codes; a codeword that nobody has stays."""
    found = []
    for start in range(0, len(W), _ROWS):
        rows = slice(start, start + _ROWS)
        S = F.one_hot(codes[rows], books.shape[1]).to(W.dtype)  # (rows, in, K)
        HS = H @ S
        A, b = S.mT @ HS, (W[rows].unsqueeze(1) @ HS).squeeze(1)
        used = S.sum(1) > 0
        A = A + torch.diag_embed(torch.where(used, 1e-6 * A.diagonal(dim1=1, dim2=2).amax(1, keepdim=True), 1.0))
        found.append(torch.where(used, torch.linalg.solve(A, b), books[rows]))
    return torch.cat(found)


class _Codebook(Splitter):
    def each(self, site: Site, sizes: Sequence[Size], **options: Any) -> Iterator[tuple[Size, Split]]:
        """The codes of each width: H is factorised once."""
        W = site.weight()
        H = site.moments["input_moment"].to(W)
        how = columns(site.moments["input_moment"].to(W.device), damping=options["damping"])
        for bits in sizes:
            books = in_16_bits(site, kmeans(W, H.diagonal().clamp(min=0), 2**bits))
            codes = walked(W, how, books.float())
            better = in_16_bits(site, refitted(W, H, codes, books.float()))
            both = [(_lost(W, H, codes, tables.float()), tables) for tables in (books, better)]
            tables = torch.where((both[1][0] < both[0][0]).unsqueeze(1), better, books)
            yield bits, Split({"base": Codebook.from_codes(codes, tables, None, site.dtype)})


def in_16_bits(site: Site, books: Tensor) -> Tensor:
    """Tables as they are stored. Raises WeftError for a number beyond the dtype."""
    stored = books.to(scale_dtype(site.dtype))
    if not torch.isfinite(stored).all():
        raise WeftError(f"Layer {site.name} cannot be coded: a number is beyond 16 bits; leave it out by a pattern.")
    return stored


def _lost(W: Tensor, H: Tensor, codes: Tensor, books: Tensor) -> Tensor:
    D = books.gather(1, codes) - W
    return ((D @ H) * D).sum(1)


def table_sizes(shape: Shape, bits: int | None, tables: int) -> list[tuple[int, int]]:
    """(bits, bytes of codes, tables and owners), every width or the one that is asked for.

    Raises:
        WeftError: there are no tables of that width.
    """
    out, inn = shape
    if bits is not None and bits not in WIDTHS:
        raise WeftError(f"Codebooks have 1 to 4 bits here, not {bits}: their tables double with every bit.")
    widths = WIDTHS if bits is None else [bits]
    return [(b, Codebook(inn, out, bits=b, tables=tables, device="meta").nbytes) for b in widths]


def sizes(shape: Shape, options: Mapping[str, Any]) -> list[tuple[int, int]]:
    """(bits, bytes of codes and tables)."""
    return table_sizes(shape, options["bits"], shape[0])


METHOD = Method(
    name="codebook",
    kind="quantize",
    summary="Codes of 1 to 4 bits for a table a row, each column's error taken up by the columns after it.",
    paper="van Baalen et al., 2024, arXiv 2402.15319",
    needs=("input_moment",),
    allocate="equal",
    sequential=True,
    split=_Codebook(),
    sizes=sizes,
    defaults={"bits": None, "damping": 0.01},
)
