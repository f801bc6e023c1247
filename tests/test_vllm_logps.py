"""Log-probabilities of vLLM's sampled tokens: the same values by a shorter way."""

import numpy as np
import pytest
import torch

vllm = pytest.importorskip("vllm")

from vllm.logprobs import FlatLogprobs  # noqa: E402
from vllm.v1.engine.logprobs import LogprobsProcessor  # noqa: E402
from vllm.v1.outputs import LogprobsLists  # noqa: E402
from vllm.v1.sample.sampler import Sampler  # noqa: E402

from prism_pl.rollout import vllm_compat  # noqa: E402
from prism_pl.rollout.vllm_logps import StepLists, StepLogps, sampled_logps_alone  # noqa: E402


def test_the_log_probabilities_of_a_step_are_those_that_vllm_finds():
    own = Sampler.gather_logprobs
    logps_BV, sampled_B = torch.randn(5, 11).log_softmax(-1), torch.tensor([3, 0, 10, 7, 3])
    with vllm_compat.eager(on_cpu=True):
        theirs = own(logps_BV, 0, token_ids=sampled_B)
    with sampled_logps_alone():
        ours = Sampler.gather_logprobs(logps_BV, 0, token_ids=sampled_B)
        with pytest.raises(AssertionError):
            Sampler.gather_logprobs(logps_BV, 2, token_ids=sampled_B)
    assert Sampler.gather_logprobs is own
    lists = ours.to_cpu_nonblocking().tolists()
    assert lists.logps == theirs.logprobs[:, 0].tolist() == logps_BV[range(5), sampled_B].tolist()
    for row in range(5):
        assert lists.slice_request(row, 1) == theirs.tolists().slice_request(row, 1).logprobs[:, 0].tolist()


def test_what_is_kept_of_a_token_is_its_log_probability_even_where_a_step_has_several():
    own = LogprobsProcessor._update_sample_logprobs
    request = LogprobsProcessor(None, FlatLogprobs(), None, 0.0, 0, None)
    with sampled_logps_alone():
        for step in ([-0.5], [-0.25, -2.0]):
            request._update_sample_logprobs(StepLists([-9.0, *step, -9.0]).slice_request(1, len(step)))
    assert request.logprobs.logprobs == [-0.5, -0.25, -2.0]
    assert LogprobsProcessor._update_sample_logprobs is own


def test_what_another_sampler_of_vllms_found_is_kept_the_same_way():
    request = LogprobsProcessor(None, FlatLogprobs(), None, 0.0, 0, None)
    with sampled_logps_alone():
        for step in ([[-0.5, -9.0]], [[-0.25, -9.0], [-2.0, -9.0]]):
            told = np.array(step, dtype=np.float32)
            lists = LogprobsLists(np.zeros_like(told), told, np.zeros(len(told)))
            request._update_sample_logprobs(lists.slice_request(0, len(step)))
    assert request.logprobs.logprobs == [-0.5, -0.25, -2.0]


def test_vllm_takes_it_for_something_there_even_of_no_sequence():
    none = StepLogps(torch.zeros(0))
    assert none
    assert none.tolists()


NOTE, GATHER = (LogprobsProcessor, "_update_sample_logprobs"), (Sampler, "gather_logprobs")


@pytest.mark.parametrize(("missing", "kept"), [(NOTE, GATHER), (GATHER, NOTE)])
def test_a_vllm_that_has_another_name_for_either_goes_on_by_itself(monkeypatch, missing, kept):
    own = getattr(*kept)
    monkeypatch.delattr(*missing)
    with sampled_logps_alone():
        assert not hasattr(*missing)
        assert getattr(*kept) is own
