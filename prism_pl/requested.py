"""Which differences of two complete configurations someone asked for, and which another version of the code makes.

A complete configuration holds every option that the code had when it was read. An option that only one of two has is
new or gone in the code, unless it stands where a user may write any key (`dict_kwargs`, a mapping of columns). Which it
is today's code can tell: it fills a missing option in with its default, and refuses one that it does not know.
"""

import os
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any

from prism_pl.errors import UsageError
from prism_pl.fingerprint import ABSENT, Difference, compare

# A configuration as today's code reads it; UsageError where it does not know a key or one without a default is missing.
Complete = Callable[[dict[str, Any]], dict[str, Any]]


def requested(
    old: dict[str, Any], new: dict[str, Any], complete: Complete
) -> tuple[list[Difference], list[Difference]]:
    """The differences that someone asked for, and those of the code: options that `old` lacks and `new` has at their
    defaults, and options of `old` that today's code does not know.

    Args:
        old: as an earlier code read it.
        new: as today's code reads it.
        complete: how that reads a configuration.
    """
    found = [one for one in compare(old, new) if not _same_place(one)]
    gained = [one for one in found if one.old is ABSENT]
    lost = [one for one in found if one.new is ABSENT]
    if not _at_defaults(gained, new, complete):
        gained = [one for one in gained if _at_defaults([one], new, complete)]
    lost = [one for one in lost if _is_unknown(one, new, complete)]
    return [one for one in found if one not in gained and one not in lost], [*gained, *lost]


def _same_place(one: Difference) -> bool:
    """Whether two values are one path that exists, relative and absolute: a YAML's paths are made absolute, those of
    the command line stay as they are."""
    if not (isinstance(one.old, str) and isinstance(one.new, str) and os.path.exists(one.new)):
        return False
    return os.path.abspath(one.old) == os.path.abspath(one.new)


def _at_defaults(gained: Sequence[Difference], new: dict[str, Any], complete: Complete) -> bool:
    """Whether the code itself gives these options the values that they have."""
    if not gained:
        return True
    without = deepcopy(new)
    for one in gained:
        del _value(without, one.keys[:-1])[one.keys[-1]]
    completed = _read(without, complete)
    return all(_value(completed, one.keys) == one.new for one in gained)


def _is_unknown(lost: Difference, new: dict[str, Any], complete: Complete) -> bool:
    """Whether the code refuses an option, which it would take were it a user's own key."""
    with_it = deepcopy(new)
    _value(with_it, lost.keys[:-1])[lost.keys[-1]] = lost.old
    return _read(new, complete) is not None and _read(with_it, complete) is None


def _read(config: dict[str, Any], complete: Complete) -> dict[str, Any] | None:
    try:
        return complete(config)
    except UsageError:
        return None


def _value(config: Any, keys: Sequence[str | int]) -> Any:
    """What stands at these keys; ABSENT where nothing does."""
    for key in keys:
        inside: dict[Any, Any] = {}
        if isinstance(config, dict | list):
            inside = dict(enumerate(config)) if isinstance(config, list) else config
        if key not in inside:
            return ABSENT
        config = inside[key]
    return config
