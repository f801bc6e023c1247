"""Hashes of files and folders."""

import os

import pytest

from prism_pl import fingerprint
from prism_pl.fingerprint import hash_path


@pytest.fixture
def read(monkeypatch):
    """How often a file's content was read."""
    counted, digest = [], fingerprint.hashlib.file_digest
    monkeypatch.setattr(fingerprint.hashlib, "file_digest", lambda *args: counted.append(1) or digest(*args))
    return counted


def test_large_files_are_hashed_once_and_anew_where_they_changed(tmp_path, monkeypatch, read):
    monkeypatch.setattr(fingerprint, "REMEMBERED_FROM", 4)
    (tmp_path / "weights").write_text("abcd")
    (tmp_path / "config").write_text("ab")
    first = hash_path(tmp_path)
    assert hash_path(tmp_path) == first
    assert len(read) == 3  # the small file each time
    (tmp_path / "weights").write_text("abce")
    os.utime(tmp_path / "weights", ns=(1, 1))
    assert hash_path(tmp_path) != first
