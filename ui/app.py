"""`studio ui`: the pages as one app, served on 127.0.0.1 alone."""

from __future__ import annotations

import warnings
from pathlib import Path

import gradio as gr
import uvicorn
from fastapi import FastAPI
from gradio.components.navbar import Navbar

from studio import StudioError
from ui.downloads import add_downloads
from ui.guard import LocalOnly
from ui.look import CSS, head, theme
from ui.pages import PAGES
from ui.places import RECIPES, Places

HOST = "127.0.0.1"
TITLE = "MoE Studio"


def build(jobs_root: Path, recipes_root: Path = RECIPES) -> gr.Blocks:
    """The pages, with the jobs in `jobs_root` and the shipped recipes of `recipes_root`."""
    places = Places(jobs_root.absolute(), recipes_root.absolute())
    first, *others = PAGES
    with gr.Blocks(title=TITLE, analytics_enabled=False) as pages:
        Navbar(main_page_name=first.TITLE)
        first.build(places)
    for page in others:
        with pages.route(page.TITLE, page.PATH):
            Navbar(main_page_name=first.TITLE)
            page.build(places)
    return pages


def make_app(jobs_root: Path, recipes_root: Path = RECIPES) -> FastAPI:
    """The pages behind the guard, with the downloads."""
    app = FastAPI(title=TITLE, docs_url=None, redoc_url=None, openapi_url=None)
    app.add_middleware(LocalOnly)
    add_downloads(app, Places(jobs_root.absolute(), recipes_root.absolute()))
    return gr.mount_gradio_app(
        app,
        build(jobs_root, recipes_root),
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        enable_monitoring=False,
        mcp_server=False,
        theme=theme(),
        css_paths=CSS,
        head=head(),
    )


def main(host: str = HOST, port: int = 7860, jobs_root: Path = Path("runs"), recipes_root: Path = RECIPES) -> None:
    """Serves the pages until interrupted.

    Raises:
        StudioError: another host than 127.0.0.1, whose answers would go to other machines without a login.
    """
    if host != HOST:
        raise StudioError(f"received the host {host!r}; the studio has no login and serves {HOST} alone")
    print(
        f"MoE Studio is at http://{HOST}:{port}, with the jobs in {jobs_root.absolute()}. Ctrl-C ends it.", flush=True
    )
    warnings.filterwarnings("ignore", message="SSR mode is not supported")  # nobody asked for it
    uvicorn.run(make_app(jobs_root, recipes_root), host=HOST, port=port, log_level="warning")
