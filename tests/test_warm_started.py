"""The shipped policies and the warm-started discriminator: their sizes, and what they can and cannot do."""

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from scipy.stats import binomtest

from datamodules.digits_rows import make_example
from datamodules.digits_scene import COLOURS, PLACES
from prism_pl.batch import Example
from prism_pl.chat import EXPERTS, parse, render
from prism_pl.discriminator import DedicatedMoEDiscriminator, score_texts
from prism_pl.evaluation import Judge
from prism_pl.policy import PolicySpec, build_policy
from prism_pl.rollout import TransformersEngine
from prism_pl.rollout.engine import Sampling

ASSETS = Path(__file__).parent.parent / "assets"
NUM_SCENES = 64
KINDS = {"digit": [str(d) for d in range(10)], "colour": list(COLOURS), "place": list(PLACES)}


@pytest.fixture(scope="module")
def discriminator() -> DedicatedMoEDiscriminator:
    return DedicatedMoEDiscriminator(str(ASSETS / "discriminator")).eval()


@pytest.fixture(scope="module")
def rows() -> list[Example]:
    """Validation scenes: handwriting that no stage has trained on."""
    return [make_example("validation", i, seed=0) for i in range(NUM_SCENES)]


def num_tokens(discriminator: DedicatedMoEDiscriminator, text: str) -> int:
    return len(discriminator.processor.response_ids(text))


def with_false_item(
    discriminator: DedicatedMoEDiscriminator, row: Example, kind: str, rng: np.random.Generator
) -> str | None:
    """The demonstration with one digit, colour or place of its caption replaced by another of as many tokens. Items
    stay in reading order, so that the text alone does not give it away; None where no such other is left."""
    truth = parse(str(row.response))
    scene = row.meta["scene"]
    at = int(rng.integers(len(scene)))
    item = scene[at]
    right = f"{item['colour']} {item['digit']} at {item['place']}"
    others = [other for other in KINDS[kind] if other != str(item[kind])]
    if kind == "place":
        cells = [-1, *(PLACES.index(each["place"]) for each in scene), len(PLACES)]
        others = [other for other in others if cells[at] < PLACES.index(other) < cells[at + 2]]
    wrong = [right.replace(str(item[kind]), other) for other in others]
    captions = [truth.caption.replace(f"- {right}", f"- {phrase}") for phrase in wrong]
    length = num_tokens(discriminator, truth.caption)
    alike = [caption for caption in captions if num_tokens(discriminator, caption) == length]
    return render(str(rng.choice(alike)), truth.reasoning, truth.answer) if alike else None


def test_false_captions_of_the_same_length_score_below_true_ones(discriminator, rows):
    rng = np.random.default_rng(0)
    prompts = [discriminator.processor.prompt(row) for row in rows]
    gaps = {}
    for kind in KINDS:
        false = {i: with_false_item(discriminator, row, kind, rng) for i, row in enumerate(rows)}
        pairs = [(i, str(rows[i].response), text) for i, text in false.items() if text is not None]
        which, truths, twins = zip(*pairs, strict=True)
        assert len(which) > NUM_SCENES / 2
        assert all(one != other for one, other in zip(truths, twins, strict=True))
        scores = score_texts(discriminator, prompts, [*truths, *twins], [*which] * 2)
        true_B, false_B = scores.by_expert["perception"].chunk(2)
        gaps[kind] = true_B - false_B
        print(f"{kind}: mean gap {gaps[kind].mean():.3f}, pairs right {(gaps[kind] > 0).float().mean():.3f}")
    pooled_B = torch.cat(list(gaps.values()))
    right = int((pooled_B > 0).sum())
    told = binomtest(right, len(pooled_B), alternative="greater")
    print(f"pooled: mean gap {pooled_B.mean():.3f}, pairs right {right}/{len(pooled_B)}, p = {told.pvalue:.1e}")
    assert float(pooled_B.mean()) > 0
    assert told.pvalue < 0.01


def test_same_text_with_other_sampled_ids_has_a_gap_of_exactly_zero(discriminator, rows):
    """A rollout may spell the demonstration's text with other ids, such as letter by letter: the discriminator reads
    the text."""
    processor = discriminator.processor
    prompts = [processor.prompt(row) for row in rows[:8]]
    canonical = [processor.response_ids(str(row.response))[:-1] for row in rows[:8]]
    sampled = [[i for letter in str(row.response) for i in processor.response_ids(letter)[:-1]] for row in rows[:8]]
    assert all(len(one) > len(other) for one, other in zip(sampled, canonical, strict=True))
    texts = [processor.decode(ids) for ids in [*canonical, *sampled]]
    assert texts[:8] == texts[8:]
    scores = score_texts(discriminator, prompts, texts, [*range(8)] * 2)
    for expert in EXPERTS:
        one_B, other_B = scores.by_expert[expert].chunk(2)
        assert torch.equal(one_B, other_B)
        assert one_B.isfinite().all()
        assert one_B.unique().numel() > 1


def test_demonstrations_score_above_rollouts_of_the_sft_policy_but_not_always(discriminator, rows):
    """The ceiling of the warm start: an accuracy near 1 would teach the policy nothing."""
    rollouts = responses("sft", rows, Sampling(temperature=1.0, max_tokens=112, seed=0))
    prompts = [discriminator.processor.prompt(row) for row in rows]
    texts = [*(str(row.response) for row in rows), *rollouts]
    scores = score_texts(discriminator, prompts, texts, [*range(NUM_SCENES)] * 2)
    valid_B = scores.valid_B[NUM_SCENES:]
    shares = []
    for expert in EXPERTS:
        chosen_B, rolled_B = scores.by_expert[expert].chunk(2)
        shares.append(float((chosen_B > rolled_B)[valid_B].float().mean()))
        print(f"{expert}: demonstrations above rollouts {shares[-1]:.3f} of {int(valid_B.sum())}")
    assert 0.6 < sum(shares) / len(shares) < 0.99


def test_the_shipped_discriminator_grew_from_the_shipped_sft_policy():
    """A judge of an earlier policy scores well enough to go unnoticed: its weights tell."""
    judge, policy = (load_file(ASSETS / name / "model.safetensors") for name in ("discriminator", "sft"))
    dense = {name: re.sub(r"\.mlp\.(perception|reasoning)\.", ".mlp.", f"model.{name}") for name in judge}
    shared = {name: policy[source].float() for name, source in dense.items()}
    assert set(dense.values()) == set(policy) - {"lm_head.weight"}
    moved = torch.stack([(judge[name].float() - weight).square().sum() for name, weight in shared.items()]).sum()
    size = torch.stack([weight.square().sum() for weight in shared.values()]).sum()
    assert (moved / size).sqrt() < 0.05


def responses(asset: str, rows: list[Example], sampling: Sampling) -> list[str]:
    """One response a row of a shipped policy."""
    spec = PolicySpec(str(ASSETS / asset))
    engine = TransformersEngine()
    engine.start(build_policy(spec).eval(), spec.processor(), rank=0)
    return [rollout.text for rollout in engine.generate(rows, 1, sampling)]


@pytest.mark.parametrize(
    ("asset", "formats", "lenient"), [("base", (0.0, 0.0), (0.7, 1.0)), ("sft", (0.9, 1.0), (0.65, 1.0))]
)
def test_base_answers_briefly_and_sft_in_the_three_blocks(asset, formats, lenient):
    rows = [make_example("test", i, seed=0) for i in range(64)]
    texts = responses(asset, rows, Sampling(temperature=0.0, max_tokens=160))
    judged = [Judge("bullets_or_sentences", None)(text, row, 1) for text, row in zip(texts, rows, strict=True)]
    shares = {name: sum(one[name] for one in judged) / len(judged) for name in ("valid", "lenient")}
    print(asset, shares)
    assert formats[0] <= shares["valid"] <= formats[1]
    assert lenient[0] < shares["lenient"] <= lenient[1]


@pytest.mark.parametrize("asset", ["base", "sft", "discriminator"])
def test_asset_is_small_and_holds_bfloat16_safetensors_and_nothing_else(asset):
    files = list((ASSETS / asset).iterdir())
    assert sum(file.stat().st_size for file in files) <= 8e6
    assert {file.suffix for file in files} <= {".json", ".jinja", ".safetensors"}
    weights = load_file(ASSETS / asset / "model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.bfloat16}
    assert all(bool(weight.isfinite().all()) for weight in weights.values())
