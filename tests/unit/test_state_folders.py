import fcntl
import os

import pytest

from pool.state_folders import FOLDERS_MAX, folders, hold, new_folder, newest_folder
from recovery.errors import BadInput


def make(root, name, age):
    """A folder whose newest checkpoint is `age` seconds old."""
    folder = new_folder(root, "p", name)
    (folder / "log").mkdir()
    (folder / "log" / "lock").touch()
    then = folder.stat().st_mtime - age
    for path in (folder / "log", folder):
        os.utime(path, (then, then))
    return folder


def test_folders_of_pools_that_are_over_make_room_the_oldest_first(tmp_path):
    made = [make(tmp_path, f"{n:02}", 1000 - n) for n in range(FOLDERS_MAX)]
    fresh = new_folder(tmp_path, "p", "fresh")
    assert folders(tmp_path) == [fresh, *reversed(made[1:])]


def test_folder_in_use_or_just_made_stays(tmp_path):
    used = make(tmp_path, "used", 5000)
    with open(used / "log" / "lock") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        for n in range(FOLDERS_MAX + 2):
            make(tmp_path, f"{n}", 30)
        new_folder(tmp_path, "p", "fresh")
    assert used.is_dir()
    assert len(folders(tmp_path)) == FOLDERS_MAX + 4


def test_newest_is_the_one_whose_log_was_written_last(tmp_path):
    old, young = make(tmp_path, "a", 500), make(tmp_path, "b", 400)
    assert newest_folder(tmp_path, "p") == young
    (old / "log" / "checkpoint-00000009.json").touch()
    assert newest_folder(tmp_path, "p") == old


def test_no_folder_says_where_it_looked(tmp_path):
    with pytest.raises(BadInput, match="TABPOOL_STATE"):
        newest_folder(tmp_path, "p")


def test_folder_that_its_maker_holds_stays_though_it_has_no_log(tmp_path):
    used = make(tmp_path, "used", 5000)
    (used / "log" / "lock").unlink()
    held = hold(used)
    for path in (used / "log", used):
        os.utime(path, (1e9, 1e9))
    for n in range(FOLDERS_MAX + 2):
        make(tmp_path, f"{n}", 1000)
    assert used.is_dir()
    os.close(held)
    new_folder(tmp_path, "p", "fresh")
    assert not used.is_dir()
