"""From examples to tensors: chat text, token ids, image patches and M-RoPE positions.

Prompt and response are tokenised apart and their ids concatenated, so the loss mask is exact and a sampled response
keeps its sampled ids. Positions are made here, on the CPU, once a prompt: the model's own computation loops over
samples and synchronises the device for each.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from prism_pl.batch import Example, SequenceBatch
from prism_pl.chat import SYSTEM_PROMPT, plain_text
from prism_pl.images import Size, image_size, open_image

if TYPE_CHECKING:
    from PIL.Image import Image

IMAGE_MARK = "<image>"  # where an image stands in a question, as LLaMA-Factory and verl write it


@dataclass(frozen=True)
class Prompt:
    """An encoded prompt.

    Attributes:
        id: the example's.
        text: the chat text with one placeholder an image, as an inference engine wants it.
        ids: its token ids, with as many placeholders as the image has visual tokens.
        positions_3S: M-RoPE positions of `ids`.
        next_position: the position of the first response token.
        pixel_values_NC, grids_I3: the images' patches and their (time, height, width) in patches.
    """

    id: str
    text: str
    ids: list[int]
    positions_3S: Tensor
    next_position: int
    pixel_values_NC: Tensor
    grids_I3: Tensor


class Processor:
    """A Qwen-style tokenizer and image processor behind the few calls the stages need.

    Args:
        tokenizer: a Hugging Face tokenizer with a chat template and Qwen's special tokens.
        image_processor: Qwen2-VL's image processor (PIL backend: it needs no torchvision).
        source: the folder or hub id both were read from; exports take their processor files from it.
        text_only: leave an example's images out of its prompt, and the marks of where they stand.
    """

    def __init__(self, tokenizer: Any, image_processor: Any, source: str, text_only: bool = False) -> None:
        self.tokenizer = tokenizer
        self.image_processor = image_processor
        self.source = source
        self.text_only = text_only
        self.image_token_id: int = tokenizer.convert_tokens_to_ids("<|image_pad|>")
        self.eos_id: int = tokenizer.convert_tokens_to_ids("<|im_end|>")
        self.pad_id: int = tokenizer.convert_tokens_to_ids("<|endoftext|>")
        vision = ("<|vision_start|>", "<|vision_end|>", "<|vision_pad|>", "<|image_pad|>", "<|video_pad|>")
        ids = [tokenizer.convert_tokens_to_ids(token) for token in vision]
        # A policy must never emit these: as input ids they would ask for images that are not there.
        self.banned_ids: list[int] = [i for i in ids if i is not None and i != tokenizer.unk_token_id]

    @classmethod
    def from_path(cls, path: str, max_pixels: int | None = None, text_only: bool = False) -> "Processor":
        """Read tokenizer and image processor from a folder or hub id.

        Args:
            max_pixels: images above this are scaled down; None keeps the limit in `path`.
        """
        from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        if not tokenizer.chat_template:
            raise ValueError(
                f"{path!r} has no tokenizer with a chat template: copy tokenizer.json, tokenizer_config.json and "
                "chat_template.jinja from the policy it was made from"
            )
        image_processor = Qwen2VLImageProcessorPil.from_pretrained(path)
        if max_pixels is not None:
            image_processor.size["longest_edge"] = max_pixels
        return cls(tokenizer, image_processor, str(path), text_only)

    def prompt(self, example: Example) -> Prompt:
        """Encode system prompt, images and question of an example."""
        if self.text_only:
            example = replace(example, images=[], question=example.question.replace(IMAGE_MARK, ""))
        text = self.prompt_text(example)
        raw_ids = self.tokenizer(text, add_special_tokens=False).input_ids
        pixel_values_NC, grids_I3 = self._images(example)
        ids, positions_3S, next_position = self._expand(raw_ids, grids_I3, example)
        return Prompt(example.id, text, ids, positions_3S, next_position, pixel_values_NC, grids_I3)

    def prompt_text(self, example: Example) -> str:
        """The chat text of an example's prompt, with one placeholder an image."""
        messages = chat_messages(example, [{"type": "image"} for _ in example.images])
        return self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)

    def prompt_length(self, example: Example) -> int:
        """How many `Prompt.ids` there are, by the images' headers alone. Raises as `image_size` does."""
        images = [] if self.text_only else example.images
        sizes = [image_size(image, example.id) for image in images]
        return len(self.prompt_ids(self.prompt_text(replace(example, images=images)), sizes))

    def prompt_ids(self, text: str, images: Sequence["Image | Size"]) -> list[int]:
        """`Prompt.ids` from the chat text and the images' sizes alone, without their patches."""
        counts = iter([self._num_visual_tokens(image) for image in images])
        raw_ids = self.tokenizer(text, add_special_tokens=False).input_ids
        runs = [[i] * next(counts, 1) if i == self.image_token_id else [i] for i in raw_ids]
        return [i for run in runs for i in run]

    def _num_visual_tokens(self, image: "Image | Size") -> int:
        patches = self.image_processor.get_number_of_image_patches(image.height, image.width, {})
        return patches // self.image_processor.merge_size**2

    def resized(self, image: "Image") -> "Image":
        """An image at the size at which its patches are cut. Its patches are the same ones, and a processor of another
        make, which would have come to slightly other pixels, finds nothing left to resize."""
        import numpy as np
        from PIL import Image
        from transformers.image_utils import SizeDict

        ours = self.image_processor
        size = SizeDict(shortest_edge=ours.size["shortest_edge"], longest_edge=ours.size["longest_edge"])
        pixels = np.asarray(image).transpose(2, 0, 1)
        pixels = ours.resize(pixels, size=size, resample=ours.resample, factor=ours.patch_size * ours.merge_size)
        return Image.fromarray(pixels.transpose(1, 2, 0))

    def _images(self, example: Example) -> tuple[Tensor, Tensor]:
        if not example.images:
            size = self.image_processor
            width = 3 * size.temporal_patch_size * size.patch_size**2
            return torch.zeros(0, width), torch.zeros(0, 3, dtype=torch.long)
        images = [open_image(image, example.id) for image in example.images]
        encoded = self.image_processor(images=images, return_tensors="pt")
        return encoded["pixel_values"], encoded["image_grid_thw"]

    def _expand(self, raw_ids: list[int], grids_I3: Tensor, example: Example) -> tuple[list[int], Tensor, int]:
        """Repeat each image placeholder once a visual token, and number the tokens as Qwen3-VL's M-RoPE does: text
        counts on in all three axes, an image spans its grid from where the text stands, and the text after it goes on
        behind the image's longer side."""
        merge = self.image_processor.merge_size
        placeholders = raw_ids.count(self.image_token_id)
        if placeholders != len(grids_I3):
            raise ValueError(
                f"example {example.id!r} has {len(grids_I3)} images and its prompt {placeholders} image placeholders: "
                "a question must not contain <|image_pad|> itself"
            )
        ids: list[int] = []
        parts: list[Tensor] = []
        position = 0
        grids = iter(grids_I3.tolist())
        start = 0
        for end in [i for i, token in enumerate(raw_ids) if token == self.image_token_id]:
            ids += raw_ids[start:end]
            parts.append(torch.arange(position, position + end - start).expand(3, -1))
            position += end - start
            time, height, width = next(grids)
            height, width = height // merge, width // merge
            axes = torch.meshgrid(torch.arange(time), torch.arange(height), torch.arange(width), indexing="ij")
            parts.append(torch.stack(axes).reshape(3, -1) + position)
            ids += [self.image_token_id] * (time * height * width)
            position += max(height, width)
            start = end + 1
        ids += raw_ids[start:]
        parts.append(torch.arange(position, position + len(raw_ids) - start).expand(3, -1))
        return ids, torch.cat(parts, dim=1), position + len(raw_ids) - start

    def response_ids(self, text: str) -> list[int]:
        """Token ids of a response with the end-of-turn token. Special tokens spelled out in the text stay text."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
        return [*ids, self.eos_id]

    def response_starts(self, text: str) -> list[int]:
        """For each token of `response_ids`, the character of the text that it begins at; of the end token the text's
        length."""
        encoded = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True, return_offsets_mapping=True)
        return [*(start for start, _ in encoded.offset_mapping), len(text)]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of sampled ids, without special tokens."""
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def sequences(
        self, prompts: Sequence[Prompt], responses: Sequence[Sequence[int]], prompt_of: Sequence[int]
    ) -> SequenceBatch:
        """Concatenate prompts and responses into one right-padded batch.

        Args:
            prompts: P distinct prompts; each prompt's images stand once in the batch.
            responses: B lists of response ids, none empty.
            prompt_of: for each response, the index of its prompt.
        """
        rows = [prompts[p] for p in prompt_of]
        ids = [torch.tensor([*row.ids, *response]) for row, response in zip(rows, responses, strict=True)]
        positions = [_positions(row, len(response)) for row, response in zip(rows, responses, strict=True)]
        index = [torch.arange(len(row.ids), len(row.ids) + len(r)) for row, r in zip(rows, responses, strict=True)]
        counts = [len(prompt.grids_I3) for prompt in prompts]
        first = [sum(counts[:p]) for p in range(len(prompts))]
        image_of = [first[p] + i for p in prompt_of for i in range(counts[p])]
        return SequenceBatch(
            input_ids_BS=pad_sequence(ids, batch_first=True, padding_value=self.pad_id),
            position_ids_3BS=pad_sequence(positions, batch_first=True).permute(2, 0, 1).contiguous(),
            lengths_B=torch.tensor([len(row) for row in ids]),
            response_index_BT=pad_sequence(index, batch_first=True),
            mask_BT=pad_sequence([torch.ones(len(r), dtype=torch.bool) for r in responses], batch_first=True),
            pixel_values_NC=torch.cat([prompt.pixel_values_NC for prompt in prompts]),
            grids_I3=torch.cat([prompt.grids_I3 for prompt in prompts]),
            image_of=torch.tensor(image_of, dtype=torch.long),
            images_per_row=[counts[p] for p in prompt_of],
            prompt_of_B=torch.tensor(prompt_of),
            ids=[row.id for row in rows],
        )


def chat_messages(example: Example, images: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The messages of an example's prompt: system prompt, then images and question. Special tokens that a text spells
    out stay text.

    Args:
        images: the content part that stands for each image, as whoever reads the messages wants it.

    Raises:
        ValueError: the question holds image marks (`<image>`), but not one for each image.
    """
    system = SYSTEM_PROMPT if example.system is None else example.system
    texts = [plain_text(text) for text in example.question.split(IMAGE_MARK)]
    if len(texts) == 1:
        content = [*images, {"type": "text", "text": texts[0]}]
    elif len(texts) != len(images) + 1:
        raise ValueError(
            f"example {example.id!r} has {len(images)} images and its question {len(texts) - 1} times {IMAGE_MARK}: "
            "give one for each image, or none (all images then come first)"
        )
    else:
        parts = [[{"type": "text", "text": text}, image] for text, image in zip(texts[:-1], images, strict=True)]
        content = [part for pair in parts for part in pair if part.get("text") != ""]
        content += [{"type": "text", "text": texts[-1]}] if texts[-1] else []
    return [{"role": "system", "content": plain_text(system)}, {"role": "user", "content": content}]


def _positions(prompt: Prompt, num_response: int) -> Tensor:
    """(S, 3) positions of a prompt and the response that follows it."""
    response = torch.arange(prompt.next_position, prompt.next_position + num_response)
    return torch.cat([prompt.positions_3S, response.expand(3, -1)], dim=1).T
