"""`python -m prism_pl push FOLDER REPO`: an export to the Hugging Face hub. Light until it runs."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from prism_pl.errors import UsageError

ABOUT = """Upload an exported folder to the Hugging Face hub, with its model card. The folder stays as it is but for the
scores that --evaluation adds to its card."""

EXAMPLE = """example:
  python -m prism_pl push runs/align/export my-name/qwen3vl-4b-aligned --evaluation runs/evaluate-align --dry-run"""

WEIGHTS = ("*.safetensors",)
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")


class Parser(argparse.ArgumentParser):
    """Raises what argparse would exit with."""

    def error(self, message: str) -> NoReturn:
        raise UsageError(f"push: {message}. All options: python -m prism_pl push --help")


def make_parser() -> Parser:
    """The options of `push`."""
    style = argparse.RawDescriptionHelpFormatter
    parser = Parser("python -m prism_pl push", description=ABOUT, epilog=EXAMPLE, formatter_class=style)
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="an export, such as runs/align/export")
    parser.add_argument("repo", metavar="REPO", help="where to: name/repository; made where it is not there yet")
    parser.add_argument("--private", action="store_true", help="make a new repository private")
    parser.add_argument("--revision", help="a branch; default main")
    parser.add_argument("--message", default="Upload by prism_pl", help="of the commit")
    parser.add_argument("--evaluation", type=Path, help="an evaluation of this export: its scores go into the card")
    parser.add_argument("--dry-run", action="store_true", help="say what would be uploaded, and upload nothing")
    return parser


def run(args: Sequence[str]) -> None:
    """Run `push` with what follows `python -m prism_pl`."""
    options = make_parser().parse_args(args[1:])
    files = exported_files(options.folder)
    if options.repo.count("/") != 1 or not all(options.repo.split("/")):
        raise UsageError(f"push: REPO is {options.repo!r}: give name/repository, such as my-name/qwen3vl-4b-aligned")
    card = new_card(options.folder, options.evaluation) if options.evaluation else None
    size = sum(file.stat().st_size for file in files)
    print(f"{options.folder} -> https://huggingface.co/{options.repo}: {len(files)} files, {size / 1e9:.2f} GB")
    for file in files:
        print(f"  {file.relative_to(options.folder)}  {file.stat().st_size:,} bytes")
    if options.dry_run:
        print("Dry run: nothing was uploaded.")
        return
    if card is not None:
        (options.folder / "README.md").write_text(card)
    upload(options)


def exported_files(folder: Path) -> list[Path]:
    """The files of an export. ValueError or FileNotFoundError where the folder is none, or holds pickles."""
    if not folder.is_dir():
        raise FileNotFoundError(f"push: {folder} is no folder: name an export, such as runs/align/export")
    files = sorted(file for file in folder.rglob("*") if file.is_file() and not file.name.startswith("."))
    names = {file.name for file in files}
    if not names & {"config.json", "adapter_config.json"}:
        raise ValueError(f"push: {folder} holds no config.json: name the export/ folder of a run, not the run itself")
    if not any(file.match(pattern) for file in files for pattern in WEIGHTS):
        raise ValueError(f"push: {folder} holds no safetensors: export the checkpoint anew")
    for file in files:
        if any(file.match(pattern) for pattern in PICKLES):
            raise ValueError(f"push: {file} is a pickle, which can run code where it is loaded: take it out")
    return files


def new_card(folder: Path, evaluation: Path) -> str:
    """The export's card with the scores of an evaluation. ValueError where that is of another policy."""
    import json

    from prism_pl.model_card import PROVENANCE, card
    from prism_pl.report.evaluations import read_evaluation

    found = read_evaluation(evaluation)
    if Path(found.settings["policy"]).resolve() != folder.resolve():
        raise ValueError(
            f"push: --evaluation {evaluation} is of {found.settings['policy']}, not of {folder}: evaluate this folder "
            f"(python -m prism_pl test --config evaluate.yaml --model.policy.path {folder})"
        )
    file = folder / PROVENANCE
    if not file.exists():
        raise ValueError(f"push: {folder} has no {PROVENANCE}, so a card cannot be made anew: leave --evaluation out")
    return card(folder, json.loads(file.read_text()), found)


def upload(options: argparse.Namespace) -> None:
    """Make the repository where it is missing, and upload the folder as one commit."""
    from huggingface_hub import HfApi, get_token

    if get_token() is None:
        raise UsageError("push: there is no Hugging Face token: run `hf auth login`, or set HF_TOKEN, and try again")
    api: Any = HfApi()
    api.create_repo(options.repo, private=options.private or None, exist_ok=True)
    if options.revision is not None:
        api.create_branch(options.repo, branch=options.revision, exist_ok=True)
    api.upload_folder(
        repo_id=options.repo,
        folder_path=str(options.folder),
        revision=options.revision,
        commit_message=options.message,
        ignore_patterns=[".*"],
    )
    print(f"Uploaded to https://huggingface.co/{options.repo}")
