"""How long a large set of demonstrations takes to start, how fast it is read, and how much memory a process needs.

    python benchmarks/data.py --rows 1300000 --folder /tmp/data-benchmark

Makes a set in LLaMA-Factory's form if there is none in the folder (about 2 kB of text a row, over 1,000 images), then
starts it twice, each time in a process of its own: the first start turns the file into a table, once a machine. Every
start reads shuffled batches, images opened, through two workers. Resident memory (VmHWM) counts pages of the mapped
table too, which the kernel may take back at any time.
"""

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

sys.path.insert(0, str(Path(__file__).parent.parent))

WORDS = [
    "triangle",
    "circle",
    "angle",
    "sum",
    "the",
    "area",
    "is",
    "of",
    "x",
    "=",
    "12",
    "step",
    "so",
    "axis",
    "bar",
    "label",
    "red",
    "line",
    "3",
    "4",
    "and",
    "from",
    "figure",
]
NUM_IMAGES = 1000


def make(folder: Path, num_rows: int) -> Path:
    """The set, written once."""
    from PIL import Image

    file = folder / f"rows-{num_rows}.jsonl"
    if file.exists():
        return file
    (folder / "images").mkdir(parents=True, exist_ok=True)
    for number in range(NUM_IMAGES):
        Image.effect_noise((320, 240), 40).convert("RGB").save(folder / "images" / f"{number}.jpg")
    drawn = random.Random(0)
    texts = []
    for _ in range(500):
        words = " ".join(drawn.choices(WORDS, k=drawn.randint(100, 700)))
        texts.append(f"<caption>\n- {words[:300]}\n</caption>\n<think>\n{words}\n</think>\n<answer>\n12\n</answer>")
    with file.with_suffix(".tmp").open("w") as lines:
        for number in range(num_rows):
            question = {"role": "user", "content": f"<image>\nQuestion {number}: what is the area?"}
            reply = {"role": "assistant", "content": texts[number % len(texts)]}
            row = {"messages": [question, reply], "images": [f"images/{number % NUM_IMAGES}.jpg"]}
            lines.write(json.dumps(row) + "\n")
    file.with_suffix(".tmp").rename(file)
    return file


class Opener:
    """A collator that opens images and says what its process needs: (rows, peak MiB)."""

    def __call__(self, rows: list) -> tuple[int, int]:
        from prism_pl.images import open_image

        for row in rows:
            for image in row.images:
                open_image(image, row.id)
        return len(rows), status()["VmHWM"]


def status() -> dict[str, int]:
    """Memory of this process in MiB."""
    lines = [line.split() for line in Path("/proc/self/status").read_text().splitlines()]
    return {line[0].rstrip(":"): int(line[1]) // 1024 for line in lines if line[0].startswith(("Vm", "Rss"))}


def measure(file: Path, num_read: int) -> dict[str, float]:
    """One start in this process."""
    import numpy as np

    from datamodules import DemonstrationsDataModule
    from datamodules.batching import plan_batches

    begun = time.perf_counter()
    data = DemonstrationsDataModule(str(file), num_validation=512, batch_size=16, num_workers=2)
    data.trainer = SimpleNamespace(  # pyright: ignore[reportAttributeAccessIssue]
        world_size=1,
        global_rank=0,
        is_global_zero=True,
        lightning_module=SimpleNamespace(collator=Opener(), hparams={}),
    )
    data.prepare_data()
    data.setup("fit")
    batches = iter(data.train_dataloader())
    next(batches)
    started = time.perf_counter()
    worker = num = 0
    for rows, peak in batches:
        num, worker = num + rows, max(worker, peak)
        if num >= num_read:
            break
    read = time.perf_counter()
    del batches
    found = {"start": started - begun, "rows/s": num / (read - started), "main": status()["VmHWM"], "worker": worker}
    lengths = np.random.default_rng(0).integers(100, 4000, len(data.train_rows))  # pyright: ignore[reportArgumentType]
    begun = time.perf_counter()
    plan_batches(lengths, 64, 32768, seed=0)
    found["plan"] = time.perf_counter() - begun
    begun = time.perf_counter()
    data.row_recipe()
    found["fingerprint"] = time.perf_counter() - begun
    return found


def table(file: Path, num_rows: int, num_read: int, results: list[dict[str, float]]) -> str:
    """The results as Markdown."""
    size = file.stat().st_size / 2**30
    lines = [
        f"`python benchmarks/data.py --rows {num_rows}`: {num_rows:,} rows, {size:.1f} GiB of JSON lines; two workers, "
        f"batches of 16 with one 320 x 240 image a row, {num_read:,} rows read in shuffled order.",
        "",
        "| start | first batch after | rows/s | peak memory, main | of a worker | plan of batches | fingerprint |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, found in zip(("first on this machine", "later"), results, strict=True):
        lines.append(
            f"| {name} | {found['start']:.1f} s | {found['rows/s']:.0f} | {found['main']:.0f} MiB | "
            f"{found['worker']:.0f} MiB | {found['plan']:.1f} s | {found['fingerprint']:.1f} s |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=1_300_000)
    parser.add_argument("--read", type=int, default=20_000, help="rows that are read at each start")
    parser.add_argument("--folder", type=Path, default=Path("/tmp/data-benchmark"))
    parser.add_argument("--measure", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    file = make(options.folder, options.rows)
    if options.measure:
        import datasets

        datasets.config.HF_DATASETS_CACHE = options.folder / "cache"  # pyright: ignore[reportAttributeAccessIssue]
        datasets.disable_progress_bars()
        print(json.dumps(measure(file, options.read)))
        return
    subprocess.run(["rm", "-rf", str(options.folder / "cache")], check=True)
    results = []
    for _ in range(2):
        command = [sys.executable, __file__, *sys.argv[1:], "--measure"]
        said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        results.append(json.loads(said.splitlines()[-1]))
    print(table(file, options.rows, options.read, results))


if __name__ == "__main__":
    main()
