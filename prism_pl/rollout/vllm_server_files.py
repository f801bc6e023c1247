"""Weights on their way to a server by a folder that both sides see: one safetensors file a bucket."""

import json
from collections.abc import Iterable, Iterator
from pathlib import Path

from prism_pl.checkpoint_files import put_in_place
from prism_pl.policy import fresh_temporary
from prism_pl.rollout.bucket import Bucket


def write_buckets(buckets: Iterable[Bucket], folder: Path) -> None:
    """Write buckets to a folder, under a temporary name until all are there: the server never reads half of it."""
    from safetensors.torch import save_file

    temporary = fresh_temporary(folder)
    temporary.mkdir(parents=True)
    for number, bucket in enumerate(buckets):
        header = {"names": json.dumps(bucket.names), "shapes": json.dumps(bucket.shapes)}
        save_file({"flat": bucket.flat.cpu()}, temporary / f"{number:05d}.safetensors", metadata=header)
    put_in_place(temporary, folder)


def read_buckets(folder: Path) -> Iterator[Bucket]:
    """The buckets of a folder, in the order they were written. FileNotFoundError where there is none."""
    from safetensors import safe_open

    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(f"no weights in {str(folder)!r} on the server's machine")
    for file in files:
        with safe_open(file, framework="pt") as opened:
            header = opened.metadata()
            shapes = [tuple(shape) for shape in json.loads(header["shapes"])]
            bucket = Bucket(json.loads(header["names"]), shapes, opened.get_tensor("flat"))
        yield bucket
