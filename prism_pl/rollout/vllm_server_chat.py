"""Between examples and a vLLM server's chat requests, and between its answers and rollouts."""

from typing import Any

from prism_pl.batch import Example
from prism_pl.images import image_part, open_image
from prism_pl.processor import Processor, chat_messages
from prism_pl.rollout.contract import check_prompt_ids
from prism_pl.rollout.engine import Rollout, Sampling

# The most that the server takes: banned ids are then e^-100 as likely, which is 0 beside any other in float32.
_BAN = -100.0


def chat_request(
    example: Example, processor: Processor, num_samples: int, sampling: Sampling, seed: int, model: str
) -> tuple[dict[str, Any], list[int]]:
    """The server's request, and the prompt ids that it must come to.

    Args:
        seed: of the request's draws; its further samples count on from it.
        model: as the server names it.
    """
    images = [open_image(image, example.id) for image in example.images]
    ids = processor.prompt_ids(processor.prompt_text(example), images)
    request = {
        "model": model,
        "messages": chat_messages(example, [image_part(processor.resized(image)) for image in images]),
        "n": num_samples,
        "seed": seed,
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "top_k": sampling.top_k,
        "max_completion_tokens": sampling.max_tokens,
        "stop_token_ids": [processor.eos_id, processor.pad_id],
        "ignore_eos": True,  # the line above says where a response ends, whatever the config does
        "logit_bias": {str(i): _BAN for i in processor.banned_ids},
        "logprobs": True,
        "top_logprobs": 0,  # of the sampled token alone
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    return request, ids


def rollouts_of(
    answer: dict[str, Any], expected_ids: list[int], processor: Processor, row: str, url: str
) -> list[Rollout]:
    """The samples of one request, in order. ValueError where they break the contract.

    Args:
        expected_ids: the prompt, as the trainer reads it.
        row: the example's id.
    """
    if answer.get("prompt_token_ids") is None:
        raise ValueError(f"the rollout server {url} returns no token ids: it must be vLLM 0.24 to 0.32")
    check_prompt_ids(answer["prompt_token_ids"], expected_ids, processor.image_token_id, row)
    choices = sorted(answer["choices"], key=lambda choice: choice["index"])
    return [_rollout(choice, expected_ids, processor, row) for choice in choices]


def _rollout(choice: dict[str, Any], prompt_ids: list[int], processor: Processor, row: str) -> Rollout:
    ids: list[int] = choice["token_ids"]
    logps = [token["logprob"] for token in choice["logprobs"]["content"]]
    reason = choice["finish_reason"]
    if reason not in ("stop", "length") or len(logps) != len(ids) or not ids:
        raise ValueError(
            f"rollout contract: the server's response to example {row!r} is not whole: {len(ids)} tokens, {len(logps)} "
            f"log-probabilities, finish reason {reason!r}"
        )
    if banned := sorted(set(ids) & set(processor.banned_ids)):
        raise ValueError(f"rollout contract: the server's response to example {row!r} holds the banned ids {banned}")
    return Rollout(prompt_ids, ids, logps, processor.decode(ids), reason)
