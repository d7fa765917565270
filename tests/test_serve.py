"""`fastkd serve` as a process: it ends without losing what it accepted, loads anew, and says what is wrong."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import threading
import urllib.request
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("fastapi", reason="fastapi is not installed: pip install 'fastkd-kernels[serve]'")
pytest.importorskip("uvicorn", reason="uvicorn is not installed: pip install 'fastkd-kernels[serve]'")
pytest.importorskip("prometheus_client", reason="prometheus_client is not installed: pip install prometheus-client")
pytest.importorskip("httpx", reason="httpx is not installed: pip install httpx")
pytest.importorskip("datasets", reason="datasets is not installed: pip install datasets")

import uvicorn
from serving_client import ROOT, entries, post, save_model, server, until
from tiny_models import one_thread
from typer.testing import CliRunner

from fastkd.commands import app
from fastkd.serving.server import bound_socket

__all__ = ["one_thread"]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def get(address: str) -> str:
    with urllib.request.urlopen(address, timeout=60) as answer:
        return answer.read().decode()


@pytest.mark.slow
def test_sigterm_under_load_loses_nothing_that_was_accepted(model: Path) -> None:
    statuses: Counter[int] = Counter()
    with server(model, "--speed", 0.5) as (process, address):
        ended = threading.Event()

        def ask() -> None:
            while not ended.is_set():
                status, _ = post(address, "/v1/classify", {"inputs": ["good fun"] * 8})
                statuses[status] += 1
                if status == 0:
                    return

        clients = [threading.Thread(target=ask) for _ in range(8)]
        for client in clients:
            client.start()
        until(lambda: statuses[200] > 50)
        process.send_signal(signal.SIGTERM)
        _, text = process.communicate(timeout=60)
        ended.set()
        for client in clients:
            client.join(60)
    log = entries(text)
    assert process.returncode == 0
    assert log[-1]["event"] == "stopped"
    assert log[-1]["accepted"] == log[-1]["ended"] >= 8 * statuses[200]
    # what was not accepted was refused with a code that says to try again, or had no connection
    assert set(statuses) <= {200, 503, 0}
    answered = [entry for entry in log if entry["event"] == "request" and entry["status"] == 200]
    assert 8 * len(answered) == log[-1]["accepted"]


def test_answers_are_sent_at_once() -> None:
    with bound_socket(uvicorn.Config("none", host="127.0.0.1", port=0, log_config=None)) as listening:
        listening.listen()
        with socket.create_connection(listening.getsockname()), listening.accept()[0] as connection:
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY)


def test_sighup_loads_the_model_anew(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "served"
    shutil.copytree(model, folder)
    other = save_model(tmp_path / "other", seed=1)
    with server(folder) as (process, address):
        before = json.loads(get(address + "/info"))["model_sha"]
        for name in ("model.safetensors", "config.json"):
            shutil.copy(other / name, folder / name)
        process.send_signal(signal.SIGHUP)
        until(lambda: json.loads(get(address + "/info"))["model_sha"] != before)
        assert 'fastkd_reloads_total{outcome="done"} 1.0' in get(address + "/metrics")
        assert post(address, "/predict", {"inputs": "good"})[0] == 200


@pytest.mark.slow
def test_the_token_is_never_on_the_command_line(model: Path, tmp_path: Path) -> None:
    (tmp_path / "token").write_text("secret")
    with server(model, "--token-file", tmp_path / "token") as (process, address):
        body = {"inputs": "good"}
        assert post(address, "/predict", body)[0] == 401
        assert post(address, "/predict", body, Authorization="Bearer secret")[0] == 200
        line = Path(f"/proc/{process.pid}/cmdline")
        assert not line.exists() or b"secret" not in line.read_bytes()
    with server(model, FASTKD_API_KEY="other") as (process, address):
        assert post(address, "/predict", body)[0] == 401
        assert post(address, "/admin/reload", {}, Authorization="Bearer other")[0] == 200


def refused(*arguments: object) -> str:
    result = CliRunner().invoke(app.app, ["serve", *map(str, arguments)])
    assert result.exit_code == 2, result.output + repr(result.exception)
    return " ".join(result.output.split())


def test_what_cannot_be_served_is_said_before_anything_listens(model: Path, tmp_path: Path) -> None:
    assert "no certificate" in refused(model, "--pressure-speed", 0.5, "--port", 0)
    assert "criterion" in refused(model, "--criterion", "learned", "--port", 0)
    (tmp_path / "token").write_text(" ")
    assert "is empty" in refused(model, "--token-file", tmp_path / "token")
    assert "nowhere" in refused(tmp_path / "nowhere")


def test_a_missing_package_is_named_with_its_extra(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name == "uvicorn" else find(name, *a))
    assert "uvicorn not installed: pip install 'fastkd-kernels[serve]'" in refused(model)


def test_the_example_for_kubernetes_is_what_the_command_takes() -> None:
    import yaml

    names = set(
        re.findall(r"--[\w-]+", CliRunner().invoke(app.app, ["serve", "--help"], env={"COLUMNS": "200"}).output)
    )
    folder = ROOT / "docs" / "deploy"
    documents = [doc for path in sorted(folder.glob("*.yaml")) for doc in yaml.safe_load_all(path.read_text())]
    assert {document["kind"] for document in documents} >= {"Deployment", "Service", "RayService"}
    deployment = next(document for document in documents if document["kind"] == "Deployment")
    (container,) = deployment["spec"]["template"]["spec"]["containers"]
    assert set(re.findall(r"--[\w-]+", " ".join(container["args"]))) <= names
    assert container["readinessProbe"]["httpGet"]["path"] == "/health"
    grace = deployment["spec"]["template"]["spec"]["terminationGracePeriodSeconds"]
    assert grace > 30
    served = next(document for document in documents if document["kind"] == "RayService")
    (application,) = yaml.safe_load(served["spec"]["serveConfigV2"])["applications"]
    assert application["import_path"] == "fastkd.serving.ray_serve:application"
    from fastkd.serving.options import ServeOptions
    from fastkd.serving.ray_proxy import AFTER_REPLICAS, VARIABLES

    options = ServeOptions(**application["args"]["options"])
    wait = yaml.safe_load(served["spec"]["serveConfigV2"])["http_options"]["request_timeout_s"]
    assert wait == options.request_timeout + AFTER_REPLICAS
    cluster = served["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        assert VARIABLES.items() <= {entry["name"]: entry.get("value") for entry in container["env"]}.items()


def test_the_dockerfile_starts_the_command_as_a_plain_user() -> None:
    text = (ROOT / "docs" / "deploy" / "Dockerfile").read_text()
    steps = [line.split(maxsplit=1) for line in text.splitlines() if re.match(r"[A-Z]+ ", line)]
    assert steps[0][0] == "FROM"
    assert ["USER", "fastkd"] in steps
    (entry,) = [json.loads(rest) for name, rest in steps if name == "ENTRYPOINT"]
    assert entry == ["fastkd", "serve"]


def browser_page(model: Path) -> Any:
    from test_report_page import BROWSER, DRIVER, webdriver

    if BROWSER is None or DRIVER is None:
        pytest.skip("no Chromium with chromedriver here: install chromium and chromium-driver to test the page")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    return webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))


@pytest.mark.slow
def test_the_page_shows_after_which_layer_a_text_left(model: Path) -> None:
    pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    from selenium.webdriver.common.by import By
    from selenium.webdriver.support.ui import WebDriverWait

    browser = browser_page(model)
    try:
        with server(model, FASTKD_API_KEY="secret") as (_, address):
            browser.get(address)

            def wait(script: str) -> None:
                WebDriverWait(browser, 60, 0.05).until(lambda it: it.execute_script(f"return {script}"))

            def ask(speed: float) -> int:
                before = int(browser.execute_script("return document.documentElement.dataset.answered || 0"))
                move = "const it = document.getElementById('speed'); it.value = arguments[0];"
                browser.execute_script(move + " it.dispatchEvent(new Event('input'));", speed)
                browser.find_element(By.TAG_NAME, "button").click()
                wait(f"document.documentElement.dataset.answered > {before}")
                return len(browser.find_elements(By.CSS_SELECTOR, "#layers .ran"))

            wait("document.documentElement.dataset.ready === 'true'")
            text = browser.find_element(By.ID, "text")
            text.clear()
            text.send_keys("good fun")
            assert ask(0.0) == 0
            assert "token" in browser.find_element(By.ID, "problem").text
            browser.find_element(By.ID, "token").send_keys("secret")
            for speed in (0.0, 1.0):
                right = {"Authorization": "Bearer secret"}
                status, body = post(address, "/v1/classify", {"inputs": "good fun", "speed": speed}, **right)
                assert status == 200
                (expected,) = body["answers"]
                assert ask(speed) == expected["exit_layer"]
                assert browser.find_element(By.ID, "label").text == expected["label"]
                assert len(browser.find_elements(By.CSS_SELECTOR, "#layers div")) == body["layers"]
            browser.get(address + "/docs")
            wait("document.documentElement.dataset.ready === 'true'")
            assert "POST /v1/classify" in browser.page_source
            problems = [entry["message"] for entry in browser.get_log("browser") if entry["level"] == "SEVERE"]
            assert [text for text in problems if "401" not in text and "favicon" not in text] == []
    finally:
        browser.quit()


def test_variables_of_the_environment_are_in_the_page_on_them() -> None:
    assert "FASTKD_API_KEY" in (ROOT / "docs" / "environment-variables.md").read_text()
