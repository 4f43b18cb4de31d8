"""The router profile of a recipe: made once, bound to the base and to the data, found again while both are the same.

make_profile(recipe) ─▶ RouterProfile      runs a sample of the training data through the quantised base
find_profile(recipe) ─▶ RouterProfile      the one made before, or None. No torch
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.checkpoint import TensorInfo, read_index
from adapters.packed_cache import default_cache_dir
from studio.errors import TargetError
from studio.models import compute_dtype, resolve_base

if TYPE_CHECKING:
    from adapters.router_profile import RouterProfile
    from studio.recipe import Recipe

SAMPLE_SEED = 0
"""Of the order in which examples are drawn: the sample does not change with the training's seed."""

SAMPLED_BYTES = 4096
"""Read from the start and from the end of each tensor for a base's fingerprint: retrained weights differ everywhere."""

Progress = Callable[[int, int], None]


def make_profile(recipe: Recipe, progress: Progress | None = None, loading: Progress | None = None) -> RouterProfile:
    """Routes a sample of the recipe's training data and keeps the profile in the user's cache.

    Args:
        progress: called with (tokens done, tokens in all). loading: with (bytes read, bytes in all) before that.

    Raises:
        StudioError: bad data or base; a base without routed experts.
    """
    from studio.base_model import load_recipe_base
    from studio.data import read_examples
    from studio.plan import recipe_base
    from studio.profiling import draw_sample, profile_routing

    base = recipe_base(recipe)
    if not base.moe:
        raise TargetError(f"{base.name} has no routed experts, so there is no routing to profile")
    examples = read_examples(recipe.data.train)
    model, tokenizer = load_recipe_base(recipe, loading)
    sample = draw_sample(tokenizer, examples, recipe.data.max_length_tokens, recipe.placement.profile_tokens)
    counted = profile_routing(model, sample, tokenizer.pad_token_id, progress)
    profile = counted.bound_to(*fingerprints(recipe), SAMPLE_SEED, recipe.placement.profile_tokens, shared_count(base))
    profile.save(profile_path(recipe))
    return profile


def find_profile(recipe: Recipe) -> RouterProfile | None:
    """The profile of this base and these data that was made before; None where there is none.

    Raises:
        ProfileError: there is one, and it cannot be read.
    """
    from adapters.router_profile import load_profile

    if not any(_kept_in().glob("*.safetensors")):  # spares the fingerprints, which take as long as the rest of a plan
        return None
    path = profile_path(recipe)
    return load_profile(path) if path.is_file() else None


def profile_path(recipe: Recipe) -> Path:
    """Where the profile of this recipe is kept: another base, other data or another sample make another path."""
    name = _sha256(*(part.encode() for part in fingerprints(recipe)))[:32]
    return _kept_in() / f"{name}.safetensors"


def _kept_in() -> Path:
    return default_cache_dir().with_name("profiles")


def fingerprints(recipe: Recipe) -> tuple[str, str]:
    """Of the base as it is held, and of the data with everything that decides which tokens are drawn from them."""
    held = recipe.model.model_dump(mode="json", exclude={"base"}) | {"dtype": compute_dtype(recipe.model.dtype)}
    base = _sha256(base_fingerprint(resolve_base(recipe.model.base)).encode(), json.dumps(held).encode())
    sample = [SAMPLE_SEED, recipe.placement.profile_tokens, recipe.data.max_length_tokens]
    with recipe.data.train.open("rb") as file:
        data = hashlib.file_digest(file, "sha256").hexdigest()
    return base, _sha256(data.encode(), json.dumps(sample).encode())


def base_fingerprint(directory: Path) -> str:
    """Identifies a base model without reading it whole: its small files, and the ends of each of its tensors."""
    names = ("config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
    small = [path.read_bytes() if (path := directory / name).is_file() else b"" for name in names]
    index = sorted(read_index(directory).items(), key=lambda item: (str(item[1].file), item[1].start))
    return _sha256(*small, *_samples(index))


def _samples(index: list[tuple[str, TensorInfo]]) -> Iterator[bytes]:
    open_file, descriptor = None, -1
    try:
        for name, info in index:
            if info.file != open_file:
                if descriptor >= 0:
                    os.close(descriptor)
                open_file, descriptor = info.file, os.open(info.file, os.O_RDONLY)
            length = min(SAMPLED_BYTES, info.size_bytes)
            yield f"{name} {info.dtype} {info.shape}".encode()
            yield os.pread(descriptor, length, info.start)
            yield os.pread(descriptor, length, info.start + info.size_bytes - length)
    finally:
        if descriptor >= 0:
            os.close(descriptor)


def _sha256(*parts: bytes) -> str:
    """Of the parts, each behind its length, so that moving a byte from one to the next changes it."""
    found = hashlib.sha256()
    for part in parts:
        found.update(len(part).to_bytes(8, "little"))
        found.update(part)
    return found.hexdigest()


def shared_count(base: Any) -> int:
    """Shared experts of a layer, which every token meets."""
    names = ("n_shared_experts", "moe_num_shared_experts", "num_shared_expert")
    if not base.layout.shared_expert or not any(t.class_name == "shared_expert" for t in base.tensors):
        return 0
    counts = [base.config[name] for name in names if isinstance(base.config.get(name), int)]
    return int(counts[0]) if counts else 1
