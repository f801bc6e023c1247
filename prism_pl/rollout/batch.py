"""From rollouts to the trainer's tensors, with the contract between sampler and trainer checked on the way."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prism_pl.batch import SequenceBatch
from prism_pl.processor import Processor, Prompt
from prism_pl.rollout.contract import check_prompt_ids
from prism_pl.rollout.engine import Rollout


def rollout_batch(
    processor: Processor, prompts: Sequence[Prompt], rollouts: Sequence[Rollout], num_samples: int
) -> tuple[SequenceBatch, Tensor]:
    """Put the rollouts of P prompts, prompt by prompt as an engine returns them, into one batch.

    Args:
        prompts: as the trainer encoded them.
        num_samples: rollouts a prompt (G).

    Returns:
        B = P * G sequences, and the engine's log-probabilities `sampler_logps_BT`, 0 where there is no token.

    Raises ValueError where the engine read another prompt than the trainer would: then its log-probabilities, and the
    rollouts themselves, are of another distribution.
    """
    assert len(rollouts) == len(prompts) * num_samples, (len(rollouts), len(prompts), num_samples)
    prompt_of = [b // num_samples for b in range(len(rollouts))]
    for p, rollout in zip(prompt_of, rollouts, strict=True):
        check_prompt_ids(rollout.prompt_ids, prompts[p].ids, processor.image_token_id, prompts[p].id)
        assert len(rollout.sampler_logps) == len(rollout.response_ids)
    batch = processor.sequences(prompts, [rollout.response_ids for rollout in rollouts], prompt_of)
    logps = [torch.tensor(rollout.sampler_logps, dtype=torch.float32) for rollout in rollouts]
    return batch, pad_sequence(logps, batch_first=True)
