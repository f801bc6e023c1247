"""The system prompt and the three-block response format: render, parse, split into segments.

A response is `<caption>`, `<think>` and `<answer>`, in this order, with only white space around and between them. The
perception segment is the caption block; the reasoning segment is the think block and the answer block (PRISM, section 2
of the release's prompt). This file is the only place that knows the format.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

SYSTEM_PROMPT = """You are a careful scientific assistant. Look at the image, then answer the user's question about it.
Write exactly three blocks, in this order, and nothing outside them:
<caption>
a bulleted description of the image: its style, its key objects, and any text in it
</caption>
<think>
your reasoning, one step at a time, from what the image shows to the answer
</think>
<answer>
the final answer only
</answer>"""

BLOCKS = ("caption", "think", "answer")
EXPERTS = ("perception", "reasoning")
WHOLE = ("response",)  # the only segment of a discriminator that reads the whole response, GAD's (arXiv 2511.10643)

_TAG = re.compile(r"</?(?:caption|think|answer)>")
_RESPONSE = re.compile(r"\s*<caption>(.*)</caption>\s*<think>(.*)</think>\s*<answer>(.*)</answer>\s*", re.DOTALL)
_WHITE_SPACE = re.compile(r"\s+")
_CONTROL = re.compile(r"<(?=\|[\w.-]+\|>)")
_BLANK = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # fillers that Unicode counts as letters or symbols


@dataclass(frozen=True)
class Parsed:
    """A response taken apart. `caption`, `reasoning` and `answer` are the stripped insides of the three blocks, or ""
    when the response is malformed (`valid` is False); `reason` then says what is wrong."""

    caption: str
    reasoning: str
    answer: str
    valid: bool
    reason: str = ""


def render(caption: str, reasoning: str, answer: str) -> str:
    """Write a response in the three-block format. `parse(render(c, r, a))` gives back the stripped parts."""
    return (
        f"<caption>\n{caption.strip()}\n</caption>\n"
        f"<think>\n{reasoning.strip()}\n</think>\n"
        f"<answer>\n{answer.strip()}\n</answer>"
    )


def parse(text: str) -> Parsed:
    """Take a response apart, strictly: every tag exactly once, in order, no block empty, nothing outside.

    Stricter than the release in two places: it accepts empty blocks, and tags repeated inside a block (which also lets
    the answer block swallow a second response). A block of nothing but invisible characters, such as a zero-width
    space, is empty too. Tags are case-sensitive.

    Example:
        >>> parse("<caption>- a red 3</caption> <think>1. read 3</think> <answer>3</answer>").answer
        '3'
    """
    reason = _malformed_reason(text)
    match = None if reason else _RESPONSE.fullmatch(text)
    if match is None:
        return Parsed("", "", "", False, reason or "text outside the three blocks")
    caption, reasoning, answer = (part.strip() for part in match.groups())
    for name, part in zip(BLOCKS, (caption, reasoning, answer), strict=True):
        if not _is_visible(part):
            return Parsed("", "", "", False, f"the <{name}> block is empty")
    return Parsed(caption, reasoning, answer, True)


def _malformed_reason(text: str) -> str:
    """What is wrong with the tags of `text`, or "" when each stands exactly once and in order."""
    found = _TAG.findall(text)
    expected = [tag for name in BLOCKS for tag in (f"<{name}>", f"</{name}>")]
    for tag in expected:
        if tag not in found:
            return f"{tag} is missing"
    for tag in expected:
        if found.count(tag) > 1:
            return f"{tag} stands {found.count(tag)} times"
    return "" if found == expected else "the blocks are out of order"


def _is_visible(text: str) -> bool:
    """Whether `text` holds a letter, digit, sign or symbol: white space (Unicode's Z), format and control characters
    (C) and marks without a letter (M) show nothing."""
    return any(unicodedata.category(char)[0] not in "ZCM" and char not in _BLANK for char in text)


def segments(parsed: Parsed, experts: Sequence[str] = EXPERTS) -> dict[str, str]:
    """The text each expert reads, tags included and white space normalised, so that neither the sampled tokenisation
    nor the white space between blocks can tell a rollout from a demonstration. Malformed responses have no segments:
    ValueError.

    Args:
        experts: of `EXPERTS` and `WHOLE`.
    """
    if not parsed.valid:
        raise ValueError(f"a malformed response has no segments: {parsed.reason}")
    blocks = (
        f"<{n}> {p} </{n}>" for n, p in zip(BLOCKS, (parsed.caption, parsed.reasoning, parsed.answer), strict=True)
    )
    caption, think, answer = (normalise(block) for block in blocks)
    reasoning = f"{think}\n{answer}"
    texts = {"perception": caption, "reasoning": reasoning, "response": f"{caption}\n{reasoning}"}
    return {expert: texts[expert] for expert in experts}


def block_spans(text: str) -> dict[str, tuple[int, int]]:
    """Where the three blocks stand in a well-formed response, tags included, in characters. What stands before the
    first block belongs to it, and what stands behind a block to that one, so that the spans are the whole text.
    ValueError for a malformed response."""
    reason = parse(text).reason
    if reason:
        raise ValueError(f"a malformed response has no blocks: {reason}")
    bounds = [0, *(text.index(f"<{name}>") for name in BLOCKS[1:]), len(text)]
    return {name: (start, stop) for name, start, stop in zip(BLOCKS, bounds, bounds[1:], strict=False)}


def normalise(text: str) -> str:
    """Fold every run of white space into one space, keeping line breaks apart from spaces: a line break is structure
    (one item a line), so runs that hold one become one line break."""
    return _WHITE_SPACE.sub(lambda run: "\n" if "\n" in run.group() else " ", text).strip()


def plain_text(text: str) -> str:
    """`text` with a zero-width space inside each control token that it spells out (`<|im_end|>` and its like), so that
    no tokenizer, ours or an engine's, takes it for one. It looks the same, and other text is returned unchanged."""
    return _CONTROL.sub("<\u200b", text)


def lenient_answer(text: str) -> str:
    """The answer wherever it stands, for scoring models that do not know the format: the last non-empty answer block,
    else the text after the last "answer is" or "answer:", else the last line that is not empty."""
    blocks = [block.strip() for block in re.findall(r"<answer>(.*?)</answer>", text, re.DOTALL)]
    blocks = [block for block in blocks if _is_visible(block)]
    if blocks:
        return blocks[-1]
    told = re.findall(r"answer(?: is|:)\s*([^\n]+)", text, re.IGNORECASE)
    if told:
        return told[-1].strip().rstrip(".")
    lines = [line.strip() for line in _TAG.sub("\n", text).splitlines() if line.strip()]
    return lines[-1].rstrip(".") if lines else ""
