"""The browser UI: the only package that imports gradio.

    app.py ──▶ pages/finetune.py   recipe (form ⇄ YAML) ──▶ plan ──▶ submit
           ──▶ pages/jobs.py       the jobs on disk: live, result, download
           ──▶ guard.py            this machine alone: Host, Origin, content policy

Every handler is a short caller of one public function of `studio`; nothing is kept here that is not on disk.
"""

import os

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before the first import of gradio, which asks at import
