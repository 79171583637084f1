# /// script
# requires-python = ">=3.10"
# dependencies = ["peft-quant[cli,gptq]"]
# ///
r"""Serve several adapters of one GPTQ base at once over HTTP: every batch may hold requests for all of them.

Without --serve, it is put under load: many clients ask for every adapter at the same time, one adapter is loaded
meanwhile, and each answer must be the one that its adapter gives alone. With the adapters of multi_task_switching:

    python examples/mixed_batch_serving/mixed_batch_serving.py \
        --model .cache/assets/smollm2-135m-instruct-gptq-4bit \
        --adapters .cache/multi_task_switching/king-james .cache/multi_task_switching/definitions

With your own, each a path or a Hub id, and then two requests:

    python mixed_batch_serving.py --model user/model-gptq-4bit --adapters user/one user/other --serve --port 8000
    curl localhost:8000/generate -d '{"prompt": "Hello", "adapter": "one"}'
    curl localhost:8000/adapters -d '{"name": "third", "path": "user/third"}'
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import cycle, islice
from pathlib import Path
from queue import Full, Queue
from threading import Thread
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen


os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # or threads spin while they wait for one that other work holds up
os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # or gptqmodel compiles every layer at its first forward

from peft import PeftModel
from transformers import AutoTokenizer

from peft_quant.evaluation.loading import load_model


BASE = "__base__"  # PEFT's name for no adapter
PROMPTS = [f'Define the noun "{noun}".\n' for noun in ("lighthouse", "sea", "letter of credit", "king")]
FULL = 429  # HTTP's "too many requests"


class Batcher:
    """A base with adapters, which answers in batches, on one thread. Answers are greedy.

    Args:
        base: GPTQ checkpoint.
        adapters: their paths or Hub ids, by name.
        batch_size: of requests that are answered together, at most; those that come meanwhile wait.
        capacity: how many may wait; more are refused.
        max_new_tokens: of an answer.
    """

    def __init__(
        self, base: str, adapters: dict[str, str], batch_size: int, capacity: int, max_new_tokens: int
    ) -> None:
        self.tokenizer = AutoTokenizer.from_pretrained(base, padding_side="left")
        self.tokenizer.pad_token = self.tokenizer.pad_token or self.tokenizer.eos_token
        self.batch_size, self.max_new_tokens = batch_size, max_new_tokens
        (first, path), *others = adapters.items()
        self.model = PeftModel.from_pretrained(load_model(base), path, adapter_name=first)
        for name, path in others:
            self.model.load_adapter(path, name)
        self.waiting: Queue[tuple[str, str, Future[list[int]]]] = Queue(capacity)
        self.batches = 0
        Thread(target=self._run, daemon=True).start()

    def submit(self, prompt: str, adapter: str) -> list[int]:
        """Wait for the answer. Raises `queue.Full` if too many requests are waiting."""
        known = [BASE, *self.model.peft_config]
        if adapter not in known:  # here, as it would spoil the batch
            raise ValueError(f"there is no adapter {adapter!r}, only {known}")
        answer: Future[list[int]] = Future()
        self.waiting.put_nowait((prompt, adapter, answer))
        return answer.result()

    def _run(self) -> None:
        while True:
            requests = [self.waiting.get()]
            while len(requests) < self.batch_size and not self.waiting.empty():
                requests.append(self.waiting.get())
            self.batches += 1
            prompts, names, answers = zip(*requests)
            try:
                for answer, tokens in zip(answers, self.generate(prompts, adapter_names=list(names))):
                    answer.set_result(tokens)
            except Exception as error:
                for answer in answers:
                    answer.set_exception(error)

    def generate(self, prompts: Sequence[str], **options: Any) -> list[list[int]]:
        """The new tokens of every prompt, without padding."""
        batch = self.tokenizer(list(prompts), padding=True, return_tensors="pt").to(self.model.device)
        options |= {"max_new_tokens": self.max_new_tokens, "pad_token_id": self.tokenizer.pad_token_id}
        tokens = self.model.generate(**batch, **options, do_sample=False)[:, batch["input_ids"].shape[1] :].tolist()
        for row in tokens:
            while row and row[-1] == self.tokenizer.pad_token_id:
                row.pop()
        return tokens


class Server(ThreadingHTTPServer):
    """A thread for each connection, which hands requests to the batcher and waits."""

    request_queue_size = 128
    daemon_threads = True

    def __init__(self, batcher: Batcher, port: int) -> None:
        self.batcher = batcher
        super().__init__(("127.0.0.1", port), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        batcher = self.server.batcher
        try:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path == "/adapters":
                batcher.model.load_adapter(body["path"], body["name"])  # between two batches
                self._reply(200, {"adapters": list(batcher.model.peft_config)})
            else:
                tokens = batcher.submit(body["prompt"], body.get("adapter", BASE))
                text = batcher.tokenizer.decode(tokens, skip_special_tokens=True)
                self._reply(200, {"text": text, "tokens": tokens})
        except Full:
            self._reply(FULL, {"error": "too many requests are waiting"})
        except Exception as error:
            self._reply(400, {"error": f"{type(error).__name__}: {error}"})

    def _reply(self, status: int, content: dict[str, Any]) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_: Any) -> None: ...


def post(url: str, **content: Any) -> Any:
    """Ask the server, again for as long as it is full."""
    while True:
        try:
            with urlopen(url, json.dumps(content).encode()) as response:
                return json.load(response)
        except HTTPError as error:
            if error.code != FULL:
                raise RuntimeError(error.read().decode()) from error
        time.sleep(0.01)


def load(server: Server, adapters: dict[str, str], prompts: list[str], number: int, clients: int) -> dict[str, float]:
    """Send requests for every adapter from many clients at once, while the last adapter is loaded again.

    Raises:
        RuntimeError: an answer is not the one of its adapter alone.
    """
    batcher, model = server.batcher, server.batcher.model
    expected = {}
    start = time.perf_counter()
    for adapter in adapters:
        model.set_adapter(adapter)
        expected |= {(prompt, adapter): batcher.generate([prompt])[0] for prompt in prompts}
    with model.disable_adapter():
        expected |= {(prompt, BASE): batcher.generate([prompt])[0] for prompt in prompts}
    one_at_a_time = len(expected) / (time.perf_counter() - start)

    first, *_, late = adapters
    model.set_adapter(first)
    model.delete_adapter(late)
    cases = list(islice(cycle(expected), number))

    def ask(case: tuple[str, str]) -> bool:
        prompt, adapter = case
        return post(f"{server.url}/generate", prompt=prompt, adapter=adapter)["tokens"] == expected[case]

    with ThreadPoolExecutor(clients) as pool:
        start = time.perf_counter()
        answers = [pool.submit(ask, case) for case in cases if case[1] != late]
        post(f"{server.url}/adapters", name=late, path=adapters[late])
        answers += [pool.submit(ask, case) for case in cases if case[1] == late]
        wrong = number - sum(answer.result() for answer in answers)
        together = number / (time.perf_counter() - start)
    if wrong:
        raise RuntimeError(f"{wrong} of {number} answers are not those of their adapter alone: please report this.")
    return {"one at a time": one_at_a_time, "mixed batches": together, "batch": number / batcher.batches}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="GPTQ checkpoint: path or Hub id")
    parser.add_argument("--adapters", nargs="+", required=True, help="at least two of one method: paths or Hub ids")
    parser.add_argument("--serve", action="store_true", help="until it is stopped, instead of the load test")
    parser.add_argument("--port", type=int, default=0, help="on loopback; a free one by default")
    parser.add_argument("--batch-size", type=int, default=8, help="requests answered together, at most")
    parser.add_argument("--capacity", type=int, default=32, help="requests that may wait; more are refused")
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--requests", type=int, default=96, help="of the load test")
    parser.add_argument("--clients", type=int, default=16, help="of the load test, all at once")
    parser.add_argument("--prompts", nargs="+", default=PROMPTS, help="of the load test")
    parser.add_argument(
        "--out", type=Path, default=Path(".cache/mixed_batch_serving"), help="directory for the result"
    )
    arguments = parser.parse_args()

    adapters = {Path(adapter).name: adapter for adapter in arguments.adapters}
    if len(adapters) < 2:
        parser.error("--adapters: at least two with different names")
    limits = arguments.batch_size, arguments.capacity, arguments.max_new_tokens
    server = Server(Batcher(arguments.model, adapters, *limits), arguments.port)
    if arguments.serve:
        print(f"{server.url}: {', '.join(adapters)}", flush=True)
        server.serve_forever()
    Thread(target=server.serve_forever, daemon=True).start()
    result = load(server, adapters, arguments.prompts, arguments.requests, arguments.clients)
    server.shutdown()
    arguments.out.mkdir(parents=True, exist_ok=True)
    (arguments.out / "load.json").write_text(json.dumps(result, indent=2))
    print(f"\n| | requests/s |\n|---|---|\n| one at a time | {result['one at a time']:.2f} |")
    ratio = result["mixed batches"] / result["one at a time"]
    print(
        f"| mixed batches, {result['batch']:.1f} requests each | {result['mixed batches']:.2f} ({ratio:.1f} times) |"
    )
    print(f"\n{arguments.requests} answers of {len(adapters)} adapters and the base: each is its adapter's own")


if __name__ == "__main__":
    main()
