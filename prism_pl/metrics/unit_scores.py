"""Scores of several questions at once: We-Math's strict and loose, HallusionBench's figures and pairs. Light.

Each is a sum over a sum, as every number of the tables: what a unit (a problem, a set of figures) adds to both.
"""

from collections.abc import Callable, Mapping

# Part of the unit, such as `2steps_multi`, or `1/0` for figure 1 and question 0 -> whether it was answered rightly.
Parts = Mapping[str, bool]
NO_FIGURE = "-"
UnitScore = Callable[[Parts], tuple[float, float]]


def strict(parts: Parts) -> tuple[float, float]:
    """We-Math's score of a problem where mastery asks for every step.

    1 where the whole and all steps are right; 0.5 where the steps are and the whole is not (inadequate generalisation);
    0 where the whole is right without one of its steps (rote memorisation), or neither is (insufficient knowledge).
    """
    return _mastery(parts, all)


def loose(parts: Parts) -> tuple[float, float]:
    """`strict`, but a right whole counts as mastered with any one of its steps."""
    return _mastery(parts, any)


def _mastery(parts: Parts, enough: Callable[[list[bool]], bool]) -> tuple[float, float]:
    whole = [right for part, right in parts.items() if part.endswith("_multi")]
    steps = [right for part, right in parts.items() if not part.endswith("_multi")]
    if len(whole) != 1 or not _complete(parts):
        return 0, 0
    if whole[0]:
        return float(enough(steps)), 1
    return (0.5 if all(steps) else 0.0), 1


def _complete(parts: Parts) -> bool:
    """Whether all questions of a problem were asked: a `limit` may cut one in two."""
    return all(len(parts) == int(part[0]) + 1 for part in parts)


def per_question(parts: Parts) -> tuple[float, float]:
    """aAcc: questions answered rightly."""
    return sum(parts.values()), len(parts)


def per_figure(parts: Parts) -> tuple[float, float]:
    """fAcc: figures all of whose questions are answered rightly; questions asked without their figure are left out."""
    return _all_right({part: right for part, right in parts.items() if not part.startswith(NO_FIGURE)}, 0)


def per_pair(parts: Parts) -> tuple[float, float]:
    """qAcc: questions answered rightly on every figure they are asked of."""
    return _all_right(parts, 1)


def _all_right(parts: Parts, key: int) -> tuple[float, float]:
    groups: dict[str, bool] = {}
    for part, right in parts.items():
        name = part.split("/")[key]
        groups[name] = groups.get(name, True) and right
    return sum(groups.values()), len(groups)


UNIT_SCORES: dict[str, UnitScore] = {
    "strict": strict,
    "loose": loose,
    "aAcc": per_question,
    "fAcc": per_figure,
    "qAcc": per_pair,
}
