"""What TRL 1.16's chunked loss needs on a CPU. A test fails once TRL's own tiles are small enough.

TRL projects to the vocabulary in tiles of 4,096 positions x 32,768 entries. On a GPU its kernels fold a tile in place;
without them the arithmetic makes eight copies of it, so that a batch of 2,048 positions and a vocabulary of 202,048
took 2.2 GB, more than the full logits' 1.7 GB. With the tiles here it takes 0.1 GB, in the same time.
"""

from __future__ import annotations

import torch
from trl.kernels import chunked_logprob
from trl.trainer import utils

from studio.memory import LOSS_TILE_TOKENS, LOSS_TILE_VOCABULARY


def use_small_tiles() -> None:
    """Makes the loss on a CPU work in tiles of `LOSS_TILE_TOKENS` x `LOSS_TILE_VOCABULARY` logits, of learned tokens.

    TRL scores prompt tokens too where it has no kernels, against recompilation on other devices than a CPU.
    """
    if torch.cuda.is_available():
        return
    chunked_logprob.TOKEN_CHUNK_SIZE = LOSS_TILE_TOKENS
    utils._CHUNKED_LOGPROB_CHUNK_SIZE = LOSS_TILE_VOCABULARY
    utils._use_triton = lambda device: True  # type: ignore[attr-defined]  # read there for one thing alone: whether only learned tokens are scored
