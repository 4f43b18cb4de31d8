"""What the routers do: their logits while a model runs, the two losses that shape them, and measures of expert use.

Llama 4 in transformers computes no auxiliary loss, so the two here act on logits caught by forward hooks:

    balance    no expert dies: over the whole mixed batch every expert gets its share of tokens
    coherence  experts take sides: the tokens of one row (one domain's documents) prefer the same experts

Dimension legend: T tokens (rows × row length), R rows, E experts, L layers, D domains.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.functional import one_hot
from transformers.models.llama4.modeling_llama4 import Llama4Router


@contextmanager
def recorded_router_logits(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yield a list that each forward of `model` extends by one (T, E) tensor of router logits per MoE layer.

    The caller clears the list between forwards.
    """
    logits: list[Tensor] = []
    routers = [module for module in model.modules() if isinstance(module, Llama4Router)]
    hooks = [router.register_forward_hook(lambda _m, _in, out: logits.append(out[1])) for router in routers]
    try:
        yield logits
    finally:
        for hook in hooks:
            hook.remove()


def balance_loss(logits_te: Tensor) -> Tensor:
    """Return E · Σ_e f_e · P_e, at least 1, which even use of the experts reaches.

    f_e is the fraction of tokens whose first choice is e, P_e the mean probability of e (Switch Transformers,
    arXiv 2101.03961, section 2.2).

    Args:
        logits_te: (T, E) router logits of one layer over the whole batch.
    """
    experts = logits_te.shape[-1]
    chosen_e = one_hot(logits_te.argmax(-1), experts).to(logits_te.dtype).mean(0)
    return experts * (chosen_e * logits_te.softmax(-1).mean(0)).sum()


def coherence_loss(logits_te: Tensor, rows: int) -> Tensor:
    """Return −I(row; expert) in nats: minus the mutual information of the row a token stands in and its expert.

    Rows hold documents of one domain each, so experts are drawn towards domains without being told the domains
    (Mod-Squad, arXiv 2212.08066, section 3.2, has the same term over tasks).

    Args:
        logits_te: (T, E) router logits of one layer, tokens row by row.
        rows: number of rows, a divisor of T.
    """
    mean_re = logits_te.softmax(-1).unflatten(0, (rows, -1)).mean(1)
    return _entropy(mean_re).mean() - _entropy(mean_re.mean(0))


def _entropy(p: Tensor) -> Tensor:
    """Return the entropy in nats over the last dimension."""
    return -(p * p.clamp_min(1e-9).log()).sum(-1)


def expert_counts(logits_te: Tensor) -> Tensor:
    """Return how many tokens chose each expert first: (E,) float64."""
    return torch.bincount(logits_te.argmax(-1), minlength=logits_te.shape[-1]).double()


def mutual_information_bits(counts_de: Tensor) -> float:
    """Return I(domain; expert) in bits, every domain given the same weight.

    0 means that the experts ignore the domain; log2(D) that the expert tells the domain.

    Args:
        counts_de: (D, E) token counts of one layer.
    """
    given_de = counts_de / counts_de.sum(1, keepdim=True)
    nats = _entropy(given_de.mean(0)) - _entropy(given_de).mean()
    return float(nats) / math.log(2)
