"""An export as others take it: served by vLLM itself, nothing of ours in it, and asked a question with an image."""

import json
import sys
import urllib.request

import pytest

from prism_pl.__main__ import main
from prism_pl.images import image_part, open_image
from prism_pl.policy import PolicySpec, build_policy
from prism_pl.processor import chat_messages
from prism_pl.rollout import Sampling, TransformersEngine
from scripts.serving import listening, quiet_environment
from tests.conftest import make_examples

pytest.importorskip("vllm")
pytestmark = pytest.mark.slow

GREEDY = Sampling(temperature=0.0, max_tokens=24)


@pytest.fixture
def export(tmp_path, monkeypatch):
    """The folder that a fit leaves, its card in it."""
    monkeypatch.chdir(tmp_path)
    few = "--data.num_train 8 --data.num_validation 2 --data.batch_size 2 --trainer.limit_val_batches 0"
    one = "--trainer.max_steps 1 --trainer.default_root_dir run"
    assert main(["fit", "--config", "sft.yaml", *few.split(), *one.split()]) == 0
    folder = tmp_path / "run" / "export"
    assert "Made by supervised fine-tuning" in (folder / "README.md").read_text()
    return folder


@pytest.fixture
def url(export, tmp_path, monkeypatch):
    """A server's address. vLLM's CPU build has the module in the place of `vllm serve`."""
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(export)]
    command += ["--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "1G"]
    command += ["--served-model-name", "exported", "--no-enable-chunked-prefill"]
    monkeypatch.chdir(tmp_path)
    with listening(command, tmp_path / "log", quiet_environment() | {"TORCH_COMPILE_DISABLE": "1"}) as (_, address):
        yield address


def test_the_export_answers_a_question_with_an_image_as_the_policy_does(export, url):
    example = make_examples(1)[0]
    parts = [image_part(open_image(image, example.id)) for image in example.images]
    assert parts
    asked = {"model": "exported", "messages": chat_messages(example, parts), "temperature": 0, "max_tokens": 24}
    request = urllib.request.Request(
        f"{url}/v1/chat/completions", json.dumps(asked).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as answer:
        said = json.load(answer)
    spec = PolicySpec(str(export))
    processor = spec.processor()
    assert said["usage"]["prompt_tokens"] == processor.prompt_length(example)
    engine = TransformersEngine()
    engine.start(build_policy(spec).eval(), processor, rank=0)
    (rollout,) = engine.generate([example], 1, GREEDY)
    assert said["choices"][0]["message"]["content"] == rollout.text
