"""Rows that a file holds twice, exactly or nearly, found while it is read once."""

from __future__ import annotations

from array import array
from typing import Any

import xxhash

from studio.data.rows import Place

NEAR_ROWS = 20_000
"""Rows among which near-duplicates are looked for: the first ones that are no exact duplicates."""

NEAR = 0.8
"""Jaccard similarity of the sets of three-word pieces from which on two rows are near-duplicates."""

PERMUTATIONS = 64
WORDS = 3


class Places:
    """Where the rows of a file or folder stand, in 10 bytes a row."""

    def __init__(self) -> None:
        self.files: dict[str, int] = {}
        self.of_file, self.lines = array("H"), array("Q")

    def __len__(self) -> int:
        return len(self.lines)

    def add(self, place: Place) -> int:
        """The number of the row, from 0."""
        self.of_file.append(min(self.files.setdefault(place.file, len(self.files)), 65535))
        self.lines.append(place.line)
        return len(self.lines) - 1

    def at(self, row: int) -> Place:
        return Place(list(self.files)[self.of_file[row]], self.lines[row])


class Duplicates:
    """Exact duplicates, by a 64-bit hash: 8 bytes a row. Rows with equal hashes are taken as equal: among 100 million
    different rows there would be such a pair in one file of 4,000.
    """

    def __init__(self) -> None:
        self.hashes = array("Q")
        self.first: set[int] = set()

    def add(self, text: str) -> bool:
        """Counts a row; whether it equals one of the first NEAR_ROWS."""
        digest = xxhash.xxh3_64_intdigest(text.encode("utf-8", errors="replace"))
        self.hashes.append(digest)
        known = digest in self.first
        if len(self.first) < NEAR_ROWS:
            self.first.add(digest)
        return known

    def found(self, shown: int) -> tuple[int, list[tuple[int, int]]]:
        """(rows that equal an earlier one, (row, first equal row) of the first `shown` of them)."""
        if not self.hashes:
            return 0, []
        import numpy as np

        hashes = np.frombuffer(self.hashes, dtype=np.uint64)
        order = np.argsort(hashes, kind="stable")
        ordered = hashes[order]
        equal = np.flatnonzero(ordered[1:] == ordered[:-1]) + 1
        later = np.sort(order[equal])[:shown]
        firsts = order[np.searchsorted(ordered, hashes[later])]
        return len(equal), list(zip(later.tolist(), firsts.tolist(), strict=True))


class NearDuplicates:
    """Near-duplicates by MinHash signatures and locality-sensitive hashing (Broder 1997; Leskovec, Rajaraman and
    Ullman, Mining of Massive Datasets, section 3.4).

    Attributes:
        count: rows like an earlier one.
        pairs: (row, the earlier one).
    """

    def __init__(self) -> None:
        self.count = 0
        self.pairs: list[tuple[int, int]] = []
        self.signatures: dict[int, Any] = {}
        self.index: Any = None
        self.empty: Any = None

    def add(self, text: str, row: int) -> None:
        """Counts a row that equals no earlier one."""
        from datasketch import MinHash, MinHashLSH

        if self.index is None:
            self.index = MinHashLSH(threshold=NEAR, num_perm=PERMUTATIONS)
            self.empty = MinHash(num_perm=PERMUTATIONS, hashfunc=_hash)
        signature = self.empty.copy()  # drawing the permutations anew would take as long as all the rest
        signature.update_batch([piece.encode("utf-8", errors="replace") for piece in pieces(text)])
        like = [other for other in self.index.query(signature) if signature.jaccard(self.signatures[other]) >= NEAR]
        if like:
            self.count += 1
            self.pairs.append((row, min(like)))
        self.signatures[row] = signature
        self.index.insert(row, signature, check_duplication=False)


def pieces(text: str) -> set[str]:
    """The runs of three words in `text`, without regard to case; all of it where it has fewer."""
    words = text.lower().split()[:2000]
    return {" ".join(words[i : i + WORDS]) for i in range(max(1, len(words) - WORDS + 1))}


def _hash(data: bytes) -> int:
    return xxhash.xxh32_intdigest(data)
