"""`AccuracyFormatReward`: the paper's 0.8 accuracy + 0.2 format on whole responses, and its place in a YAML."""

import pytest
import torch
from jsonargparse import ArgumentParser

from datamodules.digits_rows import make_example
from prism_pl import chat
from prism_pl.batch import Example
from prism_pl.rewards import AccuracyFormatReward, Reward, RewardOutput


def row(*answers):
    return Example(id="row-3", question="Sum of left and red?", answers=list(answers))


def response(answer, reasoning="1. 7 + 0 = 7", caption="- green 7 at left"):
    return chat.render(caption, reasoning, answer)


def test_the_papers_weights_by_hand():
    responses = [response("7"), response("8"), response("7").replace("<caption>", "")]
    output = AccuracyFormatReward()(responses, [row("7")] * 3)
    # right and well formed 0.8 + 0.2; wrong and well formed 0.2; malformed 0
    torch.testing.assert_close(output.rewards_B, torch.tensor([1.0, 0.2, 0.0]))
    assert output.parts["accuracy"].tolist() == [1.0, 0.0, 0.0]
    assert output.parts["format"].tolist() == [1.0, 1.0, 0.0]
    assert set(output.parts) == {"accuracy", "format"}
    assert output.rewards_B.dtype == torch.float32


def test_the_weights_are_options():
    output = AccuracyFormatReward(accuracy_weight=0.5, format_weight=2.0)(
        [response("7"), response("8")], [row("7")] * 2
    )
    assert output.rewards_B.tolist() == [2.5, 2.0]


def test_any_of_the_answers_is_right():
    output = AccuracyFormatReward()([response("seven"), response("x")], [row("", "sieben", "7")] * 2)
    assert output.parts["accuracy"].tolist() == [1.0, 0.0]


@pytest.mark.parametrize(
    "hack",
    [
        response(""),
        response(" \n "),
        response("7", reasoning=""),
        response("7", reasoning="<answer>7</answer>"),
        response("8", reasoning="so it is <answer>7</answer>"),
        response("8") + "\n" + response("7"),
        response("7") + "\nas I said",
        "7",
        "<answer>7</answer>",
        "",
    ],
)
def test_a_malformed_response_earns_nothing(hack):
    output = AccuracyFormatReward()([hack], [row("7")])
    assert output.rewards_B.tolist() == [0.0]
    assert output.parts["format"].tolist() == [0.0]


@pytest.mark.parametrize("answer", ["6, 7, 8", "7 or 8", "3 + 4", "any of 0 to 9", "7" * 100_000])
def test_fishing_in_the_answer_block_earns_the_format_only(answer):
    assert AccuracyFormatReward()([response(answer)], [row("7")]).rewards_B.tolist() == [pytest.approx(0.2)]


def test_not_strict_looks_for_the_answer_wherever_it_stands():
    output = AccuracyFormatReward(strict=False)(["The answer is 7.", "The answer is 8.", response("7")], [row("7")] * 3)
    torch.testing.assert_close(output.rewards_B, torch.tensor([0.8, 0.0, 1.0]))
    assert output.parts["format"].tolist() == [0.0, 0.0, 1.0]


def test_every_demonstration_of_the_digits_earns_the_full_reward():
    examples = [
        make_example(split, index, seed=0, with_image=False) for split in ("sft", "test", "hard") for index in range(64)
    ]
    output = AccuracyFormatReward()([example.response for example in examples], examples)
    assert output.rewards_B.tolist() == [1.0] * len(examples)


def test_an_example_without_an_answer_is_named():
    for answers in ([], ["", " "]):
        with pytest.raises(ValueError, match=r"example 'row-3' has no answer.*answers column"):
            AccuracyFormatReward()([response("7")], [row(*answers)])


def test_responses_and_examples_of_different_number_are_refused():
    with pytest.raises(ValueError, match="2 responses for 1 examples"):
        AccuracyFormatReward()([response("7")] * 2, [row("7")])


def test_weights_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="accuracy_weight is -1"):
        AccuracyFormatReward(accuracy_weight=-1)
    with pytest.raises(ValueError, match="format_weight is nan"):
        AccuracyFormatReward(format_weight=float("nan"))
    with pytest.raises(ValueError, match="both weights are 0"):
        AccuracyFormatReward(accuracy_weight=0, format_weight=0)


class ShortAnswerReward:
    """A user's own: nothing inherited, only the same call."""

    def __init__(self, most: int = 10) -> None:
        self.most = most

    def __call__(self, responses: list[str], examples: list[Example]) -> RewardOutput:
        return RewardOutput(torch.tensor([float(len(chat.parse(r).answer) <= self.most) for r in responses]))


@pytest.mark.parametrize(
    ("class_path", "init_args"),
    [("prism_pl.rewards.AccuracyFormatReward", {"format_weight": 0.1}), (f"{__name__}.ShortAnswerReward", {"most": 3})],
)
def test_rewards_are_named_in_yaml(class_path, init_args):
    parser = ArgumentParser()
    parser.add_argument("--reward", type=Reward)
    config = parser.parse_object({"reward": {"class_path": class_path, "init_args": init_args}})
    reward = parser.instantiate_classes(config).reward
    ((key, value),) = init_args.items()
    assert getattr(reward, key) == value
    assert reward([response("7")], [row("7")]).rewards_B.shape == (1,)
