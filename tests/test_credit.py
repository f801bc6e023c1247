"""Credit by segment: which tokens carry which expert's advantage."""

import pytest
import torch

from prism_pl.chat import render
from prism_pl.credit import check_credit, credited_advantages, num_caption_tokens, token_advantages
from prism_pl.policy import PolicySpec
from prism_pl.processor import Processor
from tests.conftest import DEMONSTRATION, make_examples
from tests.stubs import MALFORMED

OPTIONS = {"mixing": "released", "alpha": 0.5, "malformed_penalty": 1.5}


@pytest.fixture(scope="module")
def processor(blank_policy) -> Processor:
    return PolicySpec(blank_policy).processor()


def byte_by_byte(processor: Processor, text: str) -> list[int]:
    """A tokenisation that a policy may sample and the tokenizer never writes."""
    return [i for letter in text for i in processor.tokenizer(letter, add_special_tokens=False).input_ids]


def test_the_caption_ends_with_its_closing_tag_whatever_the_ids(processor):
    caption = DEMONSTRATION.partition("</caption>")[0] + "</caption>"
    for ids in (processor.response_ids(DEMONSTRATION), byte_by_byte(processor, DEMONSTRATION)):
        end = num_caption_tokens(processor, ids)
        assert caption in processor.decode(ids[:end])
        assert "</caption>" not in processor.decode(ids[: end - 1])
        assert "<think>" not in processor.decode(ids[:end])
    ids = processor.response_ids(MALFORMED)
    assert num_caption_tokens(processor, ids) == len(ids)
    assert num_caption_tokens(processor, []) == 0


def batch_of(processor: Processor, texts: list[str]):
    prompts = [processor.prompt(example) for example in make_examples(1)]
    return processor.sequences(prompts, [processor.response_ids(text) for text in texts], [0] * len(texts))


def test_tokens_carry_the_advantage_of_the_expert_that_reads_them(processor):
    batch = batch_of(processor, [DEMONSTRATION, MALFORMED, render("- red 3", "1. it is 3", "3")])
    by_expert = {"perception": torch.tensor([1.0, 2.0, 3.0]), "reasoning": torch.tensor([-1.0, 4.0, -3.0])}
    advantages_BT = token_advantages(processor, batch, by_expert, torch.tensor([True, False, True]))
    for row, (caption, reasoning) in enumerate([(1.0, -1.0), (3.0, 3.0), (3.0, -3.0)]):
        length = int(batch.mask_BT[row].sum())
        end = num_caption_tokens(processor, batch.response_ids_BT[row, :length].tolist())
        assert 0 < end <= length
        assert advantages_BT[row, :length].tolist() == [caption] * end + [reasoning] * (length - end)


def test_by_segment_the_mean_of_both_is_the_whole_responses_advantage(processor):
    batch = batch_of(processor, [DEMONSTRATION, render("- red 3", "1. it is 3", "3"), MALFORMED])
    scores = {"perception": torch.tensor([[0.5, 2.0, 9.0]]), "reasoning": torch.tensor([[4.0, 1.0, 9.0]])}
    valid = torch.tensor([[True, True, False]])
    whole_B, told = credited_advantages(scores, valid, batch, processor, credit="response", **OPTIONS)
    split_BT, also_told = credited_advantages(scores, valid, batch, processor, credit="segment", **OPTIONS)
    first_B, last_B = split_BT[:, 0], split_BT.gather(1, batch.mask_BT.sum(-1, keepdim=True) - 1).squeeze(1)
    torch.testing.assert_close((first_B + last_B) / 2, whole_B)
    assert float(first_B[0]) < 0 < float(last_B[0])
    assert float(first_B[2]) == float(last_B[2])
    assert told == also_told


def test_credit_by_segment_needs_both_experts():
    check_credit("response", ["response"])
    check_credit("segment", ["perception", "reasoning"])
    with pytest.raises(ValueError, match="credit is 'segment', and the discriminator's experts are response: it needs"):
        check_credit("segment", ["response"])
