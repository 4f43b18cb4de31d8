"""Measure a base on held-out documents of the pretraining domains.

    python -m studio.base.measure [MODEL_DIR] [--json FILE]

Prints held-out loss per domain, the tokens of each domain that each expert takes, layer by layer, and the mutual
information of domain and expert.
"""

import argparse
import json
import math
from itertools import islice
from pathlib import Path

import torch
from pydantic import BaseModel, ConfigDict
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, Llama4ForCausalLM, PreTrainedTokenizerBase

from adapters.routed import use_routed_experts
from studio.base import EMBEDDED_DIR
from studio.base.domains import DOMAINS, documents
from studio.base.routing import expert_counts, mutual_information_bits, recorded_router_logits
from studio.base.tokenizer import render

HELD_OUT_SEED = 2
DOCUMENTS_PER_DOMAIN = 64


class Measurement(BaseModel):
    """What `measure` found."""

    model_config = ConfigDict(frozen=True)

    domains: list[str]
    loss: list[float]
    """Held-out loss per domain, nats a token."""
    use_fraction: list[list[list[float]]]
    """[layer][domain][expert]: the share of the domain's tokens that the expert takes."""
    mutual_information_bits: list[float]
    """Per layer, of domain and expert; at most log2(number of domains)."""
    document_count: int

    @property
    def largest_use(self) -> list[list[float]]:
        """[layer][domain]: the share of the domain's busiest expert."""
        return [[max(experts) for experts in layer] for layer in self.use_fraction]

    @property
    def least_used_fraction(self) -> list[float]:
        """Per layer, the share of all tokens that the idlest expert takes (domains weighted alike)."""
        return [min(sum(column) / len(layer) for column in zip(*layer, strict=True)) for layer in self.use_fraction]


@torch.no_grad()
def measure(
    model_dir: Path, seed: int = HELD_OUT_SEED, documents_per_domain: int = DOCUMENTS_PER_DOMAIN
) -> Measurement:
    """Measure the model in `model_dir` in float32 on documents that pretraining never read."""
    tokenizer = AutoTokenizer.from_pretrained(model_dir)
    model = Llama4ForCausalLM.from_pretrained(model_dir, dtype=torch.float32).eval()
    use_routed_experts(model)
    losses, counts = [], []
    with recorded_router_logits(model) as logits:
        for domain in DOMAINS:
            loss_sum, tokens, counts_le = 0.0, 0, torch.zeros(0)
            for document in islice(documents(domain, seed), documents_per_domain):
                ids = _ids(tokenizer, render(document))
                logits.clear()
                predicted = model(input_ids=ids, use_cache=False).logits
                loss_sum += float(cross_entropy(predicted[0, :-1], ids[0, 1:], reduction="sum"))
                tokens += ids.shape[1] - 1
                counts_le = _add(counts_le, torch.stack([expert_counts(layer) for layer in logits]))
            losses.append(loss_sum / tokens)
            counts.append(counts_le)
    counts_lde = torch.stack(counts, dim=1)
    return Measurement(
        domains=list(DOMAINS),
        loss=losses,
        use_fraction=(counts_lde / counts_lde.sum(-1, keepdim=True)).tolist(),
        mutual_information_bits=[mutual_information_bits(layer) for layer in counts_lde],
        document_count=documents_per_domain,
    )


def _ids(tokenizer: PreTrainedTokenizerBase, text: str) -> Tensor:
    return torch.tensor([tokenizer.encode(text, add_special_tokens=False)])


def _add(total: Tensor, part: Tensor) -> Tensor:
    return total + part if total.numel() else part


def loss_table(found: Measurement) -> Table:
    """Return the table of loss and busiest experts per domain."""
    table = Table(
        title=f"Held-out loss and busiest expert (id: share of tokens), {found.document_count} documents each"
    )
    table.add_column("domain")
    table.add_column("loss", justify="right")
    for layer in range(len(found.use_fraction)):
        table.add_column(f"layer {layer}", justify="right")
    for d, domain in enumerate(found.domains):
        busiest = [_busiest(layer[d]) for layer in found.use_fraction]
        table.add_row(domain, f"{found.loss[d]:.3f}", *busiest)
    bits = [f"{bits:.2f}" for bits in found.mutual_information_bits]
    table.add_section()
    table.add_row(f"I(domain; expert), bits of {math.log2(len(found.domains)):.0f}", "", *bits)
    table.add_row("idlest expert's share", "", *(f"{share:.1%}" for share in found.least_used_fraction))
    return table


def _busiest(experts: list[float]) -> str:
    share = max(experts)
    return f"{experts.index(share)}: {share:.0%}"


def use_table(found: Measurement, layer: int) -> Table:
    """Return the table of one layer: domains down, experts across, percent of the domain's tokens."""
    table = Table(title=f"Layer {layer}: percent of a domain's tokens per expert")
    table.add_column("domain")
    for expert in range(len(found.use_fraction[layer][0])):
        table.add_column(str(expert), justify="right")
    for domain, experts in zip(found.domains, found.use_fraction[layer], strict=True):
        table.add_row(domain, *(f"{100 * share:.0f}" for share in experts))
    return table


def tables(found: Measurement) -> list[Table]:
    """Return every table of a measurement."""
    return [loss_table(found), *(use_table(found, layer) for layer in range(len(found.use_fraction)))]


def main() -> None:
    """Run the command line of this module."""
    parser = argparse.ArgumentParser(prog="python -m studio.base.measure", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", type=Path, default=EMBEDDED_DIR, help="model directory (the embedded one)")
    parser.add_argument("--json", type=Path, help="write the numbers there too")
    parser.add_argument("--seed", type=int, default=HELD_OUT_SEED, help="seed of the held-out documents")
    arguments = parser.parse_args()
    found = measure(arguments.model, arguments.seed)
    console = Console(width=None if Console().is_terminal else 120)
    for table in tables(found):
        console.print(table)
    if arguments.json:
        arguments.json.write_text(json.dumps(found.model_dump(), indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
