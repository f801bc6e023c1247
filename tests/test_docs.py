"""The documentation tells the truth: its links lead somewhere, and its commands of 4B parse in their order, which takes
less than running them as tests/test_docs_run.py does."""

import re

from tests.told_commands import PAGES, WRITTEN, commands_of, of_lightning, read_by, written_by


def test_the_commands_of_4b_work_in_the_order_of_their_page(tmp_path, capsys, monkeypatch):
    """And what they read of a run is what some page's command writes."""
    written, read = set(), set()
    for page in WRITTEN:
        folder = tmp_path / page.stem
        folder.mkdir()
        monkeypatch.chdir(folder)
        stages = [c for c in commands_of(page) if of_lightning(c) and "--config qwen3vl-4b" in c]
        written |= set(written_by(stages, capsys))
        read |= {run for command in stages for run in read_by(command)}
    assert "runs/qwen3vl-4b/filter" in read
    assert read <= written


def test_every_link_leads_somewhere():
    broken = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            broken += [] if (page.parent / link).exists() else [f"{page.name}: {link}"]
    assert broken == []
