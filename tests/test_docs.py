"""The documentation tells the truth: its links lead somewhere, and its commands of 4B parse in their order, which takes
less than running them as tests/test_docs_run.py does."""

import ast
import re

import pytest
import torch

from tests.told_commands import PAGES, ROOT, WRITTEN, blocks, commands_of, of_lightning, read_by, written_by


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


def test_every_part_to_write_has_code_and_a_command():
    """A class with nothing but a docstring shows nobody how to write one."""
    page = ROOT / "docs" / "your-parts.md"
    classes = [
        node for block in blocks(page, "python") for node in ast.parse(block).body if isinstance(node, ast.ClassDef)
    ]
    assert len(classes) == page.read_text().count("\n## ") == len(commands_of(page)) == 4
    for part, command in zip(classes, commands_of(page), strict=True):
        assert {"__call__", "forward", "is_right"} & {getattr(node, "name", "") for node in part.body}, part.name
        assert f"my_parts.{part.name}" in command


def test_the_loss_to_write_by_hand():
    parts = {}
    exec("\n".join(blocks(ROOT / "docs" / "your-parts.md", "python")), parts)
    loss, old = parts["MostlyPraise"](blame=0.25), torch.zeros(2, 3)
    mask, advantages = torch.tensor([[1, 1, 1], [1, 0, 0]]).bool(), torch.tensor([2.0, -4.0])
    # Ratios are 1: three tokens of -2, and one of 4 a quarter of which counts; by 4 tokens, or by 8.
    assert loss(old, old, advantages, mask)[0].item() == pytest.approx((3 * -2 + 1) / 4)
    halves = [loss(old[n : n + 1], old[n : n + 1], advantages[n : n + 1], mask[n : n + 1], 8)[0] for n in range(2)]
    assert sum(halves).item() == pytest.approx((3 * -2 + 1) / 8)


def test_every_link_leads_somewhere():
    broken = []
    for page in PAGES:
        for link in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
            broken += [] if (page.parent / link).exists() else [f"{page.name}: {link}"]
    assert broken == []
