"""Names of the Hub: the cache laid out by hand, offline; and a small server in the Hub's place."""

import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from graftwerk.checkpoints import hub
from graftwerk.checkpoints.hub import is_hub_name, resolve
from graftwerk.errors import UserError
from tests.graftwerk.learning_stage import environment

NAME, COMMIT, OTHER = "org/tiny", "a" * 40, "b" * 40
FILES = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors": b"weights",
    "pytorch_model.bin": b"pickled",
    "modeling_tiny.py": b"import os",
    "onnx/config.json": b"{}",
    "tf_model.h5": b"other weights",
}


@pytest.mark.parametrize("name", ["org/name", "meta-llama/Llama-2-7b-hf", "a/b.c_d"])
def test_an_organisation_and_a_repository_are_a_name(name):
    assert is_hub_name(name)


@pytest.mark.parametrize(
    "name",
    ["gpt2", "/org/name", "./name", "../name", "~/name", "a/b/c", "a/..", "a/b.nemo", "", "a/b c"],
)
def test_what_can_only_be_a_path_is_no_name(name):
    assert not is_hub_name(name)


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache for this process, and no way to the Hub."""
    from huggingface_hub import constants

    folder = tmp_path / "hub"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(folder))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.folder_of.cache_clear()
    return folder


def lay_out(cache: Path, files: dict[str, bytes], commit: str = COMMIT, ref: str = "main") -> Path:
    """A repository as the Hub's library keeps it: refs, blobs, and links to these."""
    home = cache / f"models--{NAME.replace('/', '--')}"
    snapshot = home / "snapshots" / commit
    (home / "refs").mkdir(parents=True, exist_ok=True)
    (home / "refs" / ref).write_text(commit)
    (home / "blobs").mkdir(exist_ok=True)
    for name, content in files.items():
        blob = home / "blobs" / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        link = snapshot / name
        link.parent.mkdir(parents=True, exist_ok=True)
        link.symlink_to(os.path.relpath(blob, link.parent))
    return snapshot


# ---- offline


def test_a_path_that_is_there_wins_over_a_name(cache, tmp_path, monkeypatch):
    lay_out(cache, FILES)
    (tmp_path / NAME).mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve(NAME) == Path(NAME)


def test_a_revision_of_a_path_is_refused(tmp_path):
    with pytest.raises(UserError, match="revision=v1 goes with a name of the Hub"):
        resolve(tmp_path, "v1")


def test_a_cached_repository_needs_no_network(cache):
    folder = lay_out(cache, FILES)
    assert resolve(NAME) == folder


def test_each_revision_is_a_folder_of_its_own(cache):
    main = lay_out(cache, FILES)
    tagged = lay_out(cache, {**FILES, "config.json": b'{"a": 1}'}, OTHER, "v1")
    assert resolve(NAME) == main
    assert resolve(NAME, "v1") == tagged
    assert resolve(NAME, OTHER) == tagged


@pytest.mark.parametrize("variable", ["HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"])
def test_what_is_not_cached_offline_is_one_line_that_names_the_variable(
    cache, monkeypatch, variable
):
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setenv(variable, "1")
    with pytest.raises(UserError) as error:
        resolve(NAME)
    said = str(error.value)
    assert said.startswith(f"{NAME}: no such path, not in the cache of the Hub ({cache}")
    assert said.endswith(f"{variable} forbids to download it: set {variable}=0")
    assert "\n" not in said


def test_a_repository_without_a_configuration_is_refused(cache):
    lay_out(cache, {"README.md": b"", "model.safetensors": b"x"})
    with pytest.raises(UserError, match=r"has no config\.json"):
        resolve(NAME)


# ---- a server in the Hub's place


class Hub(ThreadingHTTPServer):
    """Serves one repository by the Hub's paths; counts what is fetched."""

    daemon_threads = True

    def __init__(self, files: dict[str, bytes], error: str | None = None, token: str | None = None):
        super().__init__(("127.0.0.1", 0), _Answer)
        self.files, self.error, self.token = files, error, token
        self.fetched: Counter[str] = Counter()
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class _Answer(BaseHTTPRequestHandler):
    server: Hub  # pyright: ignore

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.answer(with_body=False)

    def do_GET(self) -> None:
        self.answer(with_body=True)

    def answer(self, with_body: bool) -> None:
        hub, path = self.server, self.path.partition("?")[0]
        allowed = hub.token in (None, self.headers.get("Authorization", "").removeprefix("Bearer "))
        if hub.error or not allowed:
            error = hub.error or "GatedRepo"
            return self.reply(403 if error == "GatedRepo" else 404, b"", {"X-Error-Code": error})
        if found := re.fullmatch(rf"/{NAME}/resolve/{COMMIT}/(.+)", path):
            content = hub.files[found[1]]
            if with_body:
                with hub.lock:
                    hub.fetched[found[1]] += 1
            etag = f'"{hashlib.sha256(content).hexdigest()}"'
            return self.reply(
                200, content, {"ETag": etag, "X-Repo-Commit": COMMIT}, with_body=with_body
            )
        if path.startswith(f"/api/models/{NAME}/tree/"):
            entries = [
                {"type": "file", "path": n, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for n, c in hub.files.items()
            ]
            return self.reply(200, json.dumps(entries).encode())
        if path.startswith(f"/api/models/{NAME}"):
            siblings = [{"rfilename": name} for name in hub.files]
            return self.reply(
                200, json.dumps({"id": NAME, "sha": COMMIT, "siblings": siblings}).encode()
            )
        return self.reply(404, b"", {"X-Error-Code": "RepoNotFound"})

    def reply(
        self,
        code: int,
        content: bytes,
        headers: dict[str, str] | None = None,
        with_body: bool = True,
    ) -> None:
        self.send_response(code)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if with_body:
            self.wfile.write(content)


@pytest.fixture
def serve(cache, monkeypatch):
    """`serve(files, error=..., token=...)`: a server, and this process set to use it."""
    from huggingface_hub import constants

    servers = []

    def start(files: dict[str, bytes], **more: str) -> Hub:
        server = Hub(files, **more)
        servers.append(server)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        template = server.url + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        return server

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def names(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*"))


def test_only_the_needed_files_of_the_top_folder_come(serve):
    server = serve(FILES)
    folder = resolve(NAME)
    assert names(folder) == ["config.json", "model.safetensors", "tokenizer.json"]
    assert (folder / "model.safetensors").read_bytes() == b"weights"
    assert set(server.fetched.values()) == {1}


def test_pickled_weights_come_where_there_are_no_others(serve):
    serve({name: content for name, content in FILES.items() if name != "model.safetensors"})
    assert names(resolve(NAME)) == ["config.json", "pytorch_model.bin", "tokenizer.json"]


def test_a_download_is_there_when_the_hub_is_out_of_reach(serve):
    server = serve(FILES)
    folder = resolve(NAME)
    server.shutdown()
    server.server_close()
    hub.folder_of.cache_clear()
    assert resolve(NAME) == folder


@pytest.mark.parametrize(
    ("error", "said"),
    [
        ("GatedRepo", "org/tiny is gated on the Hub: accept its terms there and set HF_TOKEN"),
        ("RepoNotFound", "org/tiny: no such path, and no such repository on the Hub"),
        ("RevisionNotFound", "org/tiny has no revision v9 on the Hub"),
    ],
)
def test_a_refusal_of_the_hub_is_one_line(serve, error, said):
    serve(FILES, error=error)
    with pytest.raises(UserError) as raised:
        resolve(NAME, "v9" if error == "RevisionNotFound" else None)
    assert said in str(raised.value)
    assert "\n" not in str(raised.value)


def test_a_hub_out_of_reach_is_named(serve):
    server = serve(FILES)
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match=f"the Hub \\({server.url}\\) is out of reach"):
        resolve(NAME)


def test_processes_of_a_node_download_once_with_home_endpoint_and_token_of_the_environment(
    serve, tmp_path
):
    server = serve({**FILES, "model.safetensors": bytes(1 << 20)}, token="secret")
    code = f"from graftwerk.checkpoints.hub import resolve; print(resolve('{NAME}'))"
    home = tmp_path / "home"
    more = {"HF_ENDPOINT": server.url, "HF_HOME": str(home), "HF_TOKEN": "secret"}
    env = environment(**more, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1")
    running = [
        subprocess.Popen([sys.executable, "-c", code], env=env, stdout=subprocess.PIPE, text=True)
        for _ in range(2)
    ]
    folders = {process.communicate(timeout=120)[0].strip() for process in running}
    assert folders == {str(home / "hub/models--org--tiny/snapshots" / COMMIT)}
    assert server.fetched["model.safetensors"] == 1
