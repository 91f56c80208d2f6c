import os
import shutil

import pytest

from flax_decoder.errors import FaultError
from flax_decoder.io import place as place_module
from flax_decoder.io.place import Place


def test_a_folder_is_found_under_its_new_name(tmp_path):
    (tmp_path / "run").mkdir()
    with Place(tmp_path / "run") as place:
        assert place.is_here() and place.find() == tmp_path / "run"
        (tmp_path / "run").rename(tmp_path / "moved")
        assert not place.is_here() and place.find() == tmp_path / "moved"
        (tmp_path / "run").mkdir()  # another one
        assert not place.is_here() and place.find() == tmp_path / "moved"
        (tmp_path / "run").rmdir()
        (tmp_path / "moved").rename(tmp_path / "run")
        assert place.is_here()


def test_a_link_that_leads_elsewhere_is_another_folder(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    (tmp_path / "run").symlink_to("a")
    with Place(tmp_path / "run") as place:
        assert place.is_here()
        (tmp_path / "run").unlink()
        (tmp_path / "run").symlink_to("b")
        assert place.find() == tmp_path / "a"


def test_a_folder_that_is_deleted_is_not_found_even_where_another_gets_its_number(tmp_path):
    (tmp_path / "run").mkdir()
    with Place(tmp_path / "run") as place:
        shutil.rmtree(tmp_path / "run")
        (tmp_path / "run").mkdir()
        assert not place.is_here()
        with pytest.raises(FaultError, match=r"/run: has been deleted, or moved to where it cannot be found"):
            place.find()


def test_a_system_that_does_not_tell_where_it_is_has_not_found_it(tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()

    def fail(path):
        raise FileNotFoundError(path)

    monkeypatch.setattr(place_module.os, "readlink", fail)
    if hasattr(place_module.fcntl, "F_GETPATH"):
        monkeypatch.setattr(place_module.fcntl, "fcntl", lambda *_: os.fsencode(tmp_path / "other"))
    with Place(tmp_path / "run") as place:
        (tmp_path / "run").rename(tmp_path / "moved")
        with pytest.raises(FaultError, match="cannot be found"):
            place.find()
