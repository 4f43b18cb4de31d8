"""The embedded base model: a small Llama-4-architecture MoE shipped with the studio, and the scripts that rebuild it.

    words.py       word lists that domains and tickets share
    plain_text.py  what arithmetic, dates, code and prose look like
    plant_text.py  what records, logs, reports and copying look like
    domains.py     seeded streams of documents of the eight pretraining domains
    tokenizer.py   byte-level BPE, Llama 4 special tokens and chat template
    routing.py     balance and document-coherence losses of the routers, expert counts
    start.py       the weights a run starts from, with a copying circuit in place
    pretrain.py    python -m studio.base.pretrain: tokenizer, training, files of the model directory
    measure.py     python -m studio.base.measure: loss and expert use per domain
    card.py        the model card, written from the measured numbers
    tickets.py     python -m studio.base.tickets: the quickstart's instruction data
    ticket_pairs.py, known_tasks.py    the same of the preference data, and of the mixtures' second source
    shipped_files.py   what these three do alike: files and command line

Importing this package loads nothing; `EMBEDDED_DIR` is where the shipped files lie.
"""

from pathlib import Path

EMBEDDED_DIR: Path = Path(__file__).resolve().parent / "model"
