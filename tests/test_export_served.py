"""An export as others take it: served by vLLM itself, nothing of ours in it, and asked a question with an image."""

import json
import os
import socket
import subprocess
import sys
import urllib.request

import pytest

from prism_pl.__main__ import main
from prism_pl.images import image_part, open_image
from prism_pl.policy import PolicySpec, build_policy
from prism_pl.processor import chat_messages
from prism_pl.rollout import Sampling, TransformersEngine
from tests.conftest import make_examples
from tests.test_vllm_server_live import stop, wait_for

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
def url(export, tmp_path):
    """A server's address. vLLM's CPU build has the module in the place of `vllm serve`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    inherited = {name: value for name, value in os.environ.items() if not name.startswith("VLLM_")}
    quiet = {"VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_OMP_THREADS_BIND": "nobind", "TORCH_COMPILE_DISABLE": "1"}
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server", "--model", str(export), "--port", port]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--enforce-eager", "--kv-cache-memory-bytes", "1G"]
    command += ["--served-model-name", "exported", "--no-enable-chunked-prefill"]
    with (tmp_path / "log").open("w") as log:
        process = subprocess.Popen(
            command, env=inherited | quiet, cwd=tmp_path, stdout=log, stderr=log, start_new_session=True
        )
    address = f"http://127.0.0.1:{port}"
    try:
        wait_for(address, process, tmp_path / "log")
        yield address
    finally:
        stop(process)


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
