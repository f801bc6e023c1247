"""Bring an answer or a truth into one plain spelling, before anything is compared.

Only spelling changes here, never meaning: delimiters of mathematics, typographic signs, LaTeX spacing, a preamble such
as "The answer is". What is left is what the rules of `accuracy` read.
"""

import re

_MINUS = "−‐‑‒–—﹣"
_FRACTIONS = {"½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8"}
_SUPERSCRIPTS = dict(zip("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+", strict=True))
_SIGNS = {"×": "\\times ", "·": "\\cdot ", "÷": "/", "π": "\\pi ", "√": "sqrt", "∞": "\\infty ", "±": "\\pm "} | {
    "≤": "\\le ", "≥": "\\ge ", "≠": "\\ne ", "μ": "µ", "º": "°", "∪": "\\cup ", "∈": "\\in ", "’": "'", "“": '"',
    "”": '"',
    "≈": "\\approx ", "∗": "*", "⋅": "\\cdot ", "∙": "\\cdot ",
}  # fmt: skip
_FULL_WIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)}
_TRANSLATION = _FULL_WIDTH | str.maketrans({**dict.fromkeys(_MINUS, "-"), **_SIGNS})

_PREAMBLE = re.compile(
    r"(?:(?:so|thus|therefore|hence),?\s+)?(?:the\s+)?(?:(?:final|correct|right|best)\s+)*"
    r"(?:answer|option|choice)\b\s*(?:is\b|:)?:?\s*(?=\S)",
    re.IGNORECASE,
)
_SPACE = re.compile(r"\s+")
_RULES: tuple[tuple[re.Pattern[str], str], ...] = tuple(
    (re.compile(pattern), new)
    for pattern, new in (
        (r"\\[()\[\]]", " "),
        # A closing dollar sign has no digit after it, an opening one of a price has: "$5 and $6" stays as it is.
        (r"(?<!\\)\$\$?([^$]*[^\s$])\s*\$\$?(?!\d)", r" \1 "),
        (r"\{,\}", ","),
        (r"\\!", ""),
        (r"\\[,;: ]|~|\\q?quad(?![a-zA-Z])", " "),
        (r"\\(?:left|right|[bB]igg?[lr]?)(?![a-zA-Z])\.?", ""),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\(?:text|mathrm|textbf|mathbf|textit|mbox|operatorname)\s*\{([^{}]*)\}", r" \1 "),
        (r"\^\s*(?:\\circ|\{\s*\\circ\s*\})|\\degrees?(?![a-zA-Z])", "°"),
        (r"\\%", "%"),
        (r"\\\$", "$"),
        (r"\\leq(?![a-zA-Z])", r"\\le "),
        (r"\\geq(?![a-zA-Z])", r"\\ge "),
        (r"\\neq(?![a-zA-Z])", r"\\ne "),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\s*\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"(?<![a-zA-Z\\])sqrt\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"(?<![a-zA-Z])\\?sqrt\s*(\d+(?:\.\d+)?|[a-zA-Z](?![a-zA-Z]))", r"\\sqrt{\1}"),
        (r"(?<![a-zA-Z\\])pi(?![a-zA-Z])", r"\\pi "),
        (r"(?<=\d)\s*:\s*(?=\d)", ":"),
        (r"\s+(?=[\^_])|(?<=[\^_])\s+", ""),
    )
)
_WRAPPERS = (("**", "**"), ("`", "`"), ('"', '"'), ("'", "'"), ("\\boxed{", "}"), ("\\fbox{", "}"))


def clean(text: str) -> str:
    """One plain spelling of `text`: white space folded, LaTeX spacing and delimiters gone, signs in ASCII or LaTeX.

    Example:
        >>> clean("The answer is $\\\\dfrac12$.")
        '\\\\frac{1}{2}'
    """
    for sign, plain in _FRACTIONS.items():
        # 1½ is one and a half, so the whole number must not run into the numerator.
        text = re.sub(rf"(?<=\d){sign}", f" {plain}", text).replace(sign, plain)
    text = re.sub(
        f"[{''.join(_SUPERSCRIPTS)}]+", lambda m: f"^{{{''.join(_SUPERSCRIPTS[c] for c in m.group())}}}", text
    )
    text = _peel(text.translate(_TRANSLATION))
    for pattern, new in _RULES:
        text = pattern.sub(new, text)
    return _peel(_PREAMBLE.sub("", _peel(text), count=1) if _PREAMBLE.match(_peel(text)) else text)


def _peel(text: str) -> str:
    """Fold white space, and take off what wraps the whole text: Markdown, quotes, a box, the trailing full stop."""
    text = _SPACE.sub(" ", text).strip()
    while True:
        before = text
        text = text.rstrip(". ") if text.strip(". ") else text
        for start, end in _WRAPPERS:
            inside = text[len(start) : -len(end)]
            if len(text) > len(start) + len(end) and text.startswith(start) and text.endswith(end):
                # "{1}+\\boxed{2}" or "'a' and 'b'" end like a wrapper without being one.
                balanced = _closes_at_end("{" + inside + "}") if end == "}" else end not in inside
                text = inside.strip() if balanced else text
        if text == before:
            return text


def _closes_at_end(text: str) -> bool:
    """Whether the bracket that opens `text` closes at its last character (braces only)."""
    depth = 0
    for index, char in enumerate(text):
        depth += (char == "{") - (char == "}")
        if depth == 0:
            return index == len(text) - 1
    return False
