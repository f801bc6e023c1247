"""A small HTTP server that answers as `vllm serve` does, and can be told to fail."""

import json
import threading
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from prism_pl.processor import Processor
from prism_pl.rollout.contract import StreamDigest
from prism_pl.rollout.vllm_server_facts import ServerFacts, architecture
from prism_pl.rollout.vllm_server_files import read_buckets

# What a chat request meets instead of an answer: a status, or an answer that is cut off half-way.
CUT = -1

# Calls whose body vLLM 0.24 reads as JSON: an empty one is refused.
READ_AS_JSON = ("/collective_rpc", "/init_weight_transfer_engine", "/start_weight_update", "/update_weights")


class FakeVLLM:
    """Answers chat requests without images, each sample being the request's seed spelled in digits.

    Attributes:
        trouble: what the next chat requests meet, a status or CUT, in turn; 0 is an answer.
        refuse: questions that always meet a status.
        change: alters an answer to a chat request on its way out.
        asked: the bodies of all chat requests; `called`: every other call, by path or method, in order.
        version: which weights the fake says it holds.
        before_answer: called before each chat request is answered.
        before_load: called before weights are loaded; CUT, once, in the place of a load and of its answer.
        model: its name.
    """

    def __init__(self, processor: Processor, config: Any, **facts: Any) -> None:
        self.processor = processor
        known: dict[str, Any] = {
            "version": "0.32.0",
            "device": "cpu",
            "dtype": "float32",
            "max_model_len": 2048,
            "logprobs_mode": "processed_logprobs",
            "generation_config": "vllm",
            "chunked_prefill": False,
            "sleep_mode": False,
            "transfer": None,
            "image_options": {},
            "architecture": architecture(config, config.tie_word_embeddings),
            "parameters": [],
        }
        self.facts = ServerFacts(**(known | facts))
        self.trouble: list[int] = []
        self.refuse: dict[str, int] = {}
        self.change: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.before_answer: Callable[[], Any] = lambda: None
        self.before_load: Callable[[], int] | None = None
        self.model = "served"
        self.asked: list[dict[str, Any]] = []
        self.called: list[str] = []
        self.version: str | None = None
        self.spoil = 0  # added to each checksum that is received
        self.rpc_status = 200
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.url = f"http://127.0.0.1:{self._server.server_port}"
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def answer(self, path: str, body: Any) -> tuple[int, Any]:
        """Status and answer; a body of None was empty."""
        if path == "/v1/models":
            return 200, {"data": [{"id": self.model}]}
        if path == "/v1/chat/completions":
            return self._chat(body)
        if body is None and path in READ_AS_JSON:
            return 400, {"error": {"message": "Invalid JSON format"}}
        method = body.get("method", path) if body else path
        with self._lock:
            self.called.append(method)
        if path == "/collective_rpc":
            if self.rpc_status != 200:
                return self.rpc_status, {"error": {"message": f"no {method} here"}}
            if method == "prism_load" and self.before_load is not None:
                before_load, self.before_load = self.before_load, None
                return before_load(), None
            return 200, {"results": [self._rpc(method, body["args"])]}
        if path == "/get_world_size":
            return 200, {"world_size": 1}
        return 200, {"success": True} if path == "/reset_prefix_cache" else None

    def _rpc(self, method: str, args: list[str]) -> Any:
        if method == "prism_facts":
            return self.facts.as_dict()
        if method == "prism_load":
            digest = StreamDigest()
            for bucket in read_buckets(Path(args[0])):
                digest.add(bucket)
            self.version = args[1]
            received = [(names, head, bits + self.spoil) for names, head, bits in digest.entries()]
            return {"loaded": self.facts.parameters, "received": received}
        if method == "prism_watch":
            return {}
        if method == "prism_finish":
            return {"loaded": [], "received": []}
        assert method == "prism_version"
        return {"version": self.version}

    def _chat(self, body: dict[str, Any]) -> tuple[int, Any]:
        with self._lock:
            self.asked.append(body)
            met = self.trouble.pop(0) if self.trouble else 0
        met = self.refuse.get(body["messages"][1]["content"][-1]["text"], met)
        if met > 0:
            return met, {"error": {"message": "as the test wants it"}}
        self.before_answer()
        tokenizer = self.processor.tokenizer
        text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        with self._lock:  # a tokenizer holds its options while it works
            choices = [self._choice(i, body["seed"] + i) for i in range(body["n"])]
            answer = {"prompt_token_ids": tokenizer(text, add_special_tokens=False).input_ids, "choices": choices}
        return (CUT if met == CUT else 200), self.change(answer)

    def _choice(self, index: int, seed: int) -> dict[str, Any]:
        ids = self.processor.response_ids(str(seed))
        content = [{"token": f"token_id:{i}", "logprob": -0.5} for i in ids]
        return {"index": index, "token_ids": ids, "logprobs": {"content": content}, "finish_reason": "stop"}

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        fake = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer()

            def do_POST(self) -> None:
                self._answer()

            def _answer(self) -> None:
                length = int(self.headers.get("Content-Length") or 0)
                body = json.loads(self.rfile.read(length)) if length else None
                status, answer = fake.answer(self.path, body)
                text = b"" if answer is None and status != CUT else json.dumps(answer).encode()
                self.send_response(200 if status == CUT else status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text[: len(text) // 2] if status == CUT else text)

            def log_message(self, format: str, *args: Any) -> None:
                """Says nothing."""

        return Handler
