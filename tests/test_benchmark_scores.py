"""Scores over several questions by hand, intervals, the average of benchmarks, a judge that turns verdicts."""

import asyncio
import json
import threading
from collections import Counter

import pytest
from aiohttp import web

from prism_pl.benchmarks.judge import Asked, JudgeModel, filled, read_verdict
from prism_pl.evaluation import PromptRecord, after_judge
from prism_pl.evaluation_tables import make_tables, unit_ratios
from prism_pl.metrics.bootstrap import average_interval
from prism_pl.metrics.unit_scores import loose, per_figure, per_pair, per_question, strict
from prism_pl.report.benchmarks import benchmarks
from prism_pl.report.comparisons import differences
from prism_pl.report.evaluations import Evaluation
from prism_pl.rollout.engine import Sampling
from tests.run_data import response
from tests.test_evaluate import BARE, RIGHT, WRONG, Rows, evaluate

TWO, THREE = ("2steps_1", "2steps_2", "2steps_multi"), ("3steps_1", "3steps_2", "3steps_3", "3steps_multi")
# Published definitions (We-Math, section 3.3): which steps are right, the whole -> strict, loose.
MASTERY = [
    (TWO, (1, 1, 1), 1.0, 1.0),  # complete mastery
    (TWO, (1, 0, 1), 0.0, 1.0),  # strict: rote memorisation; loose: mastery
    (TWO, (0, 0, 1), 0.0, 0.0),  # rote memorisation in both
    (TWO, (1, 1, 0), 0.5, 0.5),  # inadequate generalisation
    (TWO, (1, 0, 0), 0.0, 0.0),  # insufficient knowledge
    (THREE, (1, 1, 1, 1), 1.0, 1.0),
    (THREE, (0, 0, 1, 1), 0.0, 1.0),
    (THREE, (1, 1, 1, 0), 0.5, 0.5),
]


@pytest.mark.parametrize(("keys", "right", "of_strict", "of_loose"), MASTERY)
def test_wemath_mastery(keys, right, of_strict, of_loose):
    parts = dict(zip(keys, map(bool, right), strict=True))
    assert strict(parts) == (of_strict, 1)
    assert loose(parts) == (of_loose, 1)


def test_a_problem_that_a_limit_cut_in_two_counts_for_nothing():
    assert strict({"2steps_1": True, "2steps_multi": True}) == (0, 0)
    assert loose({"3steps_1": True, "3steps_2": True, "3steps_3": True}) == (0, 0)


def test_hallusionbench_by_question_figure_and_pair():
    # Two figures, two questions: figure 0 has both right; question 0 is right on both, question 1 on the first alone.
    parts = {"0/0": True, "0/1": True, "1/0": True, "1/1": False}
    assert per_question(parts) == (3, 4)
    assert per_figure(parts) == (1, 2)
    assert per_pair(parts) == (1, 2)
    # A question without its figure counts in pairs, and is no figure.
    assert per_figure({"-/0": True, "1/0": False}) == (0, 1)
    assert per_pair({"-/0": True, "1/0": False}) == (0, 1)


def prompt(unit: str, part: str, split: str, scores: list[str], *rights: bool) -> PromptRecord:
    return PromptRecord(
        id=f"{split}/{unit}/{part}",
        family="S1",
        split=split,
        question="?",
        answers=["A"],
        policy=[response(right) for right in rights],
        supervision=None,
        images=[],
        unit=unit,
        part=part,
        scores=scores,
    )


def problems(*rights: tuple[tuple[bool, ...], ...]) -> list[PromptRecord]:
    """We-Math problems of two steps; for each question the verdicts of its samples."""
    return [
        prompt(f"2steps_{n}", part, "wemath", ["strict", "loose"], *of_part)
        for n, of_problem in enumerate(rights)
        for part, of_part in zip(TWO, of_problem, strict=True)
    ]


def test_sample_g_of_each_question_makes_sample_g_of_the_problem():
    # Sample 0 is right everywhere, sample 1 in one step and the whole.
    records = problems(((True, True), (True, False), (True, True)))
    assert unit_ratios(records, "strict") == {"2steps_0": (1, 2)}
    assert unit_ratios(records, "loose") == {"2steps_0": (2, 2)}
    table = make_tables(records, [1], 50, 0)["wemath"]["all"]
    assert table["strict"]["mean"] == 0.5
    assert (table["strict"]["prompts"], table["strict"]["responses"]) == (3, 6)
    assert table["accuracy"]["mean"] == pytest.approx(5 / 6)
    assert "strict" not in make_tables(records, [1], 50, 0)["wemath"]["S1"]


def test_questions_of_a_unit_are_resampled_together():
    """Ten problems, all right or all wrong: as thirty prompts on their own the interval would be narrower."""
    yes, no = ((True,),) * 3, ((False,),) * 3
    records = problems(*[yes if n < 5 else no for n in range(10)])
    together = make_tables(records, [1], 2000, 0)["wemath"]["all"]
    alone = make_tables([{**r, "unit": r["id"], "scores": []} for r in records], [1], 2000, 0)["wemath"]["all"]
    for metric in ("accuracy", "pass_at_1"):
        assert together[metric]["mean"] == alone[metric]["mean"] == 0.5
        assert together[metric]["high"] - together[metric]["low"] > 1.5 * (alone[metric]["high"] - alone[metric]["low"])


def evaluation(name: str, records: list[PromptRecord]) -> Evaluation:
    return Evaluation(name, {"rule_in_words": "x"}, make_tables(records, [1], 200, 0), records)


def test_paired_differences_of_scores_over_several_questions():
    yes, step = ((True,), (True,), (True,)), ((True,), (False,), (True,))
    a, b = evaluation("a", problems(yes, yes)), evaluation("b", problems(yes, step))
    assert differences(a, b, "wemath")["strict"].mean == 0.5
    assert differences(a, b, "wemath")["loose"].mean == 0.0
    other = evaluation("other", problems(yes, yes)[:-1])
    with pytest.raises(ValueError, match="needs the same prompts on both sides"):
        differences(a, other, "wemath")


def test_average_of_benchmarks_counts_each_once():
    def plain(split: str, *rights: bool) -> list[PromptRecord]:
        return [prompt(str(n), "0/0", split, [], right) for n, right in enumerate(rights)]

    records = [
        *plain("mathvista", True, False),  # 50
        *plain("mmmu_pro_standard", True, True),  # 100, together with
        *plain("mmmu_pro_vision", False, False),  # 0: 50
        *problems(((True,), (True,), (False,)), ((False,),) * 3),  # strict (0.5 + 0) / 2 = 25
    ]
    better = [*plain("mathvista", True, True), *records[2:]]
    found = {"sft": evaluation("sft", records), "align": evaluation("align", better)}
    lines = benchmarks(found, [("align", "sft")], 200, 0)
    average = next(line for line in lines if line.startswith("| average |"))
    assert [cell.split(" [")[0] for cell in average.strip("| ").split(" | ")] == ["average", "41.7", "58.3"]
    assert next(line for line in lines if line.startswith("| align - sft")).startswith("| align - sft | +0.167 [")
    assert "wemath (strict)" in "\n".join(lines)
    assert benchmarks({"sft": evaluation("sft", plain("test", True))}, [], 200, 0) == []


def test_average_interval_weighs_independent_groups():
    point = average_interval([[(1, 1)] * 4, [(0, 1)] * 4], [3, 1], 100)
    assert point == (0.75, 0.75, 0.75, 8)
    spread = [[(1.0, 1.0), (0.0, 1.0)] * 50] * 2
    one, both = average_interval(spread[:1], [1], 4000), average_interval(spread, [1, 1], 4000)
    # The mean of two independent groups has 1 / sqrt(2) of the standard error of one.
    assert (both.high - both.low) / (one.high - one.low) == pytest.approx(0.5**0.5, abs=0.06)
    with pytest.raises(ValueError, match="1 groups and 2 weights"):
        average_interval(spread[:1], [1, 1])


@pytest.fixture
def endpoint():
    """An OpenAI-compatible server on this machine. `replies` maps a word of the prompt to what it says."""
    replies: dict[str, str] = {}
    seen: Counter[str] = Counter()

    async def chat(request: web.Request) -> web.Response:
        body = await request.json()
        prompt = body["messages"][0]["content"]
        seen[prompt.split("Candidate: ")[1].splitlines()[0]] += 1
        reply = next((reply for word, reply in replies.items() if word in prompt), "right")
        if reply == "fails":
            return web.Response(status=500, text="no memory")
        return web.json_response({"choices": [{"message": {"content": reply}}]})

    loop = asyncio.new_event_loop()
    app = web.Application()
    app.router.add_post("/v1/chat/completions", chat)
    runner = web.AppRunner(app)
    loop.run_until_complete(runner.setup())
    site = web.TCPSite(runner, "127.0.0.1", 0)
    loop.run_until_complete(site.start())
    thread = threading.Thread(target=loop.run_forever, daemon=True)
    thread.start()
    port = runner.addresses[0][1]
    yield f"http://127.0.0.1:{port}/v1", replies, seen
    asyncio.run_coroutine_threadsafe(runner.cleanup(), loop).result(5)
    loop.call_soon_threadsafe(loop.stop)
    thread.join(5)
    loop.close()


def test_a_judge_turns_verdicts_both_ways_and_its_share_is_told(random_policy, tmp_path, endpoint):
    url, replies, seen = endpoint
    # RIGHT says 10 and is right, WRONG says 9, BARE is malformed and says 10.
    replies |= {"Candidate: 10": "I think: wrong", "Candidate: 9": "right"}
    options = {"num_samples": 2, "pass_k": [1], "sampling": Sampling(temperature=1.0)}
    module = evaluate(
        tmp_path / "run", random_policy, [RIGHT, WRONG], Rows(), judge=JudgeModel(url, "judge"), **options
    )
    table = module.tables["test"]["all"]
    told = {name: table[name]["mean"] for name in ("accuracy", "judge_to_right", "judge_to_wrong", "judge_silent")}
    assert told == {"accuracy": 0.5, "judge_to_right": 0.5, "judge_to_wrong": 0.5, "judge_silent": 0.0}
    assert [r["judged"] for r in module.records[0]["policy"]] == ["to_wrong", "to_right"]
    assert [r["correct"] for r in module.records[0]["policy"]] == [False, True]
    assert seen["10"] == 4
    assert json.loads((tmp_path / "run" / "evaluation.json").read_text())["judge"] == {"url": url, "model": "judge"}


def test_a_judge_makes_no_malformed_response_correct(random_policy, tmp_path, endpoint):
    url, _, _ = endpoint
    module = evaluate(tmp_path / "run", random_policy, [BARE, BARE], Rows(), judge=JudgeModel(url, "judge"))
    table = module.tables["test"]["all"]
    assert table["accuracy"]["mean"] == 0.0
    assert table["lenient_accuracy"]["mean"] == 1.0


def test_without_a_verdict_the_rules_stands_and_is_counted(endpoint, caplog):
    url, replies, _ = endpoint
    replies |= {"Candidate: one": "fails", "Candidate: two": "perhaps"}
    judge = JudgeModel(url, "judge", retries=0)
    assert judge([Asked("q", "r", answer) for answer in ("one", "two", "three")]) == [None, None, True]
    assert "(status 500: no memory); the rule's verdict stands" in caplog.text
    assert after_judge(response(True), None)["judged"] == "silent"
    assert after_judge(response(True), None)["correct"] is True


def test_a_judge_that_is_not_there_stops_before_anything_is_sampled():
    judge = JudgeModel("http://127.0.0.1:9/v1", "judge", retries=0)
    with pytest.raises(ConnectionError, match=r"judge 'judge' at http://127\.0\.0\.1:9/v1.*JUDGE_API_KEY.*judge null"):
        judge.check()
    with pytest.raises(ValueError, match=r"judge\.prompt lacks \{answer\}"):
        JudgeModel("http://x", "judge", prompt="{question} {reference}")


def test_prompts_are_filled_in_one_pass_and_the_last_verdict_counts():
    assert filled("{question}|{answer}", Asked("{answer} {x}", "r", "a")) == "{answer} {x}|a"
    assert [read_verdict(text) for text in ("Right.", "not right but wrong", "upright", "")] == [
        True,
        False,
        None,
        None,
    ]


def test_a_verdict_counts_in_a_well_formed_response_alone():
    assert after_judge(response(False), True)["correct"] is True
    assert after_judge(response(False, valid=False), True)["correct"] is False
