"""Demonstrations, for SFT, and wherever a response to each question is known.

A row in LLaMA-Factory's sharegpt form (its data/README.md; images by path, beside the file or in `image_folder`):

    {"messages": [{"role": "user", "content": "<image>\\nWhat is the area?"},
                  {"role": "assistant", "content": "<caption>...</caption><think>...</think><answer>12</answer>"}],
     "images": ["images/0001.png"]}

`conversations` with from/value, human/gpt is read as well, and so are Hugging Face's conversational sets (contents of
text and image parts; `prompt` with `completion`) and plain columns (`question`, `response`, `image`). In YAML:

    data:
      class_path: datamodules.DemonstrationsDataModule
      init_args:
        train: [{path: prism-vlm/gemini_distill}, {path: mmr1/train.jsonl, image_folder: mmr1/images}]
        num_validation: 512
"""

from pathlib import Path

from datamodules.fields import (
    IMAGES,
    Columns,
    Fields,
    read_answers,
    read_chat,
    read_images,
    read_reply,
    without_leading_marks,
)
from datamodules.files import FilesDataModule
from prism_pl.batch import Example

COLUMNS: Columns = {
    "messages": ("messages", "conversations"),
    "question": ("prompt", "question", "problem", "instruction"),
    "response": ("completion", "response", "output"),
    "images": IMAGES,
    "system": ("system",),
    "answers": ("answers", "answer"),
    "id": (),
}


def read_demonstration(fields: Fields, folder: Path) -> Example:
    """A row as an Example with a `response`. ValueError says what is missing."""
    messages = fields.get("messages")
    chat = read_chat(fields.need("question") if messages is None else messages)
    reply = fields.get("response") if chat.response is None else chat.response
    if reply is None:
        raise ValueError(f"no response: no assistant message, and nothing in {' or '.join(fields.columns['response'])}")
    images = read_images(chat.images or fields.get("images"), folder)
    return Example(
        id="",
        question=without_leading_marks(chat.question, len(images)),
        images=list(images),
        response=read_reply(reply),
        answers=read_answers(fields.get("answers")),
        system=chat.system or fields.text("system"),
    )


class DemonstrationsDataModule(FilesDataModule):
    __doc__ = FilesDataModule.__doc__
    COLUMNS = COLUMNS
    read_row = staticmethod(read_demonstration)
