"""Special tokens spelled out in a response stay text: only a real image may ask for image features."""

from pathlib import Path

from prism_pl.chat import render
from prism_pl.policy import PolicySpec
from prism_pl.processor import Processor

ROOT = Path(__file__).parent.parent


def test_special_tokens_in_a_response_are_tokenised_as_text(blank_policy):
    processor = PolicySpec(blank_policy).processor()
    ids = processor.response_ids("a <|image_pad|> and <|im_end|>")
    assert processor.image_token_id not in ids
    assert ids.count(processor.eos_id) == 1
    assert ids[-1] == processor.eos_id
    assert processor.decode(ids) == "a <|image_pad|> and <|im_end|>"


def test_the_tiny_policys_tokenizer_joins_line_ends_to_what_stands_beside_them():
    tokenizer = Processor.from_path(str(ROOT / "assets" / "base")).tokenizer
    text = render("- 1 digit\n- red 3 at top left", "1. digits: 3\n2. the largest is 3", "3")
    pieces = [tokenizer.decode([i]) for i in tokenizer(text).input_ids]
    assert "".join(pieces) == text
    assert pieces[:4] == ["<caption>\n", "-", " 1", " digit"]
    assert pieces[4] == "\n-"
    assert pieces[10:14] == ["\n</caption>\n", "<think>\n", "1.", " digits:"]
    assert "\n2." in pieces
    assert tokenizer("system\nuser").input_ids == tokenizer.convert_tokens_to_ids(["system", "\u010a", "user"])
