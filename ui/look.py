"""The theme: local fonts and one accent colour; the rest of the look is in style/."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr
from markupsafe import Markup

STYLE = Path(__file__).parent / "style"
CSS = [STYLE / f"{name}.css" for name in ("page", "views", "pictures", "finetune", "data", "jobs", "export")]
SCRIPT = STYLE / "page.js"


def show(value: Markup | None = None, **options: Any) -> gr.HTML:
    """A component that shows what `ui.html.el` has made, in the style of style/*.css alone."""
    return gr.HTML(value, apply_default_css=False, **options)


def head() -> str:
    """What the head of each page holds besides Gradio's own."""
    return f"<script>{SCRIPT.read_text(encoding='utf-8')}</script>"


def theme() -> gr.themes.Base:
    """Light and dark, as the system says. Fonts come from Gradio's own files, nothing from the network."""
    return gr.themes.Base(
        primary_hue=gr.themes.colors.teal,
        neutral_hue=gr.themes.colors.slate,
        font=[gr.themes.LocalFont("IBM Plex Sans", weights=(400, 700)), "system-ui", "sans-serif"],
        font_mono=[gr.themes.LocalFont("IBM Plex Mono", weights=(400, 700)), "ui-monospace", "monospace"],
        radius_size=gr.themes.sizes.radius_md,
    ).set(
        button_primary_background_fill="*primary_700",
        button_primary_background_fill_hover="*primary_800",
        button_primary_background_fill_dark="*primary_700",
        button_primary_background_fill_hover_dark="*primary_800",
        button_primary_text_color="white",
        input_background_fill="#ffffff",
        input_background_fill_dark="#10171f",
        input_background_fill_focus="#ffffff",
        input_border_width="1px",
        input_border_color="#c9d2dc",
        input_border_color_dark="#3a4757",
        input_border_color_focus="*primary_600",
        block_background_fill_dark="#171f2a",
        border_color_primary_dark="#2b3644",
        body_text_color="#16202e",
        body_text_color_dark="#e8edf3",
    )
