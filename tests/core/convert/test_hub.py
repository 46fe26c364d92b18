"""Models of a hub: the real client against a hub on this machine, and a stand-in for one that is not installed."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import types
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from urllib.parse import unquote, urlsplit

import pytest

from minigpt.core.convert import hub
from minigpt.core.errors import DataError, MissingError, UsageError

COMMITS = {"main": "a" * 40, "v1": "b" * 40}
FILES = {
    "config.json": b'{"model_type": "llama"}',
    "model.safetensors": b"not really",
    "tokenizer.json": b"{}",
    "README.md": b"---\nlicense: mit\n---\n",
    "pytorch_model.bin": b"a pickle",
    "original/consolidated.safetensors": b"a copy",
    "consolidated.safetensors": b"a copy",
}


class Hub(BaseHTTPRequestHandler):
    """As much of the Hugging Face hub as a download asks for: one repository, two revisions, one that is gated."""

    asked: list[str] = []  # noqa: RUF012  (of all requests)

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(path)
        if path.startswith("/api/models/org/gated"):
            return self.answer(403, {"error": "gated"}, {"X-Error-Code": "GatedRepo"})
        if not path.startswith(("/api/models/org/name", "/org/name/resolve/")):
            return self.answer(404, {"error": "no"}, {"X-Error-Code": "RepoNotFound"})
        revision = path.split("/")[6] if path.startswith("/api") and len(path.split("/")) > 6 else "main"
        if path.startswith("/org/name/resolve/"):
            _, _, _, _, commit, file = path.split("/", 5)
            body = FILES[file]
            return self.answer(200, body, {"X-Repo-Commit": commit, "ETag": hashlib.sha256(body).hexdigest()})
        if revision not in (*COMMITS, *COMMITS.values()):
            return self.answer(404, {"error": "no"}, {"X-Error-Code": "RevisionNotFound"})
        if "/tree/" in path:
            return self.answer(200, [{"type": "file", "path": n, "size": len(b), "oid": "1"} for n, b in FILES.items()])
        siblings = [{"rfilename": name} for name in FILES]
        commit = COMMITS.get(revision, revision)
        return self.answer(200, {"id": "org/name", "modelId": "org/name", "sha": commit, "siblings": siblings})

    def answer(self, code: int, body: object, headers: dict[str, str] | None = None) -> None:
        raw = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(code)
        for key, value in {"Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(raw)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    made = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_port}"
    made.shutdown()


FETCH = """
import json, sys
from minigpt.core.convert.hub import fetch
from minigpt.core.errors import MinigptError
try:
    print(json.dumps([str(x) for x in fetch(sys.argv[1])]))
except MinigptError as e:
    print(json.dumps({"kind": e.kind, "message": e.message, "found": e.found, "fix": e.fix}))
"""


def fetch(spec: str, server: str, home: Path, **more: str) -> object:
    """What `fetch` gives in a process that knows no other hub."""
    env = {**os.environ, "HF_ENDPOINT": server, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", **more}
    for name in ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_HUB_CACHE"):
        env.pop(name, None)
    done = subprocess.run([sys.executable, "-c", FETCH, spec], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # and nothing else was on stdout


@pytest.mark.slow
def test_a_model_is_fetched(server, tmp_path):
    """What a model needs, nothing else; the commit is told; the second time, and offline, from the cache."""
    path, origin = fetch("hf:org/name", server, tmp_path)
    assert origin == f"hf:org/name@{COMMITS['main']}"
    assert sorted(p.name for p in Path(path).iterdir()) == [
        "README.md", "config.json", "model.safetensors", "tokenizer.json"
    ]  # fmt: skip
    assert (Path(path) / "config.json").read_bytes() == FILES["config.json"]
    assert fetch("hf:org/name", server, tmp_path, MINIGPT_OFFLINE="1") == [path, origin]
    _, older = fetch("hf:org/name@v1", server, tmp_path)
    assert older == f"hf:org/name@{COMMITS['v1']}"


@pytest.mark.slow
def test_what_the_hub_refuses_is_told(server, tmp_path):
    """No such model, no such revision, terms to accept, no connection, never fetched: each with its own way out."""
    for spec, word in (
        ("hf:org/none", "look at the name"),
        ("hf:org/name@v9", "behind the @"),
        ("hf:org/gated", "accept the terms"),
    ):
        found = fetch(spec, server, tmp_path)
        assert found["kind"] == "data" and spec in found["message"] and word in found["fix"], found
    offline = fetch("hf:org/name", server, tmp_path / "empty", MINIGPT_OFFLINE="1")
    assert "MINIGPT_OFFLINE" in offline["fix"]
    nobody = fetch("hf:org/name", "http://127.0.0.1:9", tmp_path / "empty")
    assert "HF_ENDPOINT" in nobody["fix"], nobody


@pytest.fixture
def modelscope(monkeypatch, tmp_path):
    """A client that takes what ModelScope's takes, and talks on stdout as that does."""
    asked = []

    def snapshot_download(model_id, revision=None, local_files_only=False, allow_patterns=None, ignore_patterns=None):
        print("Downloading…")
        asked.append((model_id, revision, local_files_only))
        if model_id == "org/none":
            raise RuntimeError("404")
        return str(tmp_path)

    monkeypatch.setitem(sys.modules, "modelscope", types.SimpleNamespace(snapshot_download=snapshot_download))
    return asked


def test_modelscope(modelscope, tmp_path, capsys, monkeypatch):
    """The same names with ms:; a client's talk stays off stdout."""
    assert hub.fetch("ms:org/name") == (tmp_path, "ms:org/name")
    assert hub.fetch("ms:org/name@v1.0") == (tmp_path, "ms:org/name@v1.0")
    monkeypatch.setenv("MINIGPT_OFFLINE", "1")
    hub.fetch("ms:org/name")
    assert modelscope == [("org/name", None, False), ("org/name", "v1.0", False), ("org/name", None, True)]
    assert capsys.readouterr().out == ""
    monkeypatch.delenv("MINIGPT_OFFLINE")
    with pytest.raises(DataError, match="ms:org/none cannot be fetched") as e:
        hub.fetch("ms:org/none")
    assert e.value.found == "RuntimeError: 404"


def test_a_missing_client_is_named(monkeypatch):
    """With the command that installs it."""
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(MissingError) as e:
        hub.fetch("ms:org/name")
    assert e.value.fix == "pip install modelscope"


@pytest.mark.parametrize("spec", ["hf:", "hf:name", "hf:org/name/more", "ms:org/na me", "hf:org/name@", "hf:../x"])
def test_malformed_names(spec):
    """They are told as such; nothing is asked of a hub."""
    assert hub.is_spec(spec)
    with pytest.raises(UsageError) as e:
        hub.fetch(spec)
    assert "hf:org/name" in e.value.fix


def test_paths_are_no_names(tmp_path, monkeypatch):
    """A file of that name goes before the hub; other words are paths."""
    monkeypatch.chdir(tmp_path)
    assert not any(map(hub.is_spec, ("runs/x", "org/name", r"C:\models\x", "hfx:org/name", "./hf:a/b")))
    (tmp_path / "hf:org").mkdir()
    (tmp_path / "hf:org" / "name").touch()
    assert not hub.is_spec("hf:org/name")
