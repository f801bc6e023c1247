"""Tables of an evaluation: every number with its 95% bootstrap interval over prompts, for each split and family.

Prompts that belong together (the steps of a We-Math problem, the questions about one set of figures) are resampled as
one: `PromptRecord.unit`.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Literal, TypedDict

from prism_pl.evaluation import SIDES, PromptRecord, ResponseRecord, Side, responses_of
from prism_pl.metrics.bootstrap import Interval, ratio_interval
from prism_pl.metrics.drift_bootstrap import distance_interval
from prism_pl.metrics.shares import CAPTION_SHARES, STEP_SHARES, Share, present_steps
from prism_pl.metrics.unit_scores import UNIT_SCORES

ALL_FAMILIES = "all"


class Entry(TypedDict):
    """One number of a table: value, bounds of its interval, and how many prompts and responses are behind it."""

    mean: float
    low: float
    high: float
    prompts: int
    responses: int


Table = dict[str, Entry]  # metric -> entry
Tables = dict[str, dict[str, Table]]  # split -> family -> table


Ratio = Callable[[ResponseRecord], tuple[float, float]]


def _of_caption(share: Share) -> Ratio:
    def ratio(record: ResponseRecord) -> tuple[float, float]:
        counts = record["caption"]
        return (0, 0) if counts is None else share({**counts, "valid": 1})

    return ratio


def _of_reasoning(share: Share) -> Ratio:
    def ratio(record: ResponseRecord) -> tuple[float, float]:
        counts = record["reasoning"]
        if counts is None:
            return 0, 0
        return share({**counts, "present": present_steps(counts["correct"], counts["expected"])})

    return ratio


def _mean_of(key: Literal["items", "steps"]) -> Ratio:
    def ratio(record: ResponseRecord) -> tuple[float, float]:
        count = record[key]
        return (0, 0) if count is None else (count, 1)

    return ratio


def _nll_of(block: str) -> Ratio:
    def ratio(record: ResponseRecord) -> tuple[float, float]:
        return record.get("nll", {}).get(block, (0, 0))

    return ratio


# Every number is a sum over a sum: what a response adds to both. (0, 0) leaves it out.
POLICY_RATIOS: dict[str, Ratio] = {
    "accuracy": lambda record: (record["correct"], 1),
    "lenient_accuracy": lambda record: (record["lenient"], 1),
    "format": lambda record: (record["valid"], 1),
    "truncated": lambda record: (record["truncated"], 1),
}
# Shares of what a judge model was asked: how it left the rule's verdicts.
JUDGE_RATIOS: dict[str, Ratio] = {
    "judge_to_right": lambda record: (record.get("judged") == "to_right", "judged" in record),
    "judge_to_wrong": lambda record: (record.get("judged") == "to_wrong", "judged" in record),
    "judge_silent": lambda record: (record.get("judged") == "silent", "judged" in record),
}
TEXT_RATIOS: dict[str, Ratio] = {
    "response_length": lambda record: (record["tokens"], 1),
    "descriptive_items": _mean_of("items"),
    "reasoning_steps": _mean_of("steps"),
}
SCENE_RATIOS: dict[str, Ratio] = {
    "caption_precision": _of_caption(CAPTION_SHARES["precision"]),
    "caption_recall": _of_caption(CAPTION_SHARES["recall"]),
    "caption_exact": _of_caption(CAPTION_SHARES["exact"]),
    "step_correctness": _of_reasoning(STEP_SHARES["right"]),
    "step_completeness": _of_reasoning(STEP_SHARES["present"]),
}
# Of the supervision's response under the policy: nats a token, where the drift meter measured them.
NLL_RATIOS: dict[str, Ratio] = {f"teacher_nll_{block}": _nll_of(block) for block in ("caption", "reasoning", "answer")}
RATIOS = POLICY_RATIOS | JUDGE_RATIOS | TEXT_RATIOS | SCENE_RATIOS | NLL_RATIOS
LENIENT = "lenient_"  # before a unit's score: by the answer wherever it stands
DISTANCES: dict[str, Literal["items", "steps", "tokens"]] = {
    "descriptive_items": "items",
    "reasoning_steps": "steps",
    "response_length": "tokens",
}


def prompt_ratio(record: PromptRecord, metric: str, side: Side = "policy") -> tuple[float, float]:
    """Numerator and denominator of a metric, summed over a prompt's responses of one side. The likelihood of the
    supervision's response is the supervision's, whatever side is named."""
    side = "supervision" if metric in NLL_RATIOS else side
    parts = [RATIOS[metric](response) for response in responses_of(record, side)]
    return sum(part[0] for part in parts), sum(part[1] for part in parts)


def is_unit_score(metric: str) -> bool:
    """Whether a metric is one over the questions of a unit."""
    return metric.removeprefix(LENIENT) in UNIT_SCORES


def unit_ratios(records: Iterable[PromptRecord], metric: str, side: Side = "policy") -> dict[str, tuple[float, float]]:
    """Unit -> numerator and denominator of a metric, summed over its prompts: what is resampled."""
    units: dict[str, list[PromptRecord]] = {}
    for record in records:
        units.setdefault(record.get("unit", record["id"]), []).append(record)
    if is_unit_score(metric):
        return {unit: _unit_score(rows, metric) for unit, rows in units.items()}
    pairs = {unit: [prompt_ratio(record, metric, side) for record in rows] for unit, rows in units.items()}
    return {unit: (sum(p[0] for p in of_unit), sum(p[1] for p in of_unit)) for unit, of_unit in pairs.items()}


def _unit_score(records: Sequence[PromptRecord], metric: str) -> tuple[float, float]:
    """A unit's score, summed over its samples: sample g of each question stands with sample g of the others."""
    score = UNIT_SCORES[metric.removeprefix(LENIENT)]
    key: Literal["lenient", "correct"] = "lenient" if metric.startswith(LENIENT) else "correct"
    rows = [record for record in records if metric.removeprefix(LENIENT) in record.get("scores", ())]
    samples = min((len(record["policy"]) for record in rows), default=0)
    parts = [score({r.get("part", ""): r["policy"][g][key] for r in rows}) for g in range(samples)]
    return sum(part[0] for part in parts), sum(part[1] for part in parts)


def prompt_counts(records: Iterable[PromptRecord], metric: str, side: Side) -> dict[str, list[int]]:
    """Prompt id -> counts of one side's responses, for the distance named `metric`. Malformed responses have no items
    and steps, and are left out there; every response has a length.
    Only prompts whose supervision has a count, so that both sides are about the same prompts."""
    key = DISTANCES[metric]
    counts: dict[str, list[int]] = {}
    for record in records:
        supervision = record["supervision"]
        if supervision is not None and supervision[key] is not None:
            found = [response[key] for response in responses_of(record, side)]
            counts[record["id"]] = [count for count in found if count is not None]
    return counts


def make_tables(records: Sequence[PromptRecord], pass_k: Sequence[int], num_resamples: int, seed: int) -> Tables:
    """A table for each split and family of the records, and for all families of a split together."""
    tables: Tables = {}
    for split in dict.fromkeys(record["split"] for record in records):
        rows = [record for record in records if record["split"] == split]
        families = sorted({record["family"] for record in rows})
        groups = {ALL_FAMILIES: rows} | {f: [record for record in rows if record["family"] == f] for f in families}
        tables[split] = {name: make_table(group, pass_k, num_resamples, seed) for name, group in groups.items()}
        # A family holds pieces of units, so their scores are those of the whole split.
        for score in dict.fromkeys(name for record in rows for name in record.get("scores", ())):
            for metric in (score, LENIENT + score):
                tables[split][ALL_FAMILIES][metric] = _ratio_entry(rows, metric, "policy", num_resamples, seed)
    return tables


def make_table(records: Sequence[PromptRecord], pass_k: Sequence[int], num_resamples: int, seed: int) -> Table:
    """All numbers of a group of prompts, each with its 95% interval over prompts."""
    table: Table = {}
    judged = any("judged" in response for record in records for response in record["policy"])
    for metric in POLICY_RATIOS | JUDGE_RATIOS if judged else POLICY_RATIOS:
        table[metric] = _ratio_entry(records, metric, "policy", num_resamples, seed)
    for k in pass_k:
        table[f"pass_at_{k}"] = _pass_entry(records, k, num_resamples, seed)
    scenes_known = any(r["caption"] for record in records for side in SIDES for r in responses_of(record, side))
    for side in SIDES:
        rows = [record for record in records if responses_of(record, side)]
        for metric in (TEXT_RATIOS | SCENE_RATIOS if scenes_known else TEXT_RATIOS) if rows else ():
            table[f"{metric}/{side}"] = _ratio_entry(rows, metric, side, num_resamples, seed)
    measured = [r for r in records if r["supervision"] is not None and "nll" in r["supervision"]]
    for metric in NLL_RATIOS if measured else ():
        table[metric] = _ratio_entry(measured, metric, "supervision", num_resamples, seed)
    for metric in DISTANCES:
        policy = prompt_counts(records, metric, "policy")
        if policy:
            supervision = prompt_counts(records, metric, "supervision")
            interval = distance_interval(policy, supervision, num_resamples, seed=seed)
            table[f"{metric}/distance"] = make_entry(interval, sum(map(len, policy.values())))
    return table


def _ratio_entry(records: Sequence[PromptRecord], metric: str, side: Side, num_resamples: int, seed: int) -> Entry:
    counted = [
        is_unit_score(metric) or RATIOS[metric](response)[1] > 0
        for record in records
        for response in responses_of(record, side)
    ]
    interval = _interval(unit_ratios(records, metric, side), num_resamples, seed)
    return make_entry(interval, sum(counted), len(records))


def _interval(ratios: Mapping[str, tuple[float, float]], num_resamples: int, seed: int) -> Interval:
    return ratio_interval([r[0] for r in ratios.values()], [r[1] for r in ratios.values()], num_resamples, seed=seed)


def _pass_entry(records: Sequence[PromptRecord], k: int, num_resamples: int, seed: int) -> Entry:
    import torch

    from prism_pl.metrics.passk import pass_at_k

    correct_PG = torch.tensor([[response["correct"] for response in record["policy"]] for record in records])
    ratios: dict[str, tuple[float, float]] = {}
    for record, estimate in zip(records, pass_at_k(correct_PG, k).tolist(), strict=True):
        unit = record.get("unit", record["id"])
        total, count = ratios.get(unit, (0.0, 0))
        ratios[unit] = (total + estimate, count + 1)
    return make_entry(_interval(ratios, num_resamples, seed), correct_PG.numel(), len(records))


def make_entry(interval: Interval, responses: int, prompts: int | None = None) -> Entry:
    """An interval and how many responses are behind it; `prompts` where they were resampled in units."""
    num_prompts = interval.n if prompts is None else prompts
    return Entry(mean=interval.mean, low=interval.low, high=interval.high, prompts=num_prompts, responses=responses)
