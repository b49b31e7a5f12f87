"""Methods made of methods: a chain of two for one layer, and a mixture of which each layer takes one.

    chain      W = T_1 + T_2, T_2 of what T_1 lost:   sizes are pairs, (3, 16) is 3 bits and rank 16
    mixture    one of several, chosen by layer:       sizes are (candidate, size), ("nf", 3) is three bits of nf

Either splits a site as a method does. A candidate is written as one word: a method's name, options after it, a chain
with a plus sign; "nf", "nf:block=32", "gptq:group=128+eora".
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from weft.allocate.base import Shape
from weft.errors import WeftError
from weft.methods.base import LowRankSplit, Method, Site, Size, Split, Splitter
from weft.records import parsed_value

__all__ = ["Candidate", "ChainSplit", "MixtureSplit", "candidates", "thinned"]

STEPS = 6
"""Ranks that a low-rank part offers among others: more make a survey long, and an allocation hardly better."""

BESIDE = 0.5
"""The most that the second of a chain may take, relative to the first: beyond it, the first has a larger size."""


@dataclass(frozen=True)
class Candidate:
    """A method with its options."""

    method: Method
    options: Mapping[str, Any]

    @property
    def needs(self) -> tuple[str, ...]:
        """The statistics that it reads."""
        return self.method.reads(self.options)

    def sizes(self, shape: Shape, most: float) -> list[tuple[Size, int]]:
        """What it offers a matrix below `most` bytes; of ranks a few."""
        sizes = [(size, n) for size, n in self.method.sizes(shape, self.options) if n < most]
        return thinned(sizes) if isinstance(self.method.split, LowRankSplit) else sizes

    def each(self, site: Site, sizes: Sequence[Size]) -> Iterator[tuple[Size, Split]]:
        """The terms of each of these sizes."""
        return self.method.each(site, sizes, self.options)


@dataclass(frozen=True)
class ChainSplit(Splitter):
    """The terms of one method, and those that a second finds for what the first lost."""

    first: Candidate
    second: Candidate

    def each(
        self, site: Site, sizes: Sequence[Size], *, known: Mapping[Size, Split] | None = None, **options: Any
    ) -> Iterator[tuple[Size, Split]]:
        """The first method's terms are made once for all sizes of the second; those `known` by size are not made."""
        original = site.weight(site.dtype) if site.original is None else site.original
        for (head, split), tails in _by_first(self.first, site, sizes, known or {}):
            bias = site.bias if split.bias is None else split.bias
            after = replace(site, terms=split.terms, bias=bias, original=original)
            for tail, more in self.second.each(after, tails):
                yield (head, tail), Split({**split.terms, **more.terms}, split.bias if more.bias is None else more.bias)

    def sizes(self, shape: Shape, options: Mapping[str, Any]) -> list[tuple[Size, int]]:
        """Every size of the first with some of the second, by rising bytes."""
        pairs = [
            ((head, tail), n + more)
            for head, n in self.first.sizes(shape, shape.nbytes)
            for tail, more in self.second.sizes(shape, min(BESIDE * n, shape.nbytes - n))
        ]
        return sorted(pairs, key=lambda pair: pair[1])


def _by_first(
    first: Candidate, site: Site, sizes: Sequence[tuple[Size, Size]], known: Mapping[Size, Split]
) -> Iterator[tuple[tuple[Size, Split], list[Size]]]:
    """The first's terms of each of its sizes, with the second's sizes that go with it."""
    tails: dict[Size, list[Size]] = {}
    for head, tail in sizes:
        tails.setdefault(head, []).append(tail)
    yield from (((head, known[head]), tails[head]) for head in tails if head in known)
    for head, split in first.each(site, [head for head in tails if head not in known]):
        yield (head, split), tails[head]


class MixtureSplit(Splitter):
    """The terms of the candidate that a size names."""

    def each(self, site: Site, sizes: Sequence[Size], **options: Any) -> Iterator[tuple[Size, Split]]:
        """One candidate after another; a chain takes over what its first method alone has made."""
        found, by_name = candidates(options["methods"]), dict[str, list[Size]]()
        for name, size in sizes:
            by_name.setdefault(name, []).append(size)
        alone = [name for name in by_name if not isinstance(found[name].method.split, ChainSplit)]
        made = dict[str, dict[Size, Split]]()
        for name in alone:
            begins = any(_first(other) == found[name] for other in found.values())
            for size, split in found[name].each(site, by_name[name]):
                if begins:
                    made.setdefault(name, {})[size] = split
                yield (name, size), split
        for name in (name for name in by_name if name not in alone):
            chain = found[name].method.split
            assert isinstance(chain, ChainSplit)
            known = next((splits for one, splits in made.items() if found[one] == chain.first), {})
            for size, split in chain.each(site, by_name[name], known=known):
                yield (name, size), split

    def sizes(self, shape: Shape, options: Mapping[str, Any]) -> list[tuple[Size, int]]:
        """Those of all candidates, by rising bytes."""
        sizes = [
            ((name, size), nbytes)
            for name, candidate in candidates(options["methods"]).items()
            for size, nbytes in candidate.sizes(shape, shape.nbytes)
        ]
        return sorted(sizes, key=lambda size: size[1])

    def needs(self, options: Mapping[str, Any]) -> list[str]:
        """Those of all candidates."""
        return [need for candidate in candidates(options["methods"]).values() for need in candidate.needs]


def _first(candidate: Candidate) -> Candidate | None:
    """What a chain begins with; None for one that is no chain."""
    split = candidate.method.split
    return split.first if isinstance(split, ChainSplit) else None


def thinned(sizes: Sequence[tuple[Size, int]], count: int = STEPS) -> list[tuple[Size, int]]:
    """Of many sizes those nearest to `count` steps of equal ratio in bytes."""
    if len(sizes) <= count:
        return list(sizes)
    low, high = sizes[0][1], sizes[-1][1]
    marks = [low * (high / low) ** (i / (count - 1)) for i in range(count)]
    kept = {min(sizes, key=lambda size: abs(size[1] - mark))[1] for mark in marks}
    return [size for size in sizes if size[1] in kept]


def candidates(methods: str | Sequence[str]) -> dict[str, Candidate]:
    """The candidates that a list of words, or one text with commas between them, names.

    Raises:
        WeftError: no candidate, an unknown method or option, one that cannot stand where it does.
    """
    words = [word.strip() for word in (methods.split(",") if isinstance(methods, str) else methods)]
    if not any(words):
        raise WeftError("There are no methods to choose from; give methods=nf,kfac-svd, or leave the option out.")
    return {word: _candidate(word) for word in dict.fromkeys(words)}


def _candidate(word: str) -> Candidate:
    first, *others = (_part(part, i) for i, part in enumerate(word.split("+")))
    if not others:
        return first
    if len(others) > 1:
        raise WeftError(f"The candidate {word!r} chains {len(others) + 1} methods; a chain has two here, as nf+eora.")
    split = ChainSplit(first, others[0])
    needs = tuple(dict.fromkeys([*first.needs, *others[0].needs]))
    made = Method(name=word, kind="compress", summary="", paper="", needs=needs, split=split, sizes=split.sizes)
    return Candidate(made, {})


def _part(word: str, place: int) -> Candidate:
    """One method of a candidate, the first or a later one."""
    from weft.methods import METHODS

    name, *pairs = word.split(":")
    method = METHODS.find(name, *(["compensate"] if place else ["compress", "quantize"]))
    if isinstance(method.split, MixtureSplit):
        raise WeftError(f"{name} chooses among methods, and cannot be one of them; name those it may choose from.")
    if method.joints is not None:
        raise WeftError(f"{name} cuts several layers together, and cannot be among the methods that one chooses from.")
    options: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise WeftError(f"{pair!r} in the candidate {word!r} is no NAME=VALUE, such as {name}:{pair}=64.")
        options[key] = parsed_value(value)
    return Candidate(method, method.options(options))
