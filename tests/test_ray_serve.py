"""The server by Ray Serve: the answers and codes of the one process, and a replica that dies."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("ray", reason="ray is not installed: pip install 'fastkd-kernels[serve,ray]'")
pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'fastkd-kernels[serve]'")
pytest.importorskip("httpx", reason="httpx is not installed: pip install httpx")

import httpx
import ray
from ray import serve
from serving_client import ROOT, TEXTS, command_of, descendants, post, save_model, server, serving, until
from test_serving import hostile

from fastkd.serving import ray_serve
from fastkd.serving.options import ServeOptions


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def address(model: Path) -> Iterator[str]:
    """Two replicas on this machine."""
    path = {"PYTHONPATH": f"{ROOT}:{ROOT / 'python'}:{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
    ray.init(num_cpus=3, include_dashboard=False, runtime_env={"env_vars": path | ray_serve.JOB_VARIABLES})
    try:
        options = ServeOptions(model=str(model), port=8497, request_timeout=10.0)
        ray_serve.start_proxy(options)
        serve.run(ray_serve.bound(options, replicas=2, threads=1), name="fastkd", route_prefix="/")
        yield "http://127.0.0.1:8497"
    finally:
        serve.shutdown()
        ray.shutdown()


def test_same_answers_and_codes_as_the_one_process(model: Path, address: str) -> None:
    bodies: list[tuple[str, Any]] = [
        ("/v1/classify", {"inputs": list(TEXTS), "speed": 0.5}),
        ("/v1/classify", {"inputs": "good fun", "criterion": "margin", "speed": 0.4}),
        ("/predict", {"inputs": "good fun"}),
        ("/predict", {"inputs": [["good"], ["good", "bad"]]}),
        ("/predict", {"inputs": ["a", "b", "c"]}),
        ("/predict", {"inputs": 5}),
        ("/v1/classify", {"inputs": "a", "speed": 2}),
        ("/rerank", {"query": "a", "texts": ["b"]}),
    ]

    async def check(client: Any, service: Any) -> list[tuple[int, Any]]:
        answers = [await client.post(path, json=body) for path, body in bodies]
        return [(answer.status_code, answer.json()) for answer in answers]

    expected = serving(model, check)
    assert [post(address, path, body) for path, body in bodies] == expected


def test_hostile_requests_get_the_codes_of_the_one_process(model: Path, address: str) -> None:
    draw = random.Random(3)
    requests = [hostile(draw) for _ in range(200)]

    def codes(place: str) -> list[int]:
        found = []
        with httpx.Client(base_url=place, timeout=60) as client:
            for method, path, content, headers in requests:
                found.append(client.request(method, path, content=content, headers=headers).status_code)
        return found

    with server(model) as (_, alone):
        expected = codes(alone)
    differing = {
        (got, wanted, request[0], request[1])
        for got, wanted, request in zip(codes(address), expected, requests, strict=True)
        if got != wanted
    }
    assert not differing


def test_a_replica_that_dies_fails_its_own_requests_with_a_code_to_try_again(address: str) -> None:
    statuses: Counter[int] = Counter()
    ended = threading.Event()

    def ask() -> None:
        while not ended.is_set():
            statuses[post(address, "/v1/classify", {"inputs": "good fun"})[0]] += 1

    clients = [threading.Thread(target=ask) for _ in range(4)]
    for client in clients:
        client.start()
    until(lambda: statuses[200] > 20)
    victim = next(iter(_replicas()))
    ray.kill(victim, no_restart=True)
    until(lambda: statuses[200] > 60)
    ended.set()
    for client in clients:
        client.join(60)
    assert set(statuses) <= {200, 503}
    assert statuses[200] > 60


def test_without_a_ready_replica_a_request_fails_in_time_with_a_code_to_try_again(model: Path, address: str) -> None:
    def ask(more: dict[str, Any]) -> httpx.Response:
        headers = {"x-request-id": "mine", **more.get("headers", {})}
        body = {"inputs": "good fun", **more.get("body", {})}
        return httpx.post(address + "/v1/classify", json=body, headers=headers, timeout=60)

    away = model.rename(model.with_name("away"))  # no replica can start
    try:
        for replica in _replicas():
            ray.kill(replica, no_restart=True)
        others = [
            {"body": {"stream": True}},
            {"body": {"deadline_ms": 600_000}},
            {"headers": {"x-request-timeout-seconds": "0"}},
        ]
        with ThreadPoolExecutor(4) as clients:
            answers = list(clients.map(ask, [{}, *others]))
    finally:
        away.rename(model)
    for answer in answers:
        assert (answer.status_code, answer.json()["error_type"]) == (503, "Unhealthy")
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["x-request-id"] == "mine"
    # one may have been on its way to a replica that died; the others waited
    assert any("no replica was ready in time" in answer.json()["error"] for answer in answers)
    until(lambda: post(address, "/v1/classify", {"inputs": "good fun"})[0] == 200, 300)
    assert ask({}).headers["x-request-id"] == "mine"


def _replicas() -> list[Any]:
    names = [actor["name"] for actor in ray.util.list_named_actors(all_namespaces=True)]
    return [ray.get_actor(name, namespace="serve") for name in names if name.startswith("SERVE_REPLICA::fastkd#")]


@contextlib.contextmanager
def served_by_command(model: Path, port: int, **more: str) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """`fastkd serve` with two replicas, and its address, once it answers."""
    # sockets lie below it, whose names are short
    folder = tempfile.mkdtemp(prefix="ray", dir="/tmp")
    path = os.pathsep.join([str(ROOT), str(ROOT / "python"), *filter(None, sys.path)])
    command = [sys.executable, "-m", "fastkd", "serve", str(model), "--port", str(port), "--replicas", "2"]
    environment = {**os.environ, "PYTHONPATH": path, "RAY_TMPDIR": folder, "OMP_NUM_THREADS": "1", **more}
    process = subprocess.Popen([*command, "--threads", "1"], env=environment, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        until(
            lambda: process.poll() is not None or post(address, "/v1/classify", {"inputs": "good fun"})[0] == 200, 300
        )
        assert process.poll() is None, "the command has ended"
        yield process, address
    finally:
        for pid in [*descendants(process.pid), process.pid]:
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        process.wait()
        shutil.rmtree(folder, ignore_errors=True)


def test_sighup_reloads_every_replica_and_sigterm_ends_the_command_without_a_loss(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    shutil.copytree(model, folder)
    other = save_model(tmp_path / "other", seed=1)
    statuses: Counter[int] = Counter()
    ended = threading.Event()

    with served_by_command(folder, 8496) as (process, address):

        def ask() -> None:
            while not ended.is_set():
                statuses[status := post(address, "/v1/classify", {"inputs": "good fun"})[0]] += 1
                if status == 0:
                    return

        def fingerprints() -> set[str]:
            return {httpx.get(address + "/info", timeout=60).json()["model_sha"] for _ in range(16)}

        before = fingerprints()
        clients = [threading.Thread(target=ask) for _ in range(4)]
        for client in clients:
            client.start()
        for name in ("model.safetensors", "config.json"):
            shutil.copy(other / name, folder / name)
        process.send_signal(signal.SIGHUP)
        until(lambda: not fingerprints() & before, 120)
        assert set(statuses) == {200}, statuses
        process.terminate()
        assert process.wait(120) == 0
        ended.set()
        for client in clients:
            client.join(60)
    # what was not accepted was refused with a code that says to try again, or had no connection
    assert set(statuses) <= {200, 503, 0}, statuses


def test_without_its_head_node_nobody_waits_for_ever(model: Path) -> None:
    """Requests are answered, fail with a code to try again, or have no connection; the command ends when it is told."""
    body = {"inputs": "good fun"}
    with served_by_command(model, 8498, RAY_gcs_rpc_server_reconnect_timeout_s="5") as (process, address):
        (head,) = (pid for pid in descendants(process.pid) if "gcs_server" in command_of(pid))
        os.kill(head, signal.SIGKILL)
        statuses: Counter[int] = Counter()
        end = time.monotonic() + 30
        while time.monotonic() < end:
            began = time.monotonic()
            statuses[post(address, "/v1/classify", body)[0]] += 1
            assert time.monotonic() - began < 59, "post gives up after 60 seconds"
            time.sleep(0.05)
        assert set(statuses) <= {200, 503, 0}, statuses
        process.terminate()
        process.wait(120)
