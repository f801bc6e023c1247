"""Ids from a column that the user names: read without the rows, and no two alike."""

import datasets
import pytest

from datamodules import DemonstrationsDataModule, PromptsDataModule
from datamodules.file_rows import FileRows
from datamodules.sources import Source, Table
from tests.file_data import opened, prompt, sharegpt, write_images, write_lines, write_parquet

INDEX = {"id": "extra_info.index"}


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    write_images(tmp_path, 2)
    return tmp_path


def test_two_rows_of_one_id_are_refused_by_their_places(folder):
    write_parquet(folder / "a.parquet", [prompt(number) for number in (0, 1, 2)])
    write_parquet(folder / "b.parquet", [prompt(number) for number in (5, 1)])
    both = [Source("a.parquet"), Source("b.parquet")]
    said = r"'extra_info.index' gives a\.parquet, row 2 and b\.parquet, row 2 one id, '1': name a column .* leave"
    with pytest.raises(ValueError, match=said):
        opened(PromptsDataModule(both, columns=INDEX))
    with pytest.raises(ValueError, match=said):
        opened(PromptsDataModule("a.parquet", validation=both, columns=INDEX))
    opened(PromptsDataModule(both, columns=INDEX, num_rows=4))
    opened(PromptsDataModule(both))
    opened(PromptsDataModule("a.parquet", validation="b.parquet", columns=INDEX))


def test_rows_of_text_are_refused_as_well_and_bad_ones_have_ids_of_their_own(folder):
    rows = [sharegpt(0, key="x"), "{", "", sharegpt(0, key=["no", "id"]), sharegpt(1, key=7), sharegpt(0)]
    write_lines(folder / "rows.jsonl", rows)
    data = opened(DemonstrationsDataModule("rows.jsonl", columns={"id": "key"}))
    rows = data._rows["train"]
    assert list(rows.ids()) == ["x", "rows-1", "rows-2", "rows-3", "7", "rows-5"]
    assert list(rows.ids()) == [rows[index].id for index in range(6)]
    write_lines(folder / "rows.jsonl", [sharegpt(0, key="x"), "{", sharegpt(1, key="x")])
    with pytest.raises(ValueError, match=r"'key' gives rows\.jsonl, row 1 and rows\.jsonl, row 3 one id, 'x'"):
        opened(DemonstrationsDataModule("rows.jsonl", columns={"id": "key"}))


def test_ids_are_read_without_the_rows_images(folder, monkeypatch):
    write_parquet(folder / "a.parquet", [prompt(number) for number in range(5)])
    monkeypatch.setattr("datamodules.sources.SCANNED_A_MAPPING", 2)
    rows = opened(PromptsDataModule("a.parquet", columns=INDEX))._rows["train"]
    (table,) = rows.tables
    assert list(table.rows_with("extra_info.index")) == [
        {"extra_info": {"index": number, "split": "train"}} for number in range(5)
    ]
    monkeypatch.setattr(Table, "row", lambda *_: pytest.fail("a whole row was read"))
    assert list(rows.ids()) == ["0", "1", "2", "3", "4"]
    monkeypatch.setattr(Table, "rows_with", lambda *_: pytest.fail("rows were read"))
    assert list(FileRows([Source("a.parquet")], PromptsDataModule("a.parquet").reading, "train").ids()) == [
        f"a-{number}" for number in range(5)
    ]
