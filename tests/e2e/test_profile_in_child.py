"""The app profiles data in a process of its own: progress, an error of ours, and a process that was killed."""

from __future__ import annotations

import multiprocessing
from pathlib import Path

import pytest

import studio
from studio import Recipe, StudioError
from ui.profiling import LOADING, ROUTING, profile_in_child

DATA = Path(__file__).parents[2] / "recipes" / "data" / "tickets-train.jsonl"


def recipe(data: Path, folder: Path) -> Recipe:
    return studio.parse_recipe(
        f"data: {{train: {data}}}\nplacement: {{profile_tokens: 500}}\noutput: {{dir: {folder}/a}}"
    )


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def test_it_says_how_far_it_is_and_leaves_a_profile(tmp_path: Path) -> None:
    wanted = recipe(DATA, tmp_path)
    assert studio.find_profile(wanted) is None
    steps = list(profile_in_child(wanted))
    assert list(dict.fromkeys(stage for stage, _, _ in steps)) == [LOADING, ROUTING]
    assert steps[-1][1] == steps[-1][2] > 0
    profile = studio.find_profile(wanted)
    assert profile is not None and profile.sources == ("tickets-train",)


def test_what_the_studio_refuses_comes_back_in_its_words(tmp_path: Path) -> None:
    (tmp_path / "bad.jsonl").write_text('{"prompt": 3}\n')
    with pytest.raises(StudioError, match=r"bad\.jsonl: 1 problem"):
        list(profile_in_child(recipe(tmp_path / "bad.jsonl", tmp_path)))


def test_an_error_that_is_none_of_ours_comes_back_with_its_type(tmp_path: Path) -> None:
    (tmp_path / "cache").write_text("")  # a file, where the folder of the profiles is to be made
    with pytest.raises(StudioError, match=r"^(NotADirectory|FileExists)Error: .*cache"):
        list(profile_in_child(recipe(DATA, tmp_path)))


def test_a_killed_process_is_an_error_and_a_closed_one_is_gone(tmp_path: Path) -> None:
    steps = profile_in_child(recipe(DATA, tmp_path))
    next(steps)
    (child,) = multiprocessing.active_children()
    child.kill()
    with pytest.raises(StudioError, match="exit code -9"):
        list(steps)
    steps = profile_in_child(recipe(DATA, tmp_path))
    next(steps)
    steps.close()
    assert not multiprocessing.active_children()
