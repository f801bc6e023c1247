"""The process in which math-verify runs: one pair of expressions a line in, one verdict a line out, JSON both ways.

Started by `prism_pl.rewards.symbolic`, by path and with `-P`, so that nothing of this folder shadows the standard
library and neither torch nor prism_pl is imported. Its first argument is the CPU seconds one comparison may take: past
them the kernel ends this process, even inside one huge integer operation that no Python signal handler could interrupt.
It ends by itself when its standard input closes, so it cannot outlive the process that started it.
"""

import json
import logging
import os
import resource
import signal
import sys
from collections.abc import Callable

MEMORY_BYTES = 4 << 30


Comparer = Callable[[str, str, int | None], bool]


def _comparer() -> Comparer:
    """math-verify on text that is LaTeX as a whole: its search for a number inside prose finds `2` in `2\\sqrt{3}`."""
    from latex2sympy2_extended import NormalizationConfig
    from math_verify import LatexExtractionConfig, parse, verify

    as_is = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=False, nits=False, boxed="none", equations=False
    )
    latex = [LatexExtractionConfig(boxed_match_priority=-1, normalization_config=as_is)]

    def read(text: str) -> list:
        # Its own timeouts are off: an alarm that Python handles comes too late, the kernel's limit does not.
        return parse(f"${text}$", latex, fallback_mode="no_fallback", parsing_timeout=None)  # pyright: ignore[reportArgumentType]

    def equal(answer: str, truth: str, decimals: int | None) -> bool:
        gold, target = read(truth), read(answer)
        if not gold or not target:
            return False
        rounding = {} if decimals is None else {"float_rounding": decimals}
        # An inequality may answer an interval and the other way round.
        return verify(gold, target, allow_set_relation_comp=True, timeout_seconds=None, raise_on_error=True, **rounding)

    return equal


def _verdict(equal: Comparer, answer: str, truth: str, decimals: int | None) -> dict[str, bool | str]:
    try:
        return {"equal": equal(answer, truth, decimals)}
    except MemoryError:
        return {"equal": False, "error": "out of memory"}
    except Exception as error:  # sympy raises nearly anything on expressions it cannot compare; the parent logs it
        return {"equal": False, "error": f"{type(error).__name__}: {error}"[:200]}


def main() -> None:
    """Answer requests until standard input closes."""
    cpu_seconds = float(sys.argv[1])
    logging.disable(logging.WARNING)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if sys.platform == "linux":
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    # Whatever a library prints goes to stderr, so that the answers stay one JSON line each.
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    equal = _comparer()
    print("ready", file=replies, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        signal.setitimer(signal.ITIMER_PROF, cpu_seconds)
        verdict = _verdict(equal, request["answer"], request["truth"], request["decimals"])
        signal.setitimer(signal.ITIMER_PROF, 0)
        print(json.dumps(verdict), file=replies, flush=True)


if __name__ == "__main__":
    main()
