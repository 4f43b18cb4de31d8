"""The pages, one file each: TITLE, PATH and build(places). The first is the one at /."""

from ui.pages import data, export, finetune, jobs

PAGES = (finetune, data, jobs, export)
