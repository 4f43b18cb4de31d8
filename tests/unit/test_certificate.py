"""Certificate, card and licence of an export, and its way to a hub."""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from adapters.export import Options, Source
from adapters.verify import Check
from studio.base import EMBEDDED_DIR
from studio.card import CARD, public_name, write_card
from studio.certificate import (
    CERTIFICATE,
    FAILED,
    UNVERIFIED,
    VERIFIED,
    WEIGHTS_ALONE,
    changed_files,
    hash_files,
    read_certificate,
    verdict,
    write_certificate,
)
from studio.errors import DataError, ExportError
from studio.held_out import held_out_prompts
from studio.licence import read_licence
from studio.pushing import push
from studio.verifying import AGAIN, UNCHANGED, verify

PASSED = Check("weights: finite", "passed", "every value", {"tensors": 3})
NOT_RUN = Check("behaviour: as the trained model", "not run", "too large here")
WRONG = Check("tokenizer: ids", "failed", "other | ids\nthan <b>")
LLAMA4 = "LLAMA 4 COMMUNITY LICENSE AGREEMENT\nLlama 4 Version Effective Date: April 5, 2025\n"


def exported(folder: Path, base: Path = EMBEDDED_DIR, name: str = "tickets", **options: Any) -> Path:
    """A folder with a file, a card and a certificate, as `export` leaves it."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "config.json").chmod(0o644)
    source, base_name = Source(base, None, name), options.pop("base_name", "embedded")
    checks = options.pop("checks", [PASSED])
    licence = read_licence(base, base_name)
    common: dict[str, Any] = {"source": source, "base_name": base_name, "format": "safetensors", "checks": checks}
    write_card(folder, licence=licence, prompts_from="two texts", **common, **options)
    write_certificate(folder, prompts_from="two texts", options=Options(dtype="float32"), **common)
    return folder


def card_of(folder: Path) -> str:
    return (folder / CARD).read_text()


def llama_base(folder: Path, card: str = "license: other\nlicense_name: llama4\n", text: str = LLAMA4) -> Path:
    """The embedded base, as if Meta had published it."""
    shutil.copytree(EMBEDDED_DIR, folder)
    for own in ("MODEL_CARD.md", "LICENSE"):
        (folder / own).unlink()
    if card:
        (folder / "README.md").write_text(f"---\n{card}---\n# Llama\n")
    if text:
        (folder / "LICENSE").write_text(text)
        (folder / "USE_POLICY.md").write_text("# Acceptable use\n")
    return folder


# -------------------------------------------------------------------- certificate


def test_nothing_that_was_not_run_or_failed_counts_as_verified() -> None:
    assert verdict([PASSED]) == VERIFIED
    assert verdict([PASSED, NOT_RUN]) == WEIGHTS_ALONE == "weights verified, behaviour not run"
    assert verdict([PASSED, NOT_RUN, WRONG]) == FAILED
    unchanged = Check(UNCHANGED, "passed", "")
    assert verdict([]) == verdict([NOT_RUN]) == verdict([unchanged]) == verdict([unchanged, NOT_RUN]) == UNVERIFIED


def test_a_program_that_is_not_run_leaves_what_its_library_proved() -> None:
    behaves, elsewhere = (
        Check("behaviour: as the trained model", "passed", ""),
        Check("behaviour in vLLM", "not run", ""),
    )
    assert verdict([PASSED, behaves, elsewhere]) == VERIFIED
    assert verdict([PASSED, elsewhere]) == verdict([PASSED, behaves, NOT_RUN, elsewhere]) == WEIGHTS_ALONE


def test_a_certificate_is_read_as_it_was_written(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out", checks=[PASSED, NOT_RUN])
    found = read_certificate(folder)
    assert (
        found.checks == (PASSED, NOT_RUN) and found.verdict == WEIGHTS_ALONE and found.options == {"dtype": "float32"}
    )
    assert set(found.files) == {"config.json", CARD, "LICENSE"} and found.base["name"] == "embedded"
    assert set(found.base["fingerprint"]) == {"weights", "config", "tokenizer", "chat_template"}
    assert str(tmp_path) not in (folder / CERTIFICATE).read_text(), "no path of this machine"
    assert (folder / CERTIFICATE).stat().st_mode & 0o777 == 0o644


def test_a_changed_a_lost_and_a_new_file_are_named(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    certificate = read_certificate(folder)
    assert not changed_files(folder, certificate)
    (folder / "config.json").write_text("[]")
    (folder / CARD).unlink()
    (folder / "new.txt").write_text("")
    assert sorted(changed_files(folder, certificate)) == [
        f"{CARD} is missing",
        "config.json has changed",
        "new.txt was not there when the export was certified",
    ]


@pytest.mark.parametrize("text", ["", "[]", '{"version": 9}', '{"version": 1, "name": "x"}'])
def test_a_certificate_that_is_none_is_an_error_of_ours(tmp_path: Path, text: str) -> None:
    with pytest.raises(ExportError, match="has no certificate"):
        read_certificate(tmp_path)
    (tmp_path / CERTIFICATE).write_text(text)
    with pytest.raises(ExportError, match=CERTIFICATE):
        read_certificate(tmp_path)


def test_verify_tells_a_changed_file_and_what_it_has_not_compared(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out", llama_base(tmp_path / "Llama-4-x"), "Llama-x", base_name="nobody/Llama-4-x")
    report = verify(folder)
    assert report["verdict"] == UNVERIFIED, "no weight was compared"
    assert [(c["name"], c["status"]) for c in report["checks"]] == [(UNCHANGED, "passed"), (AGAIN, "not run")]
    (folder / "config.json").write_text("[]")
    report = verify(folder)
    assert report["verdict"] == FAILED and "config.json has changed" in report["checks"][0]["detail"]


def test_verify_refuses_another_base(tmp_path: Path) -> None:
    other = Path(shutil.copytree(EMBEDDED_DIR, tmp_path / "other"))
    weights = bytearray((other / "model.safetensors").read_bytes())
    weights[len(weights) // 3 :] = bytes(b ^ 1 for b in weights[len(weights) // 3 :])
    (other / "model.safetensors").write_bytes(weights)
    with pytest.raises(ExportError, match="not the base of this export: its weights differ"):
        verify(exported(tmp_path / "out"), base=str(other))


# -------------------------------------------------------------------- card and licence


def test_the_card_says_what_was_checked_and_carries_the_bases_licence(tmp_path: Path) -> None:
    card = card_of(exported(tmp_path / "out", checks=[PASSED, WRONG], run="python run.py", consumer="transformers"))
    front = card.split("---\n")[1]
    assert "license: apache-2.0" in front and "base_model" not in front
    assert "| tokenizer: ids | **failed** | other \\| ids than &lt;b> |" in card, "a table of one row a check"
    assert "**Failed.**" in card and "python run.py" in card and "two texts" in card
    assert str(tmp_path) not in card


def test_a_licence_is_never_assumed(tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base", card="", text="")
    card = card_of(exported(tmp_path / "out", base, base_name="someone/model"))
    assert "license" not in card.split("---\n")[1] and "names no licence" in card
    assert "base_model: someone/model" in card


def test_the_files_of_another_licence_go_along(tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base", card="license: mit\n", text="MIT License\n")
    (base / "NOTICE.txt").write_text("Copyright someone")
    folder = exported(tmp_path / "out", base, base_name="someone/model")
    assert (folder / "LICENSE").read_text() == "MIT License\n" and (folder / "NOTICE.txt").is_file()
    assert "under `mit`" in card_of(folder) and "Llama" not in card_of(folder)


def test_a_llama_licence_is_met_in_every_point(tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    folder = exported(tmp_path / "Llama-tickets", base, "Llama-tickets", base_name="meta-llama/Llama-4-Scout")
    card = card_of(folder)
    assert (folder / "LICENSE").read_text() == LLAMA4 and (folder / "USE_POLICY.md").is_file()
    notice = (
        "Llama 4 is licensed under the Llama 4 Community License, Copyright © Meta Platforms, Inc. All Rights Reserved."
    )
    assert (folder / "NOTICE").read_text() == notice + "\n"
    for words in (
        "Built with Llama",
        notice,
        "700 million",
        "European Union",
        "https://www.llama.com/llama4/use-policy",
    ):
        assert words in card
    assert "license_name: llama4" in card.split("---\n")[1]
    assert {"LICENSE", "NOTICE", "USE_POLICY.md"} <= set(read_certificate(folder).files)


@pytest.mark.parametrize(
    ("card", "text", "base_name"),
    [
        ("license: llama3.3\n", "", "someone/finetune"),
        ("", "LLAMA 3.3 COMMUNITY LICENSE AGREEMENT", "someone/finetune"),
        ("", "", "meta-llama/Llama-3.3-70B-Instruct"),
    ],
    ids=["card", "text", "publisher"],
)
def test_a_llama_licence_is_recognised(tmp_path: Path, card: str, text: str, base_name: str) -> None:
    base = llama_base(tmp_path / "base", card, text)
    licence = read_licence(base, base_name)
    assert licence.llama is not None and licence.llama.version == "3.3" and not licence.llama.multimodal_eu
    assert licence.name == "Llama 3.3 Community License"
    if not text:
        (base / "LICENSE.txt").write_text("the text")
    front = card_of(exported(tmp_path / "Llama-x", base, "Llama-x", base_name=base_name)).split("---\n")[1]
    assert card in front and (card or f"license_link: LICENSE{'' if text else '.txt'}" in front)


def test_the_architecture_alone_is_no_llama_licence() -> None:
    assert json.loads((EMBEDDED_DIR / "config.json").read_text())["model_type"] == "llama4_text"
    assert read_licence(EMBEDDED_DIR, "embedded").llama is None


def test_a_llama_licence_wants_its_name_and_its_copy(tmp_path: Path) -> None:
    base = llama_base(tmp_path / "base")
    with pytest.raises(ExportError, match=r"'tickets': .* begins with 'Llama'; for instance Llama-tickets"):
        exported(tmp_path / "tickets", base, "tickets", base_name="meta-llama/Llama-4-Scout")
    for file in ("LICENSE", "USE_POLICY.md"):
        (base / file).unlink()
    with pytest.raises(ExportError, match="no"):
        exported(tmp_path / "Llama-x", base, "Llama-x", base_name="meta-llama/Llama-4-Scout")
    three = read_licence(llama_base(tmp_path / "three", "license: llama3\n", "META LLAMA 3 COMMUNITY LICENSE"), "x/y")
    three.check_name("Llama-3-tickets", "llama 3 tickets")
    with pytest.raises(ExportError, match="'Llama 3'; for instance Llama-3-Llama-tickets"):
        three.check_name("Llama-tickets")


def test_public_names_are_no_paths(tmp_path: Path) -> None:
    assert public_name("embedded") == "embedded" and public_name("org/model") == "org/model"
    assert public_name(tmp_path / "Llama-4-Scout") == "Llama-4-Scout"


# -------------------------------------------------------------------- prompts


def test_prompts_come_from_a_file_or_are_built_in(tmp_path: Path) -> None:
    assert "built-in" in held_out_prompts().origin and len(held_out_prompts().items) == 5
    texts = tmp_path / "texts.txt"
    texts.write_text("one\n\ntwo\n")
    assert held_out_prompts(file=texts).items == ("one", "two")
    assert held_out_prompts(file=texts).origin == "the first 2 lines of texts.txt"
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"prompt": "a", "completion": "b"}\n')
    user, assistant = held_out_prompts(file=rows).items[0]
    assert dict(user) == {"role": "user", "content": "a"} and dict(assistant)["content"] == "b"
    texts.write_text("\n")
    with pytest.raises(ExportError, match="holds no prompts"):
        held_out_prompts(file=texts)
    rows.write_text('{"prompt": ""}\n')
    with pytest.raises(DataError):
        held_out_prompts(file=rows)


# -------------------------------------------------------------------- push


def test_a_dry_run_says_what_would_go_and_is_private(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("a dry run reaches no network"))
    folder = exported(tmp_path / "out")
    before = {path: path.read_bytes() for path in folder.iterdir()}
    report = push(folder, "me/tickets", dry_run=True)
    assert (
        report["private"] and report["files"] == ["LICENSE", CARD, CERTIFICATE, "config.json"] and report["url"] == ""
    )
    assert report["bytes"] == sum(path.stat().st_size for path in folder.iterdir())
    assert report["licence"] == "apache-2.0" and "hf_secret" not in json.dumps(report)
    assert {path: path.read_bytes() for path in folder.iterdir()} == before
    assert not push(folder, "me/tickets", dry_run=True, public=True)["private"]


def test_what_must_not_be_shared_is_refused_before_the_hub_is_asked(tmp_path: Path) -> None:
    folder = exported(tmp_path / "out")
    for repository in ("tickets", "a/b/c", "../x", "me/"):
        with pytest.raises(ExportError, match="owner/name"):
            push(folder, repository, dry_run=True)
    (folder / "mine.txt").write_text("private")
    (folder / "mine.txt").chmod(0o644)
    with pytest.raises(ExportError, match=r"mine\.txt was not there"):
        push(folder, "me/tickets", dry_run=True)
    for number, (checks, words) in enumerate([([PASSED, WRONG], "is failed"), ([NOT_RUN], "is not verified")]):
        with pytest.raises(ExportError, match=words):
            push(exported(tmp_path / str(number), checks=checks), "me/tickets", dry_run=True)
    llama = exported(
        tmp_path / "Llama-x", llama_base(tmp_path / "base"), "Llama-x", base_name="meta-llama/Llama-4-Scout"
    )
    with pytest.raises(ExportError, match="begins with 'Llama'"):
        push(llama, "me/tickets", dry_run=True)
    assert push(llama, "me/Llama-tickets", dry_run=True)["licence"] == "Llama 4 Community License"


@pytest.mark.parametrize("place", ["{here}/base", "/home/somebody/models/base", "/Users/somebody/base"])
def test_places_on_this_machine_are_not_shared(tmp_path: Path, place: str) -> None:
    (tmp_path / "base").mkdir()
    folder = exported(tmp_path / "out")
    said = {"_name_or_path": place.format(here=tmp_path), "url": "https://example.org/home/a/b", "run": "/usr/bin/env"}
    (folder / "config.json").write_text(json.dumps(said))
    certificate = json.loads((folder / CERTIFICATE).read_text())
    certificate["files"] = hash_files(folder)
    (folder / CERTIFICATE).write_text(json.dumps(certificate))
    with pytest.raises(ExportError, match="names places on this machine") as raised:
        push(folder, "me/tickets", dry_run=True)
    assert place.format(here=tmp_path) in str(raised.value) and "usr" not in str(raised.value)


class Hub(BaseHTTPRequestHandler):
    """As much of a hub as one commit of small files needs; it remembers what it was sent."""

    private, seen, tokens = True, [], []  # type: ignore[var-annotated]

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"] or 0))
        self.seen.append((self.path, body))
        self.tokens.append(self.headers["Authorization"])
        url = f"http://{self.headers['Host']}/me/tickets"
        if self.path.endswith("/preupload/main"):
            files = json.loads(body)["files"]
            answer: Any = {
                "files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            }
        elif self.path.endswith("/commit/main"):
            answer = {"commitUrl": f"{url}/commit/0", "commitOid": "0", "pullRequestUrl": None, "success": True}
        else:
            answer = {"url": url, "warnings": [], "errors": []}
        self.answer(answer)

    def do_GET(self) -> None:
        self.answer({"id": "me/tickets", "private": self.private, "siblings": [], "sha": "0"})

    def answer(self, value: Any) -> None:
        body = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(Hub, "seen", [])
    monkeypatch.setattr(Hub, "tokens", [])
    server = HTTPServer(("127.0.0.1", 0), Hub)
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def test_a_push_makes_a_private_repository_and_one_commit_of_the_certified_files(tmp_path: Path, hub: str) -> None:
    folder = exported(tmp_path / "out")
    report = push(folder, "me/tickets", endpoint=hub)
    assert report["url"].endswith("/commit/0")
    by_path = dict(Hub.seen)
    assert json.loads(by_path["/api/repos/create"])["visibility"] == "private"
    lines = [json.loads(line) for line in by_path["/api/models/me/tickets/commit/main"].splitlines()]
    assert {line["value"]["path"] for line in lines if line["key"] == "file"} == set(report["files"])
    assert "Bearer hf_secret" in Hub.tokens
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"hf_secret" not in written and "hf_secret" not in json.dumps(report)


def test_a_repository_that_everyone_sees_is_not_pushed_to_unasked(
    tmp_path: Path, hub: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Hub, "private", False)
    with pytest.raises(ExportError, match="everyone can see it"):
        push(exported(tmp_path / "out"), "me/tickets", endpoint=hub)
    assert not any(path.endswith("/commit/main") for path, _ in Hub.seen)


def test_a_hub_that_cannot_be_reached_is_an_error_of_ours(tmp_path: Path, hub: str) -> None:
    with pytest.raises(ExportError, match="the hub did not take me/tickets"):
        push(exported(tmp_path / "out"), "me/tickets", endpoint="http://127.0.0.1:9")
