"""What the recipe's section `preference` may say for a training method. No torch."""

from __future__ import annotations

from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

from studio.methods import METHODS, Method, readers_of

if TYPE_CHECKING:
    from studio.recipe_training import PreferenceSettings


def preference_problems(method: str, settings: PreferenceSettings) -> dict[str, str]:
    """Field of the section → what is wrong with it for this training method."""
    entry, found = METHODS[method], {}
    for name, field in type(settings).model_fields.items():
        if name not in entry.reads and getattr(settings, name) != field.default:
            readers = ", ".join(readers_of(name))
            found[name] = f"is given, but training.method is {method}; it is read by {readers}"
    if "loss_type" in entry.reads and (message := _losses_problem(method, entry, settings)):
        found["loss_type"] = message
    if "loss_weights" in entry.reads and settings.loss_weights:
        losses = losses_of(method, settings)
        if len(settings.loss_weights) != len(losses):
            weights = len(settings.loss_weights)
            found["loss_weights"] = f"has {weights} weights for {len(losses)} losses ({', '.join(losses)})"
    if "label_smoothing" in entry.reads and "loss_type" not in found:
        found |= _smoothing_problem(entry, losses_of(method, settings), settings.label_smoothing)
    return found


def losses_of(method: str, settings: PreferenceSettings) -> tuple[str, ...]:
    """The losses that are trained with: the recipe's, else the method's first."""
    return settings.loss_type or METHODS[method].losses[:1]


def options_of(method: str, settings: PreferenceSettings) -> dict[str, Any]:
    """The section as options of the method's class in TRL."""
    losses = losses_of(method, settings)
    options = {
        "beta": settings.beta,
        "loss_type": list(losses) if "loss_weights" in METHODS[method].reads else "".join(losses),
        "loss_weights": list(settings.loss_weights) or None,
        "label_smoothing": settings.label_smoothing,
    }
    return {name: value for name, value in options.items() if name in METHODS[method].reads}


def _losses_problem(method: str, entry: Method, settings: PreferenceSettings) -> str | None:
    for name in settings.loss_type:
        if name not in entry.losses:
            near = get_close_matches(name, entry.losses, n=1)
            hint = f'; did you mean "{near[0]}"?' if near else ""
            return f'"{name}" is no loss of {method}; allowed: {", ".join(entry.losses)}{hint}'
    if len(settings.loss_type) > 1 and "loss_weights" not in entry.reads:
        return f"has {len(settings.loss_type)} losses, and {method} takes one"
    return "names a loss twice" if len(set(settings.loss_type)) < len(settings.loss_type) else None


def _smoothing_problem(entry: Method, losses: tuple[str, ...], smoothing: float) -> dict[str, str]:
    if smoothing and not set(losses) & set(entry.smoothed):
        readers = ", ".join(entry.smoothed)
        return {"label_smoothing": f"is {smoothing:g}, but the loss is {', '.join(losses)}; it is read by {readers}"}
    if "exo_pair" in losses and not smoothing:
        return {"label_smoothing": "is 0, and exo_pair needs it above 0; 0.001 is what its paper recommends"}
    return {}
