"""Files are whole or absent, and checkpoints are known by their content."""

import hashlib
import json
import os
import re

import pytest

from msad.data.cache import checkpoint_id
from msad.files import atomic_write, files_below, local_file, read_json, require_checkpoint, write_json


def test_a_file_appears_when_it_is_whole(tmp_path):
    path = tmp_path / "a.json"
    path.write_text("old")
    with atomic_write(path, "w") as file:
        file.write("new")
        file.flush()
        assert path.read_text() == "old"
    assert path.read_text() == "new" and os.listdir(tmp_path) == ["a.json"]


def test_files_behind_links_are_found_and_hidden_ones_are_not(tmp_path):
    root, other = tmp_path / "root", tmp_path / "other"
    for file in ("root/b/2.png", "root/1.png", "root/.hidden.png", "root/.ipynb_checkpoints/1.png", "other/3.png"):
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).touch()
    (root / "c").symlink_to(other)
    (root / "d").symlink_to(other)  # twice, by different names, to which different labels may belong
    (root / "e.png").symlink_to(other / "3.png")
    (root / "gone.png").symlink_to(tmp_path / "nowhere")
    (root / "b/up").symlink_to(root)
    (other / "back").symlink_to(root / "b")  # into root again, whose folder b links to root
    found = [os.path.relpath(path, root) for path in files_below(root)]
    assert found == ["1.png", "b/2.png", "c/3.png", "c/back/2.png", "d/3.png", "d/back/2.png", "e.png", "gone.png"]
    assert list(files_below(os.fspath(root))) == list(files_below(root))


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


def test_json_has_no_nan(tmp_path):
    file = tmp_path / "a.json"
    assert read_json(file) is None
    content = {"AP": float("nan"), "box": (1, float("inf"), 2.5), 3: [True, None, "NaN"]}
    for indent in (1, None):
        write_json(file, content, indent)
        assert json.loads(file.read_text(), parse_constant=pytest.fail) == read_json(file)
        assert read_json(file) == {"AP": None, "box": [1, None, 2.5], "3": [True, None, "NaN"]}
    assert file.read_text() == '{"AP": null, "box": [1, null, 2.5], "3": [true, null, "NaN"]}\n'
    with pytest.raises(TypeError):
        write_json(file, {"a": object()})
    assert read_json(file)["3"] == [True, None, "NaN"] and os.listdir(tmp_path) == ["a.json"]


def test_checkpoints(tmp_path):
    file = tmp_path / "x.pth"
    assert local_file("https://a/x.pth?b") == "" and local_file("pretrained://a") == ""
    assert local_file(file) == local_file(f"{file}?matching_heuristics=True") == str(file)
    for absent in (file, f"{file}?matching_heuristics=True"):
        with pytest.raises(FileNotFoundError, match=f"no checkpoint {re.escape(str(absent))}$"):
            require_checkpoint(absent)
        assert checkpoint_id(absent) == str(absent)
    file.write_bytes(b"one")
    require_checkpoint(f"{file}?matching_heuristics=True")
    require_checkpoint("pretrained://a")
    digest = hashlib.sha256(b"one").hexdigest()
    assert checkpoint_id(file) == digest and checkpoint_id("pretrained://a") == "pretrained://a"
    assert checkpoint_id(f"{file}?matching_heuristics=True") == f"{digest}?matching_heuristics=True"
