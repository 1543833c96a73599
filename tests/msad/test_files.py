"""Files are whole or absent."""

import os

import pytest

from msad.files import atomic_write


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with atomic_write(path, "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_nothing_is_left_of_an_interrupted_one(tmp_path, error):
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(error), atomic_write(path, "w") as file:
        file.write("half")
        raise error
    assert path.read_text() == "old" and os.listdir(tmp_path) == ["a.json"]


def test_several_processes_write_beside_each_other(tmp_path):
    with atomic_write(tmp_path / "a", shared=True) as file:
        assert str(os.getpid()) in file.name
    with pytest.raises(FileNotFoundError), atomic_write(tmp_path / "none" / "a"):
        pass
