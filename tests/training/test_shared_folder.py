"""A folder for checkpoints that is each rank's own is refused before anything is trained."""

from __future__ import annotations

from pathlib import Path

from slime.training import shared_folder
from slime.training.shared_folder import refuse_unshared
from tests.ranks import run_ranks


def asked(rank: int, folder: Path, names: tuple[str, ...]) -> str:
    shared_folder._SEEN_WITHIN = 1.0
    try:
        refuse_unshared(folder / names[rank], "--save")
    except ValueError as error:
        return str(error)
    return ""


def test_all_ranks_are_told_who_does_not_see_the_folder(tmp_path: Path):
    told = run_ranks(3, asked, tmp_path, ("disk", "disk", "other"))
    assert all("is not one folder for all ranks: rank 2 on " in one for one in told), told
    assert f"--save {tmp_path / 'disk'} is not one folder" in told[0] and "cannot see what rank 0 on " in told[0]
    assert not (tmp_path / "other").exists() and list((tmp_path / "disk").iterdir()) == []


def test_a_shared_folder_is_left_as_it_was(tmp_path: Path):
    assert run_ranks(2, asked, tmp_path, ("disk", "disk")) == ["", ""]
    assert list((tmp_path / "disk").iterdir()) == []
