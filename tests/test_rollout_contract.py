"""The checks between sampler and trainer, one by one, without an engine."""

import re

import pytest
import torch

from prism_pl.policy import PolicySpec, build_policy
from prism_pl.rollout import Rollout
from prism_pl.rollout.bucket import Bucket, cut
from prism_pl.rollout.contract import (
    StreamDigest,
    check_complete,
    check_loaded,
    check_name,
    check_prompt_ids,
    check_rank_draws,
    check_rank_seeds,
    check_received,
    draw_prints,
)
from prism_pl.rollout.copy_plan import unpacked
from prism_pl.rollout.probe import Probe
from prism_pl.rollout.vllm_sync import WeightSender, checked, packed
from tests.conftest import make_examples

IMAGE = 9


def test_a_prompt_that_was_expanded_twice_is_told_from_another_text():
    check_prompt_ids([1, 9, 9, 2], [1, 9, 9, 2], IMAGE, "row-0")
    with pytest.raises(ValueError, match=r"'row-0' has 4 image tokens in the engine and 2 in the trainer"):
        check_prompt_ids([1, 9, 9, 9, 9, 2], [1, 9, 9, 2], IMAGE, "row-0")
    with pytest.raises(ValueError, match=r"another prompt than the trainer for example 'row-0' \(4 and 4 tokens\)"):
        check_prompt_ids([1, 9, 9, 3], [1, 9, 9, 2], IMAGE, "row-0")


def stream():
    return [("a", torch.tensor([1.0, 2.0])), ("b", torch.tensor([[3.0]])), ("c", torch.zeros(2))]


def digest(named) -> StreamDigest:
    watched = StreamDigest()
    for name, tensor in named:
        watched.add(Bucket.pack([(name, tensor)], torch.float32))
    return watched


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s[:2], "sent to the engine in 3 parts and 2 arrived"),
        (lambda s: [s[1], s[0], s[2]], "from 'a' to 'a' reached the engine with other names or shapes"),
        (lambda s: [s[0], ("b", s[1][1] + 1e-6), s[2]], "from 'b' to 'b' reached the engine with other values"),
        (
            lambda s: [("a", s[0][1].view(2, 1)), *s[1:]],
            "from 'a' to 'a' reached the engine with other names or shapes",
        ),
        (lambda s: [s[0], s[1], ("c", -s[2][1])], "from 'c' to 'c' reached the engine with other values"),
    ],
)
def test_a_stream_that_changes_on_its_way_is_found_out(change, message):
    check_received(digest(stream()), digest(stream()))
    with pytest.raises(ValueError, match=re.escape(message)):
        check_received(digest(stream()), digest(change(stream())))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_bucket_gives_back_what_was_packed(dtype):
    named = [(str(i), torch.randn(shape)) for i, shape in enumerate([(3,), (2, 5), (), (1, 1, 7)])]
    bucket = Bucket.pack(named, dtype)
    assert bucket.flat.nbytes % 8 == 0
    for (name, view), (expected, tensor) in zip(bucket.named(), named, strict=True):
        assert name == expected
        torch.testing.assert_close(view, tensor.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_no_checksum_depends_on_what_was_in_memory_before(dtype, monkeypatch):
    named = [(str(i), torch.randn(shape)) for i, shape in enumerate([(3,), (4, 2), (), (1, 1, 7), (9,)])]
    sums = set()
    for before in (0.0, 1.0, torch.nan):
        monkeypatch.setattr(torch, "empty", lambda *size, _before=before, **where: torch.full(size, _before, **where))
        sums.add(int(Bucket.pack(named, dtype).bits()))
        monkeypatch.undo()
    assert len(sums) == 1


def test_what_is_overwritten_on_its_way_is_found_out():
    named = [(str(i), torch.ones(4)) for i in range(3)]
    for spoil, found in ((False, False), (True, True)):
        sent, received = StreamDigest(), StreamDigest()
        for name, tensor in unpacked(packed(named, torch.float32, 32, sent), received):
            if spoil and name == "1":
                tensor[0] = 2.0
        if not found:
            check_received(sent, received)
            continue
        with pytest.raises(ValueError, match="from '0' to '1' reached the engine with other values"):
            check_received(sent, received)


def test_values_that_changed_places_are_found_out():
    values = torch.randn(64, 128)
    whole = Bucket.pack([("a", values)], torch.float32).bits()
    for other in (values.flip(0), values.flip(1), values.T.reshape(64, 128), values.roll(2)):
        assert Bucket.pack([("a", other)], torch.float32).bits() != whole
    assert Bucket.pack([("a", values.clone())], torch.float32).bits() == whole


def test_names_are_compared_both_ways():
    expected = {"a": (2,), "b": (1, 1)}
    check_name("a", (2,), expected, set())
    with pytest.raises(ValueError, match="a sync sends 'x', which the policy did not have"):
        check_name("x", (1,), expected, set())
    with pytest.raises(ValueError, match=r"'a' has the shape \(3,\) in a sync, and \(2,\) before"):
        check_name("a", (3,), expected, set())
    with pytest.raises(ValueError, match="a sync sends 'a' twice"):
        check_name("a", (2,), expected, {"a"})
    check_complete({"a", "b"}, expected)
    with pytest.raises(ValueError, match="1 are missing: b"):
        check_complete({"a"}, expected)


def test_a_sync_sends_each_parameter_in_its_shape(random_policy):
    policy = build_policy(PolicySpec(random_policy))
    named = list(policy.named_parameters())
    loaded = []

    def load(buckets, received):
        loaded.extend(unpacked(buckets, received))
        return {name for name, _ in named}

    for sent, message in (
        (named[1:], "1 are missing: model.visual.patch_embed"),
        ([*named, ("lm_head.weight", named[0][1])], "sends 'lm_head.weight', which the policy did not have"),
        ([(named[0][0], named[0][1][:1]), *named[1:]], "has the shape"),
    ):
        sender = WeightSender(policy)
        with pytest.raises(ValueError, match=message):
            sender._transfer(checked(sent, sender.expected), load)
    loaded.clear()
    sender._transfer(checked(named, sender.expected), load)
    assert [name for name, _ in loaded] == [name for name, _ in named]
    assert all(torch.equal(tensor, parameter) for (_, tensor), (_, parameter) in zip(loaded, named, strict=True))


def test_a_parameter_that_was_not_loaded_is_named():
    check_loaded({"q", "k", "extra"}, {"q", "k"})
    with pytest.raises(ValueError, match=r"1 parameters of the engine kept their old weights in a sync, e.g. 'k'"):
        check_loaded({"q"}, {"q", "k"})


def test_buckets_are_bounded_and_whole_only_while_they_are_packed():
    named = [(str(i), torch.full((size,), float(i))) for i, size in enumerate([2, 2, 9, 1, 1])]
    assert [[name for name, _ in part] for part in cut(named, 4)] == [["0", "1"], ["2"], ["3", "4"]]
    opened, most = [], []

    class Gather:
        def __init__(self, tensors):
            self.size = sum(tensor.numel() for tensor in tensors)

        def __enter__(self):
            opened.append(self.size)
            most.append(sum(opened))

        def __exit__(self, *_):
            opened.append(-self.size)

    seen = []
    for name, tensor in unpacked(packed(named, torch.float32, 16, StreamDigest(), Gather), StreamDigest()):
        seen.append(name)
        assert not tensor.requires_grad
        assert tensor.eq(float(name)).all()
        assert sum(opened) == 0  # a bucket is a copy: nothing needs to stay whole while the engine loads it
    assert seen == ["0", "1", "2", "3", "4"]
    assert most == [4, 9, 2]


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


def probed(dtype, *checks) -> Probe:
    probe = Probe(dtype)
    probe.remember(make_examples(1))
    for differences in checks:
        probe.judge(torch.tensor(differences), "cpu")
    return probe


def test_a_probe_in_bf16_bounds_the_mean_by_the_runs_own_noise():
    lucky, worst = [0.001, 0.0005, 0.001, 0.0], [0.02, 0.1, 0.08, 0.05]  # prompts of one policy differ as much
    probe = probed(torch.bfloat16, lucky, worst, [0.3, 0.01, 0.02, 0.01])
    with pytest.raises(ValueError, match=r"are 0\.16 on the average from .* \(rounding explains 0\.15\)"):
        probe.judge(torch.full((4,), 0.16), "cpu")
    noisy = probed(torch.bfloat16, [0.05] * 4, [0.19] * 4)
    assert probed(torch.bfloat16, [0.2] * 4).mean_bound == 0.25
    for probe in (probed(torch.bfloat16), noisy):
        with pytest.raises(ValueError, match=r"are 0\.26 on the average"):
            probe.judge(torch.full((4,), 0.26), "cpu")
    with pytest.raises(ValueError, match=r"are 0\.55 from .* \(rounding explains 0\.5\)"):
        probed(torch.bfloat16, [0.55, 0.0, 0.0, 0.0])
    with pytest.raises(ValueError, match="are nan from"):
        probed(torch.bfloat16, [float("nan")])


def test_a_probe_in_float32_bounds_every_token():
    with pytest.raises(ValueError, match=r"are 0\.002 from .* \(rounding explains 0\.001\)"):
        probed(torch.float32, [0.0005, 0.0], [0.002, 0.0])
