"""Kept results: found again, ignored where damaged, done without where nothing can be written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgewise.optimizer import cache


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("EDGEWISE_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


class TestFolder:
    def test_is_the_one_that_was_chosen(self, root: Path) -> None:
        assert cache.folder() == root

    def test_none_where_the_choice_is_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("EDGEWISE_CACHE", "")
        assert cache.folder() is None
        cache.store("a", {"n": 1})
        assert cache.load("a") is None

    def test_is_that_of_the_platform_else(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.delenv("EDGEWISE_CACHE", raising=False)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
        assert cache.folder() == tmp_path / "edgewise"
        monkeypatch.setenv("XDG_CACHE_HOME", "relative")  # not to be followed
        assert cache.folder() == Path.home() / ".cache" / "edgewise"
        monkeypatch.delenv("XDG_CACHE_HOME")
        assert cache.folder() == Path.home() / ".cache" / "edgewise"


class TestKey:
    def test_depends_on_every_part(self) -> None:
        keys = [
            cache.key_of(*parts) for parts in (("k", "ab"), ("k", "a", "b"), ("k", "ba"), ("l", "ab"), ("k",))
        ]
        assert len(set(keys)) == len(keys)
        assert cache.key_of("k", "ab") == cache.key_of("k", b"ab")

    def test_depends_on_the_version(self, monkeypatch: pytest.MonkeyPatch) -> None:
        before = cache.key_of("k", "a")
        monkeypatch.setattr(cache, "VERSION", "another")
        assert cache.key_of("k", "a") != before


class TestKeeping:
    def test_what_was_stored_is_found(self, root: Path) -> None:
        assert cache.load("a") is None
        cache.store("a", {"share": 0.1, "list": [1, 2]})
        assert cache.load("a") == {"share": 0.1, "list": [1, 2]}
        assert [p.name for p in root.iterdir()] == ["a.json"]  # nothing half written is left

    def test_the_last_one_counts(self, root: Path) -> None:
        cache.store("a", {"n": 1})
        cache.store("a", {"n": 2})
        assert cache.load("a") == {"n": 2}

    @pytest.mark.parametrize("damage", [b"", b'{"n": 1', b"\xff\xfe\x00", b"[1, 2]", b"null"])
    def test_a_damaged_file_is_ignored_and_written_anew(self, root: Path, damage: bytes) -> None:
        cache.store("a", {"n": 1})
        (root / "a.json").write_bytes(damage)
        assert cache.load("a") is None
        cache.store("a", {"n": 3})
        assert cache.load("a") == {"n": 3}

    def test_a_folder_that_cannot_be_made(self, root: Path) -> None:
        root.write_text("a file is in the way")
        cache.store("a", {"n": 1})
        assert cache.load("a") is None

    @pytest.mark.skipif(os.name == "nt", reason="a directory in place of a file is another error there")
    def test_a_target_that_cannot_be_replaced(self, root: Path) -> None:
        (root / "a.json" / "in the way").mkdir(parents=True)
        cache.store("a", {"n": 1})
        assert cache.load("a") is None
        assert [p.name for p in root.iterdir()] == ["a.json"]
