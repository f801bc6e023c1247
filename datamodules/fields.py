"""From a row's columns to the fields of an Example, by a mapping that YAML may change.

Column names may be paths, `reward_model.ground_truth`. Conversations are read in all spellings of LLaMA-Factory's
sharegpt form (`messages` or `conversations`, role/content or from/value, user/human, assistant/gpt) and of
conversational data sets on the Hugging Face hub, where a content is a text or a list of text and image parts.
"""

import base64
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prism_pl.chat import parse
from prism_pl.processor import IMAGE_MARK

Columns = Mapping[str, tuple[str, ...]]

ROLES = {"system": "system", "user": "user", "human": "user", "assistant": "assistant", "gpt": "assistant"}
MAX_ANSWER = 4096  # characters; what is longer is no answer that a comparison could read
IMAGES: tuple[str, ...] = ("images", "image")


class Fields:
    """A row's fields, by name.

    Args:
        row: its columns.
        columns: field -> the columns it may stand in; the first that is there counts.
        given: the fields whose column the user named: it must be there.
    """

    def __init__(self, row: Mapping[str, Any], columns: Columns, given: frozenset[str] = frozenset()) -> None:
        self.row, self.columns, self.given = row, columns, given

    def get(self, name: str) -> Any:
        """The field's value, None where no column holds it. ValueError where the user's column is not there."""
        for column in self.columns[name]:
            value, found = _walk(self.row, column)
            if found and value is not None:
                return value
            if not found and name in self.given:
                raise ValueError(self._no_column(name))
        return None

    def need(self, name: str) -> Any:
        """The field's value. ValueError where there is none."""
        value = self.get(name)
        if value is None:
            raise ValueError(self._no_column(name))
        return value

    def text(self, name: str) -> str | None:
        """The field as text, None where there is none. ValueError where it is no text."""
        value = self.get(name)
        if value is None or isinstance(value, str):
            return value
        if isinstance(value, int | float):
            return str(value)
        raise ValueError(f"{' or '.join(self.columns[name])} is a {type(value).__name__} where text is expected")

    def _no_column(self, name: str) -> str:
        wanted = " or ".join(repr(column) for column in self.columns[name])
        there = ", ".join(self.row) or "none"
        return f"no {name}: nothing in the column {wanted}. Columns: {there}. Name it with columns: {{{name}: COLUMN}}"


def _walk(row: Any, path: str) -> tuple[Any, bool]:
    if isinstance(row, Mapping) and path in row:
        return row[path], True
    head, _, rest = path.partition(".")
    if rest and isinstance(row, Mapping) and head in row:
        return _walk(row[head], rest)
    return None, False


@dataclass
class Chat:
    """One exchange: what is asked, with image marks where images stand, and what was answered."""

    question: str = ""
    system: str | None = None
    response: str | None = None
    images: list[Any] = field(default_factory=list)


def read_chat(messages: Any) -> Chat:
    """A conversation of one user turn and at most one assistant turn, or a plain question. ValueError where it is
    another."""
    if isinstance(messages, str):
        return Chat(question=messages)
    if not isinstance(messages, Sequence) or not messages:
        raise ValueError("the conversation is empty or no list of messages")
    chat, seen = Chat(), []
    for message in messages:
        role, text, images = _read_message(message)
        seen.append(role)
        chat.images += images
        if role == "system":
            chat.system = text
        elif role == "user":
            chat.question = text
        else:
            chat.response = text
    turns = [role for role in seen if role != "system"]
    if turns not in (["user"], ["user", "assistant"]) or seen.count("system") > 1:
        raise ValueError(f"the turns are {', '.join(seen)}: one question is read, and at most one answer to it")
    return chat


def read_reply(value: Any) -> str:
    """A completion: a text, or a list with one assistant message. ValueError where it is another."""
    if isinstance(value, str):
        return value
    messages = [value] if isinstance(value, Mapping) else value
    if not isinstance(messages, Sequence) or len(messages) != 1:
        raise ValueError("the completion is neither a text nor one message")
    role, text, _ = _read_message(messages[0])
    if role != "assistant":
        raise ValueError(f"the completion is a message of the role {role}, not of the assistant")
    return text


def _read_message(message: Any) -> tuple[str, str, list[Any]]:
    if not isinstance(message, Mapping):
        raise ValueError(f"a message is a {type(message).__name__} where role and content are expected")
    said = message.get("role") or message.get("from")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    if said not in ROLES:
        raise ValueError(f"a message has the role {said!r}: one of {', '.join(ROLES)} is read")
    if isinstance(content, str):
        return ROLES[said], content, []
    if not isinstance(content, Sequence):
        raise ValueError(f"the {said} message has no content")
    parts = [_read_part(part) for part in content]
    return ROLES[said], "".join(text for text, _ in parts), [image for _, found in parts for image in found]


def _read_part(part: Any) -> tuple[str, list[Any]]:
    kind = part.get("type") if isinstance(part, Mapping) else None
    if kind == "text":
        return part.get("text") or "", []
    if kind in ("image", "image_url"):
        image = next((part[key] for key in ("image", "image_url", "url", "path") if part.get(key)), None)
        image = image.get("url", image) if isinstance(image, Mapping) else image
        return IMAGE_MARK, [] if image is None else [image]
    raise ValueError(f"a content part is of the type {kind!r}: text and image are read")


def read_images(value: Any, folder: Path) -> list[Path | bytes]:
    """Images as paths or encoded bytes, unopened. ValueError for what is neither.

    Args:
        value: one image or several; each a path, bytes, a data URI, or a mapping with `bytes` or `path`.
        folder: where relative paths start.
    """
    if value is None:
        return []
    items = value if isinstance(value, list | tuple) else [value]
    return [_read_image(item, folder) for item in items]


def _read_image(item: Any, folder: Path) -> Path | bytes:
    if isinstance(item, Mapping):
        item = item.get("bytes") or item.get("path") or item.get("image")
    if isinstance(item, bytes):
        return item
    if not isinstance(item, str | Path) or not str(item):
        raise ValueError(f"an image is {item!r}: give a path or the file's bytes")
    text = str(item)
    if text.startswith("data:"):
        try:
            return base64.b64decode(text.partition("base64,")[2], validate=True)
        except ValueError:
            raise ValueError("an image is a data URI that is no base64") from None
    if "://" in text[:10] and not text.startswith("file://"):
        raise ValueError(
            f"the image {text!r} is on the web: download it, write the rows into a file with paths from the images' "
            "folder on, and give both, {path: FILE, image_folder: FOLDER}"
        )
    return folder / text.removeprefix("file://")


def without_leading_marks(question: str, num_images: int) -> str:
    """The question without image marks where they all stand before it (images come first anyway). Others stay, one an
    image. ValueError where their number is not the images'."""
    num_marks = question.count(IMAGE_MARK)
    if num_marks not in (0, num_images):
        raise ValueError(f"{num_marks} times {IMAGE_MARK} in the question, and {num_images} images")
    bare = question.strip()
    for _ in range(num_marks):
        bare = bare.removeprefix(IMAGE_MARK).lstrip()
    bare = question.strip() if IMAGE_MARK in bare else bare
    if not bare:
        raise ValueError("the question is empty")
    return bare


def read_answers(value: Any, equivalent: Any = None) -> list[str]:
    """The accepted answers, each once: the truth first, then those that are as good. ValueError for one that is no
    answer."""
    answers = [str(answer).strip() for each in (value, equivalent) for answer in _listed(each)]
    for answer in answers:
        if len(answer) > MAX_ANSWER:
            raise ValueError(f"an answer has {len(answer):,} characters: at most {MAX_ANSWER:,} are compared")
    return list(dict.fromkeys(answer for answer in answers if answer))


def _listed(value: Any) -> list[Any]:
    if isinstance(value, str) and value.lstrip().startswith('["'):
        try:
            value = json.loads(value)
        except json.JSONDecodeError:
            return [value]
    if value is None or isinstance(value, Mapping):
        return [] if value is None else list(value.values())
    return list(value) if isinstance(value, list | tuple) else [value]


def joined(caption: str | None, cot: str | None, response: str | None) -> str | None:
    """A response in the three-block format from the columns of the release: the caption (tags or not) and the chain of
    thought with the answer (`<think>...</think><answer>...</answer>`), or else the whole response. None without any."""
    if caption and cot:
        caption = caption.strip()
        tagged = caption if caption.startswith("<caption>") else f"<caption>\n{caption}\n</caption>"
        text = f"{tagged}\n{cot.strip()}"
        # Where the parts make no response, a whole one beside them may.
        return response if response and not parse(text).valid and parse(response).valid else text
    return response or None
