"""The router profile of a recipe: made once, bound to the base and to the data, found again while both are the same.

make_profile(recipe) ─▶ RouterProfile      runs a sample of the training data through the quantised base
find_profile(recipe) ─▶ RouterProfile      the one made before, or None. No torch
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from adapters.fingerprint import fingerprint, sha256
from adapters.packed_cache import default_cache_dir
from studio.data.files import data_sha256, is_hub
from studio.data.json_text import Broken
from studio.errors import DataError, Problem, ProfileError, TargetError
from studio.models import compute_dtype, resolve_base

if TYPE_CHECKING:
    from adapters.router_profile import RouterProfile
    from studio.recipe import Recipe

SAMPLE_SEED = 0
"""Of the order in which examples are drawn: the sample does not change with the training's seed."""

CHOOSING = (
    "format",
    "columns",
    "bad_rows",
    "temperature",
    "phases",
    "eval_fraction",
    "drop_easiest",
    "drop_hardest",
    "streaming",
)
"""Fields of `data` that decide which rows are trained on."""

QUICK_BYTES = 16_000_000

Progress = Callable[[int, int], None]


def make_profile(recipe: Recipe, progress: Progress | None = None, loading: Progress | None = None) -> RouterProfile:
    """Routes a sample of the recipe's training data and keeps the profile in the user's cache.

    Args:
        progress: called with (tokens done, tokens in all). loading: with (bytes read, bytes in all) before that.

    Raises:
        StudioError: bad data or base; a base without routed experts.
    """
    from studio.base_model import load_recipe_base
    from studio.data import sequences, training_rows
    from studio.data.curriculum import in_training_order
    from studio.plan import recipe_base
    from studio.profiling import draw_sample, profile_routing

    base = recipe_base(recipe)
    if not base.moe:
        raise TargetError(f"{base.name} has no routed experts, so there is no routing to profile")
    wanted, bound = recipe.placement.profile_tokens, fingerprints(recipe)
    examples = sequences(in_training_order(recipe, training_rows(recipe)))
    model, tokenizer = load_recipe_base(recipe, loading)
    sample = draw_sample(tokenizer, examples, recipe.data.max_length_tokens, wanted)
    counted = profile_routing(model, sample, tokenizer.pad_token_id, progress)
    if fingerprints(recipe) != bound:
        raise ProfileError("the base or the data changed while they were being profiled; profile them again")
    profile = counted.bound_to(*bound, SAMPLE_SEED, wanted, shared_count(base))
    profile.save(_path_of(bound))
    return profile


def find_profile(recipe: Recipe) -> RouterProfile | None:
    """The profile of this base and these data that was made before; None where there is none that can be read.

    Raises:
        DataError: the training data cannot be read.
    """
    from adapters.router_profile import load_profile

    if not any(_kept_in().glob("*.safetensors")):  # spares the fingerprints, which take as long as the rest of a plan
        return None
    try:
        return load_profile(profile_path(recipe))
    except ProfileError:  # none, torn, or of another version: to be made anew
        return None


def others_kept(recipe: Recipe) -> str:
    """What the profiles that were made before have in common with this recipe, in words; "" where they have nothing."""
    from adapters.router_profile import load_profile

    base, data = fingerprints(recipe)
    for path in sorted(_kept_in().glob("*.safetensors")):
        with suppress(ProfileError):
            other = load_profile(path)
            if other.base == base:
                return "; there is one of this base, made from other data, another sample size or another cut"
            if other.data == data:
                return "; there is one of these data, made on another base or in another quantisation"
    return ""


def profile_path(recipe: Recipe) -> Path:
    """Where the profile of this recipe is kept: another base, other data or another sample make another path."""
    return _path_of(fingerprints(recipe))


def _path_of(bound: tuple[str, str]) -> Path:
    name = sha256(*(part.encode() for part in bound))[:32]
    return _kept_in() / f"{name}.safetensors"


def _kept_in() -> Path:
    return default_cache_dir().with_name("profiles")


def fingerprints(recipe: Recipe) -> tuple[str, str]:
    """Of the base as it is held, and of the data with everything that decides which tokens are drawn from them."""
    return base_fingerprint(recipe), sample_fingerprint(recipe, recipe.placement.profile_tokens)


def base_fingerprint(recipe: Recipe) -> str:
    """Of the base as it is held."""
    held = recipe.model.model_dump(mode="json", exclude={"base"}) | {"dtype": compute_dtype(recipe.model.dtype)}
    return sha256(json.dumps(fingerprint(resolve_base(recipe.model.base))).encode(), json.dumps(held).encode())


def sample_fingerprint(recipe: Recipe, tokens: int) -> str:
    """Of the training data and of everything that decides which tokens are drawn from them, and under which names."""
    data, (first, *others) = recipe.data, recipe.data.sources
    facts: list[Any] = [SAMPLE_SEED, tokens, data.max_length_tokens, first.label]
    digest_of = quick_digest if data.streaming else data_digest
    facts += [[source.label, digest_of(source.path)] for source in others]
    if chosen := data.model_dump(mode="json", include=set(CHOOSING), exclude_defaults=True):
        facts.append(chosen)
    if data.mixed:  # the sample follows the mixture, which depends on the length of the training
        training = recipe.training.model_dump(mode="json", include={"epochs", "max_steps", "batch_size", "seed"})
        facts += [training, recipe.training.gradient_accumulation_steps, [source.weight for source in data.sources]]
    return sha256(digest_of(first.path).encode(), json.dumps(facts).encode())


def data_digest(path: Path) -> str:
    """sha256 of the data at `path`, whatever form it has.

    Raises:
        DataError: it cannot be read.
    """
    return _digest(path, data_sha256)


def quick_digest(path: Path) -> str:
    """Of the size, the time of the last change and the first bytes of each file; of a hub data set as `data_digest`.

    Raises:
        DataError: it cannot be read.
    """
    return _digest(path, data_sha256 if is_hub(path) else _quick)


def _quick(path: Path) -> str:
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    facts = []
    for file in files:
        with file.open("rb") as opened:
            stat = os.fstat(opened.fileno())
            facts.append(f"{file.name} {stat.st_size} {stat.st_mtime_ns}".encode() + opened.read(QUICK_BYTES))
    return sha256(*facts)


def _digest(path: Path, of: Callable[[Path], str]) -> str:
    try:
        return of(path)
    except Broken as broken:
        raise DataError([Problem("", None, broken.message, str(path))]) from None
    except OSError as error:
        raise DataError([Problem("", None, f"cannot be read: {error.strerror or error}", str(path))]) from None


def shared_count(base: Any) -> int:
    """Shared experts of a layer, which every token meets."""
    names = ("n_shared_experts", "moe_num_shared_experts", "num_shared_expert")
    if not base.layout.shared_expert or not any(t.class_name == "shared_expert" for t in base.tensors):
        return 0
    counts = [base.config[name] for name in names if isinstance(base.config.get(name), int)]
    return int(counts[0]) if counts else 1
