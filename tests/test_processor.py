"""Special tokens spelled out in a response stay text: only a real image may ask for image features."""

from prism_pl.policy import PolicySpec


def test_special_tokens_in_a_response_are_tokenised_as_text(blank_policy):
    processor = PolicySpec(blank_policy).processor()
    ids = processor.response_ids("a <|image_pad|> and <|im_end|>")
    assert processor.image_token_id not in ids
    assert ids.count(processor.eos_id) == 1
    assert ids[-1] == processor.eos_id
    assert processor.decode(ids) == "a <|image_pad|> and <|im_end|>"
