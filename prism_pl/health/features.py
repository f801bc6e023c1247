"""What a segment looks like apart from what it says: its length, and its surface.

Everything here is read off the text alone. Neither sees the image or a number's value, so whoever tells demonstrations
from rollouts by these features has not looked at content.
"""

import math
import re
import zlib
from collections import Counter
from collections.abc import Callable

NUM_BUCKETS = 128
# Words, runs of digits, single marks. Case is kept: it is style.
_TOKEN = re.compile(r"[^\W\d_]+|\d+|[^\w\s]|_")
_FIRST = re.compile(rf"^[^\S\n]*({_TOKEN.pattern})", re.MULTILINE)
_TYPICAL = math.log1p(400)  # characters, from where a segment is short or long


def length_features(text: str) -> list[float]:
    """Logarithms of the numbers of characters and words; the square of the first lets a medium length stand out."""
    characters = math.log1p(len(text)) - _TYPICAL
    return [characters, characters**2, math.log1p(len(text.split()))]


def surface_features(text: str) -> list[float]:
    """How it is written, as shares, so that a text and the same text twice are alike: capitals, digits, marks and signs
    outside ASCII among the characters, the mean length of words, and the square roots of the token frequencies, hashed
    into `NUM_BUCKETS`. A number counts as one token whatever its value; the first token of a line has a bucket of its
    own, so bullets, numbered steps and stock phrases are seen."""
    characters = Counter(text)

    def share(is_one: Callable[[str], bool]) -> float:
        return sum(count for c, count in characters.items() if is_one(c)) / max(1, len(text))

    shares = [share(str.isupper), share(str.isdigit), share(_is_mark), share(lambda c: not c.isascii())]
    words = text.split()
    mean_length = sum(map(len, words)) / max(1, len(words))
    return [*shares, math.log1p(mean_length), *_frequencies(text)]


def _is_mark(character: str) -> bool:
    return not (character.isalnum() or character.isspace())


def _frequencies(text: str) -> list[float]:
    counts: Counter[str] = Counter()
    for place, tokens in (("", _TOKEN.findall(text)), ("^", _FIRST.findall(text))):
        for token, count in Counter(tokens).items():
            counts[place + ("0" if token[0].isdigit() else token)] += count
    buckets = [0] * NUM_BUCKETS
    for token, count in counts.items():
        buckets[zlib.crc32(token.encode()) % NUM_BUCKETS] += count  # Python's own hash differs from start to start
    total = max(1, counts.total())
    # Roots bring a word said once among a hundred to the size of the other features.
    return [math.sqrt(count / total) for count in buckets]


# What each shadow sees.
SHADOWS: dict[str, Callable[[str], list[float]]] = {"length": length_features, "surface": surface_features}
