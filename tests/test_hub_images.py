"""Rows of a hub repository that name their images by path. The hub is a folder here."""

from pathlib import Path

import datasets
import huggingface_hub
import pytest

from datamodules import DemonstrationsDataModule, PairsDataModule, hub_images
from datamodules.sources import Source
from prism_pl.bad_rows import BadRow
from prism_pl.images import open_image
from tests.file_data import Rows, opened, pair, picture, rows_of, sharegpt, write_images, write_lines

PAIRS = Source("prism-vlm/qwen3_vl_moe_warmup_pairwise_120k", only="warmup_pairwise.jsonl")


class Hub:
    """One data repository: `folder`, and what was asked of it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.asked = folder, []
        self.load_dataset = datasets.load_dataset

    def load(self, kind, *_, data_files, split):
        (url,) = data_files
        name = url.removeprefix("hf://datasets/").split("/", 2)[2]
        return self.load_dataset(kind, data_files=[str(self.folder / name)], split=split)

    def snapshot_download(self, repo_id, **options):
        self.asked.append((repo_id, options))
        return str(self.folder)


@pytest.fixture
def hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    hub = Hub(tmp_path / "hub")
    write_images(hub.folder, 2)
    monkeypatch.setattr(datasets, "load_dataset", hub.load)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.snapshot_download)
    hub_images.fetched.cache_clear()
    yield hub
    hub_images.fetched.cache_clear()


def pixels(rows):
    return [open_image(image, row.id).tobytes() for row in rows for image in row.images]


def test_relative_images_of_a_hub_set_are_fetched_once_from_its_repository(hub):
    write_lines(hub.folder / "warmup_pairwise.jsonl", [pair(0), pair(1)])
    source = Source(PAIRS.path, only=PAIRS.only, revision="abc")
    data = PairsDataModule(source, validation=source)
    assert pixels(rows_of(data)) == pixels(row for batch in data.val_dataloader() for row in batch)
    assert pixels(rows_of(data)) == [picture(0).tobytes(), picture(1).tobytes()]
    ((repository, options),) = hub.asked
    assert repository == PAIRS.path
    assert (options["repo_type"], options["revision"]) == ("dataset", "abc")
    assert "*.jsonl" in options["ignore_patterns"], "rows come from datasets"


def test_they_are_fetched_before_processes_share_the_work(hub):
    write_lines(hub.folder / "warmup_pairwise.jsonl", [pair(0)])
    PairsDataModule(PAIRS).prepare_data()
    assert len(hub.asked) == 1


def test_images_beside_a_file_in_a_folder_of_the_repository(hub):
    (hub.folder / "images").rename(hub.folder / "pictures")
    write_images(hub.folder / "deep")
    write_lines(hub.folder / "deep" / "rows.jsonl", [sharegpt(0), sharegpt(1, images=["pictures/1.png"])])
    rows = rows_of(DemonstrationsDataModule(Source("a/b", only="deep/rows.jsonl")))
    assert pixels(rows) == [picture(0).tobytes(), picture(1).tobytes()]
    assert rows[0].images[0].parent == hub.folder / "deep" / "images"


def test_a_given_folder_and_files_of_this_machine_ask_nothing_of_the_hub(hub, tmp_path):
    (hub.folder / "images").rename(tmp_path / "images")
    write_lines(hub.folder / "warmup_pairwise.jsonl", [pair(0)])
    assert pixels(rows_of(PairsDataModule(Source(PAIRS.path, only=PAIRS.only, image_folder=".")))) == [
        picture(0).tobytes()
    ]
    write_lines(hub.folder / "here.jsonl", [pair(image=str(tmp_path / "images" / "1.png"))])
    assert pixels(rows_of(PairsDataModule(Source(PAIRS.path, only="here.jsonl")))) == [picture(1).tobytes()]
    assert hub.asked == []


def test_images_that_are_not_to_be_had_say_what_to_do(hub):
    elsewhere = ("images/9.png", "/mnt/made/0.png", "https://x.org/0.png")
    write_lines(hub.folder / "warmup_pairwise.jsonl", [pair(image=image) for image in elsewhere])
    missing, absolute, web = rows_of(PairsDataModule(PAIRS), Rows())
    assert all(isinstance(row, BadRow) for row in (missing, absolute, web))
    assert f"{PAIRS.path} has no file 'images/9.png' on the hub: download the images" in str(missing)
    assert str(missing).endswith(f"{{path: {PAIRS.path}, image_folder: FOLDER}}")
    assert "'/mnt/made/0.png' lies on the machine where" in str(absolute)
    assert "'https://x.org/0.png' is on the web: download it" in str(web)
    assert all(str(row).endswith("give both, {path: FILE, image_folder: FOLDER}") for row in (absolute, web))


@pytest.mark.parametrize("error", [ConnectionError("offline"), FileNotFoundError("not in the cache")])
def test_a_hub_that_is_away_stops_with_one_message(error, hub, monkeypatch):
    def fail(*_, **__):
        raise error

    write_lines(hub.folder / "warmup_pairwise.jsonl", [pair(0)])
    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(FileNotFoundError, match=rf"images of {PAIRS.path} cannot be fetched .*{error}.*image_folder"):
        opened(PairsDataModule(PAIRS))
