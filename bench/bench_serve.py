"""Requests per second and latencies of servers on this machine, interleaved: ours at several speeds, and two others.

    python bench/bench_serve.py MODEL --data data/ag_news/test.tsv --seconds 8

Servers: `fastkd serve`; the same full classifier by the layers of transformers behind FastAPI with dynamic batching, as
people write it (this file's `baseline` command); and infinity-emb where its command is given, with a classifier of the
same encoder that `plain` wrote. Each server is a process of its own, one at a time. Clients are threads of this
process, on loopback only, and each waits for its answer before it asks again.

    python bench/bench_serve.py plain MODEL /tmp/plain
    python bench/bench_serve.py MODEL --infinity infinity_emb --plain /tmp/plain

    python bench/bench_serve.py soak MODEL --seconds 900       # memory of the server at 80 % load, and its slope
    python bench/bench_serve.py overload MODEL --slow 0.1 --fast 0.5      # p99 at twice the load that it can carry
    python bench/bench_serve.py replicas MODEL --seconds 120   # one of Ray's replicas is killed every 20 s under load
"""

from __future__ import annotations

import asyncio
import http.client
import json
import os
import random
import shlex
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import typer

app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)
ROOT = Path(__file__).parents[1]
_MOST_SECONDS, _MOST_CLIENTS = 3600, 256
Ask = Callable[[str], tuple[str, dict[str, Any]]]


@dataclass
class Load:
    """What a load of clients has seen."""

    seconds: float
    latencies: list[float] = field(default_factory=list)
    statuses: Counter[int] = field(default_factory=Counter)

    @property
    def rate(self) -> float:
        return len(self.latencies) / self.seconds

    def percentile(self, percent: float) -> float:
        ordered = sorted(self.latencies)
        return ordered[min(len(ordered) - 1, int(percent / 100 * len(ordered)))] if ordered else float("nan")

    def row(self) -> str:
        p50, p95, p99 = (1000 * self.percentile(percent) for percent in (50, 95, 99))
        others = {status: count for status, count in sorted(self.statuses.items()) if status != 200}
        return f"{self.rate:8.1f} {p50:9.1f} {p95:9.1f} {p99:9.1f}  {others or ''}"


def texts_of(data: Path | None, count: int = 2000) -> list[str]:
    """Texts of a .tsv file with a header, drawn once; without one made-up texts of AG News' lengths."""
    draw = random.Random(0)
    if data is None:
        words = (
            "market",
            "team",
            "the",
            "of",
            "science",
            "won",
            "company",
            "on",
            "Tuesday",
            "new",
            "space",
            "minister",
        )
        return [" ".join(draw.choices(words, k=max(8, round(draw.gauss(38, 10))))) for _ in range(count)]
    header, *lines = data.read_text(encoding="utf-8").splitlines()
    columns = header.split("\t")
    place = next(columns.index(name) for name in ("text_a", "text", "sentence") if name in columns)
    return draw.sample([line.split("\t")[place] for line in lines if line], min(count, len(lines)))


def under_load(port: int, ask: Ask, texts: Sequence[str], clients: int, seconds: float, rate: float = 0.0) -> Load:
    """Clients that ask one after the other for so long; `rate` requests a second together, 0: as many as they can."""
    if not 1 <= clients <= _MOST_CLIENTS or not 0 < seconds <= _MOST_SECONDS:
        raise ValueError(f"clients: got {clients} for {seconds} s, expected at most {_MOST_CLIENTS}, {_MOST_SECONDS} s")
    load, lock = Load(seconds), threading.Lock()
    began = time.perf_counter()
    end = began + seconds

    def client(number: int) -> None:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
        turn, next_at = number, began + (number / rate if rate else 0)
        while time.perf_counter() < end:
            if rate:
                time.sleep(max(0.0, next_at - time.perf_counter()))
            path, body = ask(texts[turn % len(texts)])
            # with a rate what counts is when it was to be sent, so that a slow server cannot slow down its load
            sent = next_at if rate else time.perf_counter()
            try:
                connection.request("POST", path, json.dumps(body), {"Content-Type": "application/json"})
                answer = connection.getresponse()
                answer.read()
                status = answer.status
            except (OSError, http.client.HTTPException):
                connection.close()
                status = 0
            took = time.perf_counter() - sent
            turn += clients
            next_at += clients / rate if rate else 0
            with lock:
                load.statuses[status] += 1
                if status == 200 and time.perf_counter() < end + 60:
                    load.latencies.append(took)

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    load.seconds = time.perf_counter() - began
    return load


@contextmanager
def process(command: Sequence[str], port: int, threads: int, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """A server that answers at `port`, with these variables in its environment."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), os.environ.get("PYTHONPATH", "")])
    environment = {
        **os.environ,
        "PYTHONPATH": path,
        "OMP_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        **variables,
    }
    with tempfile.TemporaryFile() as log:
        running = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
        yield from _while_it_runs(running, command, port, log)


def _while_it_runs(
    running: subprocess.Popen[bytes], command: Sequence[str], port: int, log: Any
) -> Iterator[subprocess.Popen[bytes]]:
    try:
        for _ in range(3000):
            if running.poll() is not None:
                log.seek(0)
                raise RuntimeError(f"{shlex.join(command)}: {log.read().decode()[-2000:]}")
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    break
            except OSError:
                pass
            time.sleep(0.1)
        yield running
    finally:
        running.send_signal(signal.SIGTERM)
        try:
            running.wait(40)
        except subprocess.TimeoutExpired:
            running.kill()


def fastkd_server(model: Path, port: int, *arguments: str) -> list[str]:
    return [sys.executable, "-m", "fastkd", "serve", str(model), "--port", str(port), "--max-queue-tokens", "1000000",
            *arguments]  # fmt: skip


def ask_fastkd(speed: float | None) -> Ask:
    return lambda text: ("/v1/classify", {"inputs": text} if speed is None else {"inputs": text, "speed": speed})


@app.command()
def compare(
    model: Annotated[Path, typer.Argument(help="An early-exit model.")],
    data: Annotated[Path | None, typer.Option(help="A .tsv file with texts; default: made-up ones.")] = None,
    clients: Annotated[str, typer.Option(help="How many at once.")] = "1,8,64",
    speeds: Annotated[str, typer.Option(help="Of the early exit.")] = "0,0.3,0.5",
    seconds: Annotated[float, typer.Option(help="Of each measurement.")] = 8.0,
    repeats: Annotated[int, typer.Option(help="Rounds over all servers; medians are shown.")] = 1,
    threads: Annotated[int, typer.Option(help="Processor threads of each server.")] = 2,
    tokens_per_run: Annotated[int, typer.Option(help="Of our server.")] = 1024,
    infinity: Annotated[str, typer.Option(help="The command infinity_emb, where it is installed.")] = "",
    plain: Annotated[
        Path | None, typer.Option(help="The full classifier for infinity, as transformers saves it.")
    ] = None,
) -> None:
    """Ours at several speeds, transformers behind FastAPI, and infinity, interleaved."""
    texts, port = texts_of(data), 8600
    servers: dict[str, tuple[list[str], Ask]] = {}
    for speed in map(float, speeds.split(",")):
        command = fastkd_server(model, port, "--tokens-per-run", str(tokens_per_run))
        servers[f"fastkd, speed {speed:g}"] = command, ask_fastkd(speed)
    command = [sys.executable, __file__, "baseline", str(model), "--port", str(port)]
    servers["transformers, FastAPI"] = command, lambda text: ("/predict", {"inputs": text})
    if infinity and plain is not None:
        command = [*shlex.split(infinity), "v2", "--model-id", str(plain), "--port", str(port), "--engine", "torch",
                   "--device", "cpu", "--no-bettertransformer", "--served-model-name", "model"]  # fmt: skip
        servers["infinity"] = command, lambda text: ("/classify", {"input": [text], "model": "model"})
    found: dict[tuple[str, int], list[Load]] = {}
    for _ in range(repeats):
        for name, (command, ask) in servers.items():
            with process(command, port, threads):
                under_load(port, ask, texts, 8, 1.0)
                for count in map(int, clients.split(",")):
                    load = under_load(port, ask, texts, count, seconds)
                    found.setdefault((name, count), []).append(load)
                    print(f"{name:<24} {count:>7} {load.row()}", file=sys.stderr, flush=True)
    print(f"{'server':<24} {'clients':>7} {'req/s':>8} {'p50 ms':>9} {'p95 ms':>9} {'p99 ms':>9}  other codes")
    for (name, count), loads in sorted(found.items(), key=lambda item: item[0][1]):
        median = sorted(loads, key=lambda load: load.rate)[len(loads) // 2]
        print(f"{name:<24} {count:>7} {median.row()}")


@app.command()
def overload(
    model: Annotated[Path, typer.Argument(help="An early-exit model with a certificate.")],
    slow: Annotated[float, typer.Option(help="The server's speed.")] = 0.1,
    fast: Annotated[float, typer.Option(help="Its speed under pressure; certified.")] = 0.5,
    data: Annotated[Path | None, typer.Option(help="A .tsv file with texts.")] = None,
    seconds: Annotated[float, typer.Option(help="Of each measurement.")] = 20.0,
    threads: Annotated[int, typer.Option(help="Processor threads of the server.")] = 2,
    queue: Annotated[int, typer.Option(help="--max-queue-tokens.")] = 8192,
) -> None:
    """p99 at twice the load that the server can carry, with and without speed under pressure."""
    texts, port = texts_of(data), 8601
    usual = [sys.executable, "-m", "fastkd", "serve", str(model), "--port", str(port), "--max-queue-tokens", str(queue),
             "--speed", str(slow)]  # fmt: skip
    with process(usual, port, threads):
        carried = under_load(port, ask_fastkd(None), texts, 64, seconds / 2).rate
    print(f"carried at speed {slow:g}: {carried:.1f} requests a second; load: {2 * carried:.1f}")
    print(f"{'':<24} {'':>7} {'req/s':>8} {'p50 ms':>9} {'p95 ms':>9} {'p99 ms':>9}  other codes")
    for name, more in (("without", []), ("with pressure speed", ["--pressure-speed", str(fast)])):
        with process([*usual, *more], port, threads):
            print(
                f"{name:<32} {under_load(port, ask_fastkd(None), texts, 192, seconds, 2 * carried).row()}", flush=True
            )


@app.command()
def soak(
    model: Annotated[Path, typer.Argument(help="An early-exit model.")],
    data: Annotated[Path | None, typer.Option(help="A .tsv file with texts.")] = None,
    seconds: Annotated[float, typer.Option(help="How long.")] = 900.0,
    speed: Annotated[float, typer.Option(help="Of the early exit.")] = 0.5,
    threads: Annotated[int, typer.Option(help="Processor threads of the server.")] = 2,
    hostile: Annotated[int, typer.Option(help="Hostile requests beside the load.")] = 10_000,
) -> None:
    """Resident memory of the server at 80 % of what it can carry, with hostile requests beside; and its slope."""
    sys.path.insert(0, str(ROOT / "tests"))
    from test_serving import hostile as hostile_request

    texts, port = texts_of(data), 8602
    with process(fastkd_server(model, port, "--speed", str(speed)), port, threads) as running:
        carried = under_load(port, ask_fastkd(None), texts, 32, min(10.0, seconds / 4)).rate
        codes: Counter[int] = Counter()
        draw = random.Random(1)

        def attack() -> None:
            for _ in range(hostile):
                method, path, content, headers = hostile_request(draw)
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
                try:
                    connection.request(method, path, content, headers)
                    codes[connection.getresponse().status] += 1
                except (OSError, http.client.HTTPException, ValueError):
                    codes[0] += 1
                connection.close()

        attacker = threading.Thread(target=attack, daemon=True)
        attacker.start()
        seen: list[tuple[float, float]] = []
        began, parts = time.monotonic(), 20
        for _ in range(parts):
            load = under_load(port, ask_fastkd(None), texts, 32, seconds / parts, 0.8 * carried)
            pages = int(Path(f"/proc/{running.pid}/statm").read_text(encoding="utf-8").split()[1])
            seen.append((time.monotonic() - began, pages * 4096 / 2**20))
            print(f"{seen[-1][0]:7.0f} s {seen[-1][1]:8.1f} MiB  {load.row()}", flush=True)
        attacker.join(60)
        half = seen[len(seen) // 2 :]
        slope = (half[-1][1] - half[0][1]) / (half[-1][0] - half[0][0]) * 60
        print(f"second half: {slope:+.3f} MiB a minute; hostile requests by code: {dict(sorted(codes.items()))}")


_TRY_AGAIN = {429, 503, 504}
"""What a client may ask again after."""


@app.command()
def replicas(
    model: Annotated[Path, typer.Argument(help="An early-exit model.")],
    data: Annotated[Path | None, typer.Option(help="A .tsv file with texts.")] = None,
    seconds: Annotated[float, typer.Option(help="How long.")] = 120.0,
    every: Annotated[float, typer.Option(help="Seconds between two kills.")] = 20.0,
    count: Annotated[int, typer.Option(help="Replicas.")] = 2,
    clients: Annotated[int, typer.Option(help="At once.")] = 16,
    speed: Annotated[float, typer.Option(help="Of the early exit.")] = 0.5,
    threads: Annotated[int, typer.Option(help="Processor threads of each replica.")] = 1,
) -> None:
    """A replica of Ray Serve dies every so often under load: each request is answered once, or may be tried again.

    That none was answered twice is read in the replicas' logs, which have the number that each request was sent with.
    Ends with 1 where it is not so.
    """
    texts, port = texts_of(data), 8603
    command = fastkd_server(model, port, "--speed", str(speed), "--replicas", str(count), "--threads", str(threads))
    with tempfile.TemporaryDirectory(prefix="ray", dir="/tmp") as folder:  # a short name: sockets lie below it
        with process(command, port, threads, RAY_TMPDIR=folder) as running:
            labels = {text: _asked(port, text, "before")[1] for text in texts[:200]}
            seen = _kill_and_ask(running.pid, port, labels, clients, seconds, every)
        answered = _answered_by_replicas(Path(folder))
    statuses = Counter(status for status, *_ in seen.values())
    times = Counter(answered[number] for number, (status, *_) in seen.items() if status == 200)
    twice = sum(answered[number] > 1 for number in seen)
    wrong = sum(not is_right for status, is_right, _ in seen.values() if status == 200)
    print(
        f"requests by code: {dict(sorted(statuses.items()))}; answered requests by answers in the logs: {dict(times)}"
    )
    longest = max(took for *_, took in seen.values())
    print(f"answered twice: {twice}; another request's answer: {wrong}; longest wait: {longest:.1f} s")
    if twice or wrong or set(times) != {1} or not set(statuses) <= {200, *_TRY_AGAIN}:
        raise typer.Exit(1)


def _asked(port: int, text: str, number: str) -> tuple[int, str | None]:
    """Status, 0 where the connection broke, and label."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=120)
    try:
        headers = {"Content-Type": "application/json", "x-request-id": number}
        connection.request("POST", "/v1/classify", json.dumps({"inputs": text}), headers)
        answer = connection.getresponse()
        content = answer.read()
        return answer.status, json.loads(content)["answers"][0]["label"] if answer.status == 200 else None
    except (OSError, http.client.HTTPException):
        return 0, None
    finally:
        connection.close()


def _kill_and_ask(
    server: int, port: int, labels: dict[str, str | None], clients: int, seconds: float, every: float
) -> dict[str, tuple[int, bool, float]]:
    """Of each request, by its number, the status, whether its label was the expected one, and the seconds it took."""
    sys.path.insert(0, str(ROOT / "tests"))
    from serving_client import command_of, descendants

    seen: dict[str, tuple[int, bool, float]] = {}
    end = time.monotonic() + seconds
    texts = list(labels)

    def client(first: int) -> None:
        turn = first
        while time.monotonic() < end:
            number, text = f"{first}-{turn}", texts[turn % len(texts)]
            sent = time.monotonic()
            status, label = _asked(port, text, number)
            seen[number] = status, label == labels[text], time.monotonic() - sent
            turn += clients
            if status != 200:
                time.sleep(0.1)

    threads = [threading.Thread(target=client, args=(number,), daemon=True) for number in range(clients)]
    for thread in threads:
        thread.start()
    while time.monotonic() + every < end:
        time.sleep(every)
        victims = [pid for pid in descendants(server) if "ServeReplica" in command_of(pid)]
        if victims:
            os.kill(victims[0], signal.SIGKILL)
        codes = Counter(status for status, *_ in list(seen.values()))
        print(
            f"killed {victims[:1]} of {victims}; requests until now by code: {dict(sorted(codes.items()))}", flush=True
        )
    for thread in threads:
        thread.join()
    return seen


def _answered_by_replicas(folder: Path) -> Counter[str]:
    """How often each request was answered with 200, by the lines in the logs of Ray's workers."""
    found: Counter[str] = Counter()
    for path in folder.rglob("worker-*.err"):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("{") and (entry := json.loads(line)).get("status") == 200:
                found[entry["id"]] += 1
    return found


@app.command()
def plain(
    model: Annotated[Path, typer.Argument(help="An early-exit model.")],
    output: Annotated[Path, typer.Argument(help="Folder to write.")],
) -> None:
    """A classifier of transformers with the model's encoder and a head of random weights: as much work."""
    from transformers import AutoModelForSequenceClassification

    from fastkd.model.loading import load_model

    loaded, tokenizer = load_model(str(model), "cpu")
    config = loaded.config.backbone
    config.num_labels = loaded.config.num_labels
    classifier = AutoModelForSequenceClassification.from_config(config)
    classifier.base_model.load_state_dict(loaded.backbone.state_dict(), strict=False)
    classifier.save_pretrained(output)
    tokenizer.save_pretrained(output)


@app.command()
def baseline(
    model: Annotated[Path, typer.Argument(help="The model, whose full classifier is served.")],
    port: Annotated[int, typer.Option(help="Where.")] = 8600,
    most: Annotated[int, typer.Option(help="Rows of a batch.")] = 32,
    wait_ms: Annotated[float, typer.Option(help="How long a batch waits for company.")] = 5.0,
) -> None:
    """The full classifier by its own forward behind FastAPI, with dynamic batching as people write it."""
    import torch
    import uvicorn
    from fastapi import FastAPI, Request

    from fastkd.model.loading import load_model

    classifier, tokenizer = load_model(str(model), "cpu")
    waiting: asyncio.Queue[tuple[str, asyncio.Future[Any]]] = asyncio.Queue()

    def forward(texts: list[str]) -> list[list[float]]:
        batch = tokenizer(texts, padding=True, truncation=True, return_tensors="pt")
        with torch.inference_mode():
            # the layers of transformers as they are, padded, which is what its own classifier runs
            scores: list[list[float]] = classifier(**batch, speed=0.0, engine="batch").logits.softmax(-1).tolist()
        return scores

    async def batches() -> None:
        loop = asyncio.get_running_loop()
        while True:
            rows = [await waiting.get()]
            end = loop.time() + wait_ms / 1000
            while len(rows) < most and (left := end - loop.time()) > 0:
                try:
                    rows.append(await asyncio.wait_for(waiting.get(), left))
                except asyncio.TimeoutError:
                    break
            answers = await loop.run_in_executor(None, forward, [text for text, _ in rows])
            for (_, future), answer in zip(rows, answers, strict=True):
                if not future.done():
                    future.set_result(answer)

    server = FastAPI()
    tasks: list[asyncio.Task[None]] = []

    async def predict(request: Any) -> Any:
        if not tasks:
            tasks.append(asyncio.create_task(batches()))
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        await waiting.put(((await request.json())["inputs"], future))
        return await future

    # annotations of this file are text, which FastAPI looks up among its globals
    predict.__annotations__["request"] = Request
    server.post("/predict")(predict)

    @server.get("/health")
    async def health() -> str:
        return "ok"

    uvicorn.run(server, host="127.0.0.1", port=port, log_level="error", access_log=False)


if __name__ == "__main__":
    commands = {"compare", "overload", "soak", "replicas", "baseline", "plain", "--help"}
    if len(sys.argv) > 1 and sys.argv[1] not in commands:
        sys.argv.insert(1, "compare")
    app()
