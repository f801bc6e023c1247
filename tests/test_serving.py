"""A server for as long as a context lasts, played by one that answers /health and has a child."""

import os
import shlex
import time
import urllib.request
from contextlib import suppress
from pathlib import Path

import pytest

from prism_pl.rollout.vllm_server_facts import launch_line
from scripts import serving

SERVER = """
import http.server, os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
told = [str(child.pid), os.environ["OF_THE_LINE"], os.environ["OF_THE_CALL"], str(os.environ.get("VLLM_LOGGING_LEVEL"))]
class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(" ".join(told + sys.argv[1:3]).encode())
port = int(sys.argv[sys.argv.index("--port") + 1])
http.server.HTTPServer(("127.0.0.1", port), Handler).serve_forever()
"""


def runs(pid: int) -> bool:
    with suppress(OSError):
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    return False


def served(monkeypatch, tmp_path, source):
    (tmp_path / "server.py").write_text(source)
    line = f"OF_THE_LINE=1 python {tmp_path}/server.py"
    monkeypatch.setattr(serving, "launch_line", lambda path, device, images: line)
    environment = {"OF_THE_CALL": "2"}
    return serving.serving("policy", "cpu", "--option", "x", log=tmp_path / "log", environment=environment)


def test_a_server_has_its_environment_and_dies_with_all_that_it_started(monkeypatch, tmp_path):
    monkeypatch.setenv("VLLM_LOGGING_LEVEL", "CRITICAL")  # as an engine inside this process would set it
    with served(monkeypatch, tmp_path, SERVER) as (process, url):
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            child, *told = answer.read().decode().split()
        assert told == ["1", "2", "None", "--option", "x"]
        assert process.pid == os.getpgid(int(child))
        assert runs(int(child))
    end = time.monotonic() + 5
    while runs(int(child)) and time.monotonic() < end:
        time.sleep(0.01)
    assert not runs(int(child))
    assert process.poll() is not None


def test_a_server_that_does_not_start_is_shown_with_its_log(monkeypatch, tmp_path):
    starting = served(monkeypatch, tmp_path, "raise SystemExit('no such option')")
    with pytest.raises(RuntimeError, match=r"did not start:\n(?s:.*)no such option"), starting:
        pass


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_line_is_taken_apart_as_a_shell_does(device):
    line = launch_line("/a/policy", device, {"size": {"longest_edge": 1}})
    variables, program, arguments = serving._words(line)
    assert variables["VLLM_SERVER_DEV_MODE"] == "1"
    assert [*(f"{name}={value}" for name, value in variables.items()), program, *arguments] == shlex.split(line)
    assert program == {"cpu": "python", "cuda": "vllm"}[device]
    assert '{"size": {"longest_edge": 1}}' in arguments
