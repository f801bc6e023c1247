"""A few rows in the form of each published benchmark, made here: schemas and types are theirs, words are not."""

import json
from pathlib import Path
from typing import Any

from PIL import Image

from prism_pl.benchmarks import MMMU, Benchmark, HallusionBench, MathVerse, MathVision, MathVista, MMMUPro, WeMath

MATHVISTA = {
    "1": ("What is the mean height of the bars?", "float", 1.0, None, "2.5", "cm"),
    "2": ("How many bars are there?", "integer", None, None, "4", None),
    "3": ("Which bar is the tallest?", "text", None, ["red", "green", "dark green"], "green", None),
    "4": ("Between which years does it fall?", "list", None, None, "[2001, 2003]", None),
}
MATHVERSE = (
    ("multi-choice", "Angle A is 30. What is angle B?\nChoices:\nA:60°\nB:150°\nC:90°", "B"),
    ("free-form", "The legs are 3 and 4. How long is the third side?", "5"),
)
MATHVISION = (
    ("How many dots?\n<image1>", [], "6", "counting"),
    ("Which shape is next?\n<image1>", ["A", "B", "C", "D", "E"], "D", "logic"),
    ("What is the shaded area?\n<image1>", [], "$4 \\pi$", "metric geometry - area"),
    ("How long is AB?\n<image1>", ["$\\sqrt{2}$", "$2$", "$3$", "$4$", "$5$"], "A", "metric geometry - length"),
    ("Which fraction is shaded?\n<image1>", [], "\x0crac{1}{4}", "arithmetic"),
)
WEMATH = (("2steps_1", ("2steps_1", "2steps_2", "2steps_multi")), ("3steps_1", ("3steps_1", "3steps_2", "3steps_3")))
MMMU_ROWS: tuple[dict[str, Any], ...] = (
    {
        "id": "validation_Music_1",
        "question": "Which interval is <image 1>?",
        "options": "['a third', 'a fifth']",
        "answer": "B",
        "question_type": "multiple-choice",
    },
    {
        "id": "validation_Energy_and_Power_2",
        "question": "What is the power in <image 1>, in W?",
        "options": "[]",
        "answer": "1,250.5",
        "question_type": "open",
    },
    {
        "id": "validation_Geography_3",
        "question": "Which town does <image 1> show beside <image 2>?",
        "options": "[]",
        "answer": "['Bonn', 'the city of Bonn']",
        "question_type": "open",
    },
)
HALLUSION = (
    # category, subcategory, set, figure, question, question's text, truth
    ("VD", "figure", 0, 0, 0, "Are the lines parallel?", "1"),
    ("VD", "figure", 0, 0, 1, "Do the lines cross?", "0"),
    ("VD", "figure", 0, 1, 0, "Are the lines parallel?", "0"),
    ("VD", "figure", 0, 1, 1, "Do the lines cross?", "1"),
    ("VS", "map", 0, 0, 0, "Is the lake north of the town?", "1"),
    ("VS", "map", 0, 1, 0, "Is the lake north of the town?", "0"),
)


def write_benchmarks(folder: Path) -> list[Benchmark]:
    """Write a file of each benchmark, and pictures. Returns the benchmarks that read them, in the shipped order."""
    (folder / "images").mkdir(parents=True)
    for number in range(1, 7):
        Image.new("RGB", (48, 48), (40 * number, 0, 0)).save(folder / "images" / f"{number}.png")
    return [
        MathVista(_json(folder / "mathvista.json", _mathvista())),
        MathVerse(_json(folder / "mathverse.json", _mathverse())),
        MathVision(_lines(folder / "mathvision.jsonl", _mathvision())),
        WeMath(_json(folder / "wemath.json", _wemath())),
        MMMU(_parquet(folder / "mmmu.parquet", [{**row, **_pictures(row)} for row in MMMU_ROWS])),
        MMMUPro("standard", _parquet(folder / "mmmu_pro_standard.parquet", _mmmu_pro())),
        MMMUPro("vision", _parquet(folder / "mmmu_pro_vision.parquet", _mmmu_pro_vision())),
        HallusionBench(_json(folder / "hallusionbench.json", _hallusion())),
    ]


def _mathvista() -> dict[str, Any]:
    return {
        pid: {
            "pid": pid,
            "question": question,
            "image": f"images/{pid}.png",
            "answer_type": kind,
            "question_type": "multi_choice" if choices else "free_form",
            "precision": precision,
            "choices": choices,
            "answer": answer,
            "unit": unit,
            "metadata": {"split": "testmini", "task": "figure question answering", "skills": ["statistical reasoning"]},
        }
        for pid, (question, kind, precision, choices, answer, unit) in MATHVISTA.items()
    }


def _mathverse() -> list[dict[str, Any]]:
    rows = []
    for number, (kind, question, answer) in enumerate(MATHVERSE, start=1):
        for version in ("Text Dominant", "Vision Only"):
            shown = question if version == "Text Dominant" else ""
            rows.append(
                {
                    "sample_index": str(len(rows) + 1),
                    "problem_index": str(number),
                    "problem_version": version,
                    "question": shown,
                    "image": f"images/{number}.png",
                    "answer": answer,
                    "question_type": kind,
                    "metadata": {"split": "testmini", "subject": "Plane Geometry", "subfield": "Length"},
                    "query_wo": f"Give the answer at once.\nQuestion: {shown}",
                    "query_cot": f"Think first.\nQuestion: {shown}",
                    "question_for_eval": question,
                }
            )
    return rows


def _mathvision() -> list[dict[str, Any]]:
    return [
        {
            "id": str(number),
            "question": question,
            "options": options,
            "answer": answer,
            "image": f"images/{number}.png",
            "level": 1,
            "subject": subject,
            "solution": None,
        }
        for number, (question, options, answer, subject) in enumerate(MATHVISION, start=1)
    ]


def _wemath() -> list[dict[str, Any]]:
    rows = []
    for problem, keys in (*WEMATH[:1], ("3steps_1", (*WEMATH[1][1], "3steps_multi"))):
        for key in keys:
            rows.append(
                {
                    "ID": problem,
                    "split": "testmini",
                    "knowledge concept": "Area of Triangles",
                    "question": f"What is the area of part {key}? ( ) cm",
                    "option": "A. 3; B. 4;C. 6π;  D. No correct answer",
                    "answer": "C",
                    "image_path": "images/1.png",
                    "key": key,
                    "question number": len(rows) + 1,
                    "knowledge concept description": "Half of base times height.",
                }
            )
    return rows


def _pictures(row: dict[str, Any]) -> dict[str, Any]:
    """image_1 ... image_7, those that the row's text shows filled."""
    text = row.get("question", "") + row["options"]
    return {f"image_{n}": _encoded(n) if f"<image {n}>" in text else None for n in range(1, 8)}


def _mmmu_pro() -> list[dict[str, Any]]:
    row = {
        "id": "test_Art_1",
        "question": "Which picture has the colour of <image 2>?",
        # Shuffled, as the ten options are; <image 1> stands nowhere.
        "options": str(["<image 4>", "<image 3>", *(f"none of {n}" for n in range(8))]),
        "answer": "J",
        "subject": "Art",
    }
    return [{**row, **_pictures(row)}]


def _mmmu_pro_vision() -> list[dict[str, Any]]:
    options = str([f"option {n}" for n in range(10)])
    return [{"id": "test_Art_1", "image": _encoded(1), "options": options, "answer": "I", "subject": "Art"}]


def _hallusion() -> list[dict[str, Any]]:
    return [
        {
            "category": category,
            "subcategory": subcategory,
            "visual_input": "0" if category == "VS" and figure == 0 else "1",
            "set_id": str(set_id),
            "figure_id": str(figure),
            "sample_note": "lines",
            "question_id": str(number),
            "question": question,
            "gt_answer_details": f"{question} {'Yes' if truth == '1' else 'No'}.",
            "gt_answer": truth,
            "filename": None if category == "VS" and figure == 0 else f"images/{figure + 1}.png",
        }
        for category, subcategory, set_id, figure, number, question, truth in HALLUSION
    ]


def _encoded(number: int) -> dict[str, Any]:
    """A picture as the hub's parquet files hold it."""
    import io

    buffer = io.BytesIO()
    Image.new("RGB", (48, 48), (40 * number, 0, 0)).save(buffer, "PNG")
    return {"bytes": buffer.getvalue(), "path": f"{number}.png"}


def _json(file: Path, rows: Any) -> str:
    file.write_text(json.dumps(rows, ensure_ascii=False))
    return str(file)


def _lines(file: Path, rows: list[dict[str, Any]]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def _parquet(file: Path, rows: list[dict[str, Any]]) -> str:
    from datasets import Dataset, Features, Image, Value

    pictures = [name for name in rows[0] if name == "image" or name.startswith("image_")]
    features = {name: Image() if name in pictures else Value("string") for name in rows[0]}
    Dataset.from_list(rows, features=Features(features)).to_parquet(str(file))
    return str(file)
