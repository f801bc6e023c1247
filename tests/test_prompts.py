"""The collator of alignment, warm start and RLVR: what it encodes and which rows it refuses."""

from dataclasses import replace

import pytest
import torch

from prism_pl.policy import PolicySpec
from prism_pl.prompts import PromptCollator
from tests.conftest import make_examples


def test_a_missing_demonstration_or_answer_names_the_row(blank_policy):
    processor = PolicySpec(blank_policy).processor()
    bare = [make_examples(1)[0], replace(make_examples(2)[1], response=None, answers=[])]
    assert len(PromptCollator(processor)(bare)) == 2
    with pytest.raises(ValueError, match="'row-1' has no response"):
        PromptCollator(processor, need_demonstration=True)(bare)
    with pytest.raises(ValueError, match="'row-1' has no answers"):
        PromptCollator(processor, need_answers=True)(bare)


def test_prompts_are_encoded_twice_only_where_the_processors_differ(blank_policy):
    processor = PolicySpec(blank_policy).processor()
    batch = PromptCollator(processor, discriminator_processor=PolicySpec(blank_policy).processor())(make_examples(2))
    assert batch.discriminator_prompts is batch.prompts
    small = PolicySpec(blank_policy, max_pixels=64 * 64).processor()
    batch = PromptCollator(processor, discriminator_processor=small)(make_examples(2))
    # 96 x 96 pixels are 3 x 3 visual tokens, 64 x 64 are 2 x 2: five tokens fewer.
    assert len(batch.discriminator_prompts[0].ids) == len(batch.prompts[0].ids) - 5


def test_lightning_leaves_the_batch_where_it_is(blank_policy):
    from lightning.pytorch.utilities import move_data_to_device

    batch = PromptCollator(PolicySpec(blank_policy).processor())(make_examples(1))
    assert move_data_to_device(batch, torch.device("meta")) is batch
