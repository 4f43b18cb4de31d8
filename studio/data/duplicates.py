"""Rows that a file holds twice, exactly or nearly, found while it is read once."""

from __future__ import annotations

from array import array
from typing import TYPE_CHECKING, Any

import xxhash

from studio.data.rows import Place

if TYPE_CHECKING:
    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

NEAR_ROWS = 500_000
"""Rows among which near-duplicates are looked for, the first ones: of each 256 bytes are kept, 128 MB at most."""

NEAR = 0.8
"""Jaccard similarity of the sets of pieces, runs of three words or eight letters, from which on two rows are alike."""

PERMUTATIONS, BANDS = 64, 16
LOOKED_BACK = 4
"""Earlier rows of a band that a row is compared with."""

COMPARED_AT_ONCE = 65_536
WORDS, LETTERS, LONG_WORD = 3, 8, 20
"""Words of a piece; letters of one where words are longer than 20 letters, as in scripts that part none."""

MOST_UNITS = 2000
"""Words or letters of a row that are looked at, from its start."""


class Places:
    """Where the rows of a file or folder stand, in 12 bytes a row."""

    def __init__(self) -> None:
        self.files: dict[tuple[str, str], int] = {}
        self.of_file, self.lines = array("I"), array("Q")

    def __len__(self) -> int:
        return len(self.lines)

    def add(self, place: Place) -> int:
        """The number of the row, from 0."""
        self.of_file.append(self.files.setdefault((place.file, place.counted), len(self.files)))
        self.lines.append(place.line)
        return len(self.lines) - 1

    def at(self, row: int) -> Place:
        file, counted = list(self.files)[self.of_file[row]]
        return Place(file, self.lines[row], counted)


class Duplicates:
    """Exact duplicates, by a 64-bit hash: 8 bytes a row. Rows with equal hashes are taken as equal: among 100 million
    different rows there would be such a pair in one file of 4,000.
    """

    def __init__(self) -> None:
        self.hashes = array("Q")

    def add(self, text: str) -> None:
        """Counts a row."""
        self.hashes.append(xxhash.xxh3_64_intdigest(text.encode("utf-8", errors="replace")))

    def found(self) -> Array:
        """(2, n) int64: the rows that equal an earlier one, in their order, and the first row that each equals."""
        import numpy as np

        hashes = np.frombuffer(self.hashes, dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        later = np.sort(order[np.flatnonzero(ordered[1:] == ordered[:-1]) + 1])
        return np.stack([later, order[np.searchsorted(ordered, hashes[later])]])


class NearDuplicates:
    """Near-duplicates by MinHash signatures (Broder 1997) in bands (Leskovec, Rajaraman and Ullman, Mining of Massive
    Datasets, section 3.4): rows that agree in a band of 4 of the 64 values are compared, each with up to `LOOKED_BACK`
    earlier ones there, by the estimate that all 64 give.
    """

    def __init__(self) -> None:
        import numpy as np

        rng = np.random.default_rng(1)
        self.factors = rng.integers(2**32, size=(PERMUTATIONS, 1), dtype=np.uint32) | np.uint32(1)
        self.shifts = rng.integers(2**32, size=(PERMUTATIONS, 1), dtype=np.uint32)
        self.signatures = array("I")
        self.rows = 0

    def add(self, text: str) -> None:
        """Takes the next row, up to NEAR_ROWS of them."""
        if self.rows < NEAR_ROWS:
            self.rows += 1
            self.signatures.frombytes((self.factors * pieces(text) + self.shifts).min(1).tobytes())

    def found(self, known: Array) -> Array:
        """(2, n) int64: the rows that are like an earlier one, in their order, and the earliest that each was compared
        with and is like.

        Args:
            known: (m,) int64 rows to leave out.
        """
        import numpy as np

        signatures = np.frombuffer(self.signatures, dtype=np.uint32).reshape(-1, PERMUTATIONS)
        first = np.arange(self.rows)
        for start in range(0, PERMUTATIONS, PERMUTATIONS // BANDS):
            band = _keys(signatures[:, start : start + PERMUTATIONS // BANDS])
            order = np.argsort(band, kind="stable")
            ordered = band[order]
            for back in range(1, min(LOOKED_BACK, self.rows - 1) + 1):
                places = np.flatnonzero(ordered[back:] == ordered[:-back])
                later, earlier = order[places + back], order[places]
                alike = _alike(signatures, later, earlier)
                np.minimum.at(first, later[alike], earlier[alike])
        first[known[known < self.rows]] = self.rows  # larger than any
        later = np.flatnonzero(first < np.arange(self.rows))
        return np.stack([later, first[later]])


def _keys(band: Array) -> Array:
    """(n,) uint64: one number for the values of a band, (n, values) uint32."""
    import numpy as np

    found = np.zeros(len(band), dtype=np.uint64)
    for values in band.T:
        found = found * np.uint64(0x9E3779B97F4A7C15) + values
    return found


def _alike(signatures: Array, later: Array, earlier: Array) -> Array:
    """(n,) bool: whether the estimated similarity of each two rows is NEAR."""
    import numpy as np

    parts = [
        (signatures[later[at : at + COMPARED_AT_ONCE]] == signatures[earlier[at : at + COMPARED_AT_ONCE]]).mean(1)
        for at in range(0, len(later), COMPARED_AT_ONCE)
    ]
    return np.concatenate([*parts, np.empty(0)]) >= NEAR


def pieces(text: str) -> Array:
    """(n,) uint32 hashes of the runs of words in `text`, without regard to case, or of letters where it has long words.

    Of a text with fewer words or letters one: of all of them.
    """
    import numpy as np

    text = text.lower()
    words = text.split(None, MOST_UNITS)[:MOST_UNITS]
    if sum(map(len, words)) <= LONG_WORD * len(words):
        units, run = [xxhash.xxh32_intdigest(word.encode("utf-8", errors="replace")) for word in words], WORDS
    else:
        units, run = list(map(ord, text[:MOST_UNITS])), LETTERS
    each = np.array(units or [0], dtype=np.uint32)
    run = min(run, len(each))
    found = np.zeros(len(each) - run + 1, dtype=np.uint32)
    for place in range(run):
        found = _mixed(found * np.uint32(0x9E3779B1) + each[place : len(each) - run + 1 + place])
    return found


def _mixed(values: Array) -> Array:
    """MurmurHash3's final mix of 32 bits."""
    import numpy as np

    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        values = (values ^ (values >> np.uint32(shift))) * np.uint32(factor)
    return values ^ (values >> np.uint32(16))
