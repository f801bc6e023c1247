"""The checks between sampler and trainer, one by one, without an engine."""

import re

import pytest
import torch

from prism_pl.rollout import Rollout
from prism_pl.rollout.contract import (
    StreamDigest,
    check_loaded,
    check_names,
    check_prompt_ids,
    check_rank_draws,
    check_rank_seeds,
    check_received,
    draw_prints,
)
from prism_pl.rollout.vllm_sync import buckets, weight_stream

IMAGE = 9


def test_a_prompt_that_was_expanded_twice_is_told_from_another_text():
    check_prompt_ids([1, 9, 9, 2], [1, 9, 9, 2], IMAGE, "row-0")
    with pytest.raises(ValueError, match=r"'row-0' has 4 image tokens in the engine and 2 in the trainer"):
        check_prompt_ids([1, 9, 9, 9, 9, 2], [1, 9, 9, 2], IMAGE, "row-0")
    with pytest.raises(ValueError, match=r"another prompt than the trainer for example 'row-0' \(4 and 4 tokens\)"):
        check_prompt_ids([1, 9, 9, 3], [1, 9, 9, 2], IMAGE, "row-0")


def stream():
    return [("a", torch.tensor([1.0, 2.0])), ("b", torch.tensor([[3.0]])), ("c", torch.zeros(2, dtype=torch.bfloat16))]


def digest(named) -> StreamDigest:
    watched = StreamDigest()
    assert len(list(watched.watch(named))) == len(named)
    return watched


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[:2], "3 tensors were sent to the engine and 2 arrived"),
        (lambda s: [s[1], s[0], s[2]], "tensor 0 of the weight sync, 'a', reached the engine with 'b' in its place"),
        (lambda s: [s[0], ("b", s[1][1] + 1e-6), s[2]], "'b', reached the engine with other values"),
        (lambda s: [("a", s[0][1].view(2, 1)), *s[1:]], "'a', reached the engine with other values"),
        (lambda s: [s[0], s[1], ("c", -s[2][1])], "'c', reached the engine with other values"),
    ],
)
def test_a_stream_that_changes_on_its_way_is_found_out(change, message):
    check_received(digest(stream()), digest(stream()))
    with pytest.raises(ValueError, match=re.escape(message)):
        check_received(digest(stream()), digest(change(stream())))


def test_names_are_compared_both_ways():
    expected = {"a": (2,), "b": (1, 1)}
    check_names(dict(expected), expected)
    with pytest.raises(ValueError, match=r"missing: \['b'\], unknown: \['x'\] \(1 and 1 in all\)"):
        check_names({"a": (2,), "x": (1,)}, expected)
    with pytest.raises(ValueError, match=r"'a' has the shape \(3,\) in a sync, and \(2,\) before"):
        check_names({"a": (3,), "b": (1, 1)}, expected)


def test_a_parameter_that_was_not_loaded_is_named():
    check_loaded({"q", "k", "extra"}, {"q", "k"})
    with pytest.raises(ValueError, match=r"1 parameters of the engine kept their old weights in a sync, e.g. 'k'"):
        check_loaded({"q"}, {"q", "k"})


def test_buckets_are_bounded_and_whole_only_while_they_are_open():
    named = [(str(i), torch.zeros(size)) for i, size in enumerate([2, 2, 9, 1, 1])]  # bytes: 8, 8, 36, 4, 4
    assert [[name for name, _ in bucket] for bucket in buckets(named, 16)] == [["0", "1"], ["2"], ["3", "4"]]
    opened = []

    class Gather:
        def __init__(self, tensors):
            self.size = sum(tensor.nbytes for tensor in tensors)

        def __enter__(self):
            opened.append(self.size)

        def __exit__(self, *_):
            opened.append(-self.size)

    seen = []
    for name, tensor in weight_stream(named, 16, Gather):
        seen.append((name, sum(opened)))
        assert not tensor.requires_grad
    assert seen == [("0", 16), ("1", 16), ("2", 36), ("3", 8), ("4", 8)]
    assert sum(opened) == 0


def test_engines_with_one_seed_are_refused_and_ranks_of_one_engine_share_theirs():
    check_rank_seeds([(1, 0), (1, 0), (1, 1), (1, 1)], groups=[0, 0, 1, 1])
    with pytest.raises(ValueError, match="engines 0 and 1 have the same seed"):
        check_rank_seeds([(1, 0), (1, 0)], groups=[0, 1])


def drawn(ids, logp):
    return draw_prints([Rollout([], each, [logp] * len(each), "", "stop") for each in ids])


def test_repeated_draws_stop_a_flat_run_and_are_counted_in_a_sharp_one():
    one, other = [[1, 2, 3], [4, 5, 6]], [[1, 2, 3], [7, 8, 9]]
    assert check_rank_draws([drawn(one, -11.0), drawn(other[::-1], -11.0)], groups=[0, 1]) == 0
    assert check_rank_draws([drawn(one, -0.1), drawn(other, -0.1)], groups=[0, 1]) == 0.5
    assert check_rank_draws([drawn(one, -11.0), drawn(one, -11.0)], groups=[0, 0]) == 0  # one engine
    with pytest.raises(ValueError, match=r"engines 0 and 1 drew the same response, of log-probability -33.0"):
        check_rank_draws([drawn(one, -11.0), drawn(other, -11.0)], groups=[0, 1])
