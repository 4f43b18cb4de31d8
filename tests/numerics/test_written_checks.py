"""What merge, combine and convert write is compared before it appears; planted faults leave nothing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from typer.testing import CliRunner

import studio
from adapters import combine, compact
from adapters.merged import MergedWeights
from adapters.verify import combined, converted
from adapters.verify.adapter_files import SAME, USED
from adapters.verify.combined import FINITE, UNTOUCHED
from adapters.verify.converted import BITS, SETTINGS
from adapters.verify.run import NOT_RUN
from adapters.verify.weights import TARGETED
from studio import VerificationError
from studio.cli import app
from tests.numerics.conftest import Tiny, save
from tests.numerics.test_combine import trained
from tests.numerics.test_expert_lora import UNEVEN, placement_for

run = CliRunner().invoke


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Path]]:
    """A base, and two adapters whose experts have ranks of their own."""
    tiny, folder = Tiny("llama4_text", 64, 32), tmp_path_factory.mktemp("pair")
    base = save(tiny, folder)
    return base, [
        trained(base, tiny, folder / name, seed, placement_for(tiny, UNEVEN)) for seed, name in enumerate("ab")
    ]


def statuses(report: dict[str, Any]) -> dict[str, str]:
    return {check["name"]: check["status"] for check in report["checks"]}


def refused(out: Path, call: Any) -> set[str]:
    """The checks that failed; nothing of the output is there, under its name or another."""
    with pytest.raises(VerificationError) as error:
        call()
    assert not list(out.parent.glob(f"*{out.name}*"))
    return {check.name for check in error.value.checks if check.status == "failed"}


# -------------------------------------------------------------------- merge


def test_a_merge_is_compared_and_no_model_is_run(pair: Any, tmp_path: Path) -> None:
    base, adapters = pair
    options = ["--base", str(base), "--dtype", "bfloat16", "--json"]
    report = json.loads(run(app, ["merge", str(adapters[0]), "--out", str(tmp_path / "out"), *options]).stdout)
    found = statuses(report)
    assert "failed" not in found.values() and found[TARGETED] == "passed"
    behaviour = [check for check in report["checks"] if check["name"].startswith("behaviour")]
    assert all(check["status"] == "not run" and NOT_RUN in check["detail"] for check in behaviour) and behaviour
    assert {oct(path.stat().st_mode & 0o777) for path in (tmp_path / "out").iterdir()} == {"0o644"}


def test_a_merge_that_loses_an_expert_never_appears(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base, adapters = pair
    right = MergedWeights.delta

    def wrong(self: MergedWeights, key: str, expert: int | None = None, rows: Any = None) -> Tensor | None:
        delta = right(self, key, expert, rows)
        lost = ".layers.1." in key and (expert == 0 or ".experts.0." in key)
        return None if lost or delta is None else delta

    monkeypatch.setattr(MergedWeights, "delta", wrong)
    out = tmp_path / "out"
    assert TARGETED in refused(out, lambda: studio.merge(adapters[0], out, base=str(base)))
    report = studio.merge(adapters[0], out, base=str(base), verify=False)
    assert list(statuses(report).values()) == ["not run"] and "--no-verify" in report["checks"][0]["detail"]


# -------------------------------------------------------------------- combine


def combination(base: Path, adapters: list[Path], out: Path, weights: list[float], **options: Any) -> dict[str, str]:
    """Written without its process, and checked right here."""
    studio.combine(adapters, out, weights=weights, base=str(base), verify=False, **options)
    checks = combined.check_combined(out, base, adapters, weights, options.get("method", "sum"))
    return {check.name: check.status for check in checks}


@pytest.mark.parametrize(
    ("options", "values"),
    [({}, "passed"), ({"rank": 2}, "passed"), ({"method": "ties"}, "not run"), ({"method": "dare"}, "not run")],
    ids=["sum", "rank", "ties", "dare"],
)
def test_a_combination_is_compared_as_far_as_there_is_a_second_way(
    pair: Any, tmp_path: Path, options: dict[str, Any], values: str
) -> None:
    base, adapters = pair
    found = combination(base, adapters, tmp_path / "out", [0.7, -0.4], **options)
    assert found.pop(SAME) == values and set(found.values()) == {"passed"}, found
    assert {USED, FINITE, UNTOUCHED} <= found.keys()


def test_adapters_that_cancel_nearly_are_still_an_exact_sum(pair: Any, tmp_path: Path) -> None:
    base, adapters = pair
    assert combination(base, [adapters[0]] * 2, tmp_path / "out", [1.0, -0.99999])[SAME] == "passed"


@pytest.mark.parametrize("options", [{}, {"rank": 3}], ids=["exact", "of a lower rank"])
def test_a_sum_with_other_weights_never_appears(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    base, adapters = pair
    right = combine._matrix

    def wrong(part: Any, factors: Any, expert: int, weight: float, like: Any) -> tuple[Tensor, Tensor]:
        return right(part, factors, expert, 0.7 if expert == 2 else weight, like)

    monkeypatch.setattr(combine, "_matrix", wrong)
    assert combination(base, adapters, tmp_path / "here", [0.7, 0.1], **options)[SAME] == "failed"
    out = tmp_path / "out"
    if not options:
        assert refused(out, lambda: studio.combine(adapters, out, weights=[0.7, 0.1], base=str(base))) == {SAME}


def test_ties_that_changes_what_no_adapter_does_never_appears(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, adapters = pair
    right = combine._load

    def wrong(*given: Any) -> Any:
        a, b = right(*given)
        return a + 0.01, b + 0.01

    monkeypatch.setattr(combine, "_load", wrong)
    monkeypatch.setattr(combine, "_rank", lambda total, room, settings: 3)
    assert combination(base, adapters, tmp_path / "out", [1.0, 1.0], method="ties")[UNTOUCHED] == "failed"


# -------------------------------------------------------------------- convert


def test_both_forms_hold_the_same_bits(pair: Any, tmp_path: Path) -> None:
    there = studio.convert(pair[1][0], tmp_path / "compact", to="compact")
    back = studio.convert(tmp_path / "compact", tmp_path / "again", to="peft")
    for report in (there, back):
        found = statuses(report)
        assert set(found.values()) == {"passed"} and {converted.USED, converted.FINITE, BITS, SETTINGS} <= found.keys()
    assert "bit by bit" in next(check["detail"] for check in back["checks"] if check["name"] == BITS)


def test_a_conversion_that_loses_a_row_or_turns_the_experts_never_appears(
    pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter, out, right, spread = pair[1][0], tmp_path / "out", compact.own_ranks, compact._spread
    with monkeypatch.context() as patched:
        patched.setattr(compact, "own_ranks", lambda first, second: (right(first, second) - 1).clamp(min=0))
        assert BITS in refused(out, lambda: studio.convert(adapter, out, to="compact"))
    studio.convert(adapter, tmp_path / "compact", to="compact")
    monkeypatch.setattr(compact, "_spread", lambda flat, keep, ranks: spread(flat, keep, ranks).roll(1, 0))
    assert BITS in refused(out, lambda: studio.convert(tmp_path / "compact", out, to="peft"))
    report = studio.convert(tmp_path / "compact", out, to="peft", verify=False)
    assert list(statuses(report).values()) == ["not run"]


def test_a_value_that_is_not_finite_is_seen(pair: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    right = compact._by_expert

    def wrong(*given: Any) -> tuple[Tensor, Tensor]:
        first, second = right(*given)
        first[0, 0, 0] = torch.inf
        return first, second

    monkeypatch.setattr(compact, "_by_expert", wrong)
    studio.convert(pair[1][0], tmp_path / "out", to="compact", verify=False)
    found = {check.name: check.status for check in converted.check_converted(tmp_path / "out", pair[1][0])}
    assert found[converted.FINITE] == "failed"


# -------------------------------------------------------------------- on the command line


def test_the_commands_show_every_check(pair: Any, tmp_path: Path) -> None:
    base, adapters = pair
    shown = run(app, ["convert", str(adapters[0]), str(tmp_path / "c"), "--to", "compact"]).stdout
    assert BITS in shown and "checks passed" in shown and "compact form" in shown
    both = [str(adapter) for adapter in adapters]
    shown = run(app, ["combine", *both, "--out", str(tmp_path / "t"), "--method", "dare", "--base", str(base)]).stdout
    assert f"not run: {SAME}" in shown and "dare has no second reader" in shown
    shown = run(app, ["combine", *both, "--out", str(tmp_path / "n"), "--base", str(base), "--no-verify"]).stdout
    assert "not verified: it was switched off" in shown
