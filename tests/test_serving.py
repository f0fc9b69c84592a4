"""`transformers serve` on a packed model: a client of OpenAI's gets what generate gives, whole and piece by piece."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from bwla_compiler import api, cli, serving
from tests import tiny
from tests.letters import letters

TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}<assistant>"
CHAT = [{"role": "user", "content": "Once upon"}]
TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A packed model with a tokenizer that knows a chat."""
    out = tmp_path_factory.mktemp("serving") / "out"
    model = tiny.make("llama")
    api.quantize(model, recipe="rtn")
    model.save_pretrained(out)
    tokenizer = letters()
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture
def address(folder: Path) -> Iterator[str]:
    """Serve the folder as a user does, by the command, on a free port."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "bwla_compiler", "serve", str(folder), "--host", "127.0.0.1", "--port", str(port)]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as server:
        try:
            _wait(server, f"http://127.0.0.1:{port}/health")
            yield f"http://127.0.0.1:{port}/v1"
        finally:
            server.send_signal(signal.SIGINT)
            server.communicate(timeout=60)


def _wait(server: subprocess.Popen[bytes], url: str, *, seconds: float = 180) -> None:
    """Wait until the server answers; fail with its words where it ends before."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if server.poll() is not None:
            pytest.fail(f"the server ended: {server.communicate()[0].decode()[-2000:]}")
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail("the server did not answer")


@pytest.mark.exhaustive
@pytest.mark.slow
def test_a_client_gets_the_text_of_generate(address: str, folder: Path) -> None:
    from openai import OpenAI

    loaded = api.load(folder)
    prompt = loaded.tokenizer.apply_chat_template(CHAT, tokenize=False)
    expected = api.generate(loaded.model, loaded.tokenizer, prompt, tokens=TOKENS, temperature=0)
    assert len(expected) == TOKENS
    asked: dict[str, Any] = {"model": str(folder), "max_tokens": TOKENS, "temperature": 0}
    with OpenAI(base_url=address, api_key="none", timeout=60) as client:
        whole = client.chat.completions.create(messages=CHAT, **asked)
        pieces = client.chat.completions.create(messages=CHAT, stream=True, **asked)
        texts = [choice.delta.content for piece in pieces for choice in piece.choices if choice.delta.content]
        plain = client.completions.create(prompt=prompt, **asked)
    assert whole.choices[0].message.content == expected
    assert "".join(texts) == expected
    assert len(texts) > 1, "the text came in one piece"
    assert plain.choices[0].text == expected


def test_options_reach_the_server(monkeypatch: pytest.MonkeyPatch) -> None:
    told: list[Any] = []
    monkeypatch.setattr(serving, "is_serve_available", lambda: True)
    monkeypatch.setattr("transformers.cli.transformers.app", lambda words, **_: told.append(words))
    assert cli.main(["serve", "OUT", "--port", "8080", "--compile"]) == 0
    assert told == [["serve", "OUT", "--port", "8080", "--compile"]]


def test_what_is_missing_is_one_clear_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr(serving, "is_serve_available", lambda: False)
    assert cli.main(["serve", "OUT"]) == 1
    assert "pip install 'bwla-compiler[serve]'" in capsys.readouterr().err

    def unreadable(*_: Any, **__: Any) -> None:
        raise OSError("OUT is no model")

    monkeypatch.setattr(serving, "is_serve_available", lambda: True)
    monkeypatch.setattr("transformers.cli.transformers.app", unreadable)
    assert cli.main(["serve", "OUT"]) == 1
    assert "error: OUT: cannot be served: OUT is no model" in capsys.readouterr().err
