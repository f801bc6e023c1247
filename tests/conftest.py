"""Shared fixtures: a blank tiny policy with random weights, made in milliseconds, and examples with real pixels."""

import os
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # before torch, as `python -m prism_pl` has it

import numpy as np
import pytest
import torch
from PIL import Image

from prism_pl.batch import Example
from prism_pl.chat import render
from scripts.blank_policy import ROOT, write_blank

DEMONSTRATION = render(
    "- red 3 at top left\n- blue 7 at centre", "1. the digits are 3 and 7\n2. 3 + 7 = 10\n3. so it is 10", "10"
)
SYSTEM = "Write <caption>, <think>, <answer>."


# Files that start processes or vLLM. They go first, so that the workers of `make test`, which take file after file, end
# together.
LONGEST = (
    *("pipeline_ranks", "resume", "pipeline_processes", "vllm_ranks", "vllm_server_weights", "configs", "bad_input"),
    "vllm_engine",
)


def pytest_collection_modifyitems(items):
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in LONGEST)


def pytest_terminal_summary(terminalreporter):
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties:
            terminalreporter.write_line(f"{report.nodeid} {name} {value}")


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)


@pytest.fixture
def without_vllm(monkeypatch):
    """`AutoEngine` takes the transformers engine: starting vLLM takes longer than most tests."""
    from prism_pl.rollout import vllm_compat

    monkeypatch.setattr(vllm_compat, "import_vllm", partial(missing, "left out in this test"))


def missing(reason: str) -> None:
    """A library that cannot be imported."""
    raise ImportError(reason)


@pytest.fixture(scope="session")
def blank_policy(tmp_path_factory) -> str:
    """A folder with tokenizer, processor and configuration of the tiny policy, without weights."""
    folder = tmp_path_factory.mktemp("policy") / "blank"
    words = "What is the sum of all digits? which largest green yellow purple orange bottom right user system assistant"
    write_blank(folder, [DEMONSTRATION, SYSTEM, words] * 20, ROOT / "configs" / "digits" / "architecture.json", 400)
    return str(folder)


@pytest.fixture(scope="session")
def random_policy(blank_policy, tmp_path_factory) -> str:
    """A folder with a whole tiny policy, random weights included."""
    from prism_pl.policy import PolicySpec, build_policy, save_policy

    torch.manual_seed(0)
    spec = PolicySpec(blank_policy, from_scratch=True)
    folder = tmp_path_factory.mktemp("policy") / "random"
    save_policy(build_policy(spec), spec.processor(), Path(folder))
    return str(folder)


@pytest.fixture(scope="session")
def ranks():
    """Trainings on one rank or several; what was run with the same options is not run again."""
    from tests.ranks import Ranks

    ranks = Ranks()
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def told_of(ranks, tmp_path_factory):
    """What an uninterrupted training tells, made once for each set of options."""
    told = {}

    def of(num_ranks, **options):
        key = repr((num_ranks, sorted(options.items())))
        if key not in told:
            folder = tmp_path_factory.mktemp("trained")
            told[key] = ranks(folder, num_ranks, **options) | {"folder": folder}
        return told[key]

    return of


def make_examples(num: int, *, width: int = 96) -> list[Example]:
    """Examples with noise images, questions of different lengths, and one demonstration."""
    generator = np.random.default_rng(0)
    return [
        Example(
            id=f"row-{i}",
            question="What is the sum of all digits?" + " largest" * (i % 3),
            images=[Image.fromarray(generator.integers(0, 255, (96, width, 3), dtype=np.uint8))],
            response=DEMONSTRATION,
            answers=["10"],
            system=SYSTEM,
        )
        for i in range(num)
    ]
