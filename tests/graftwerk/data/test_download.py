"""Downloads against a real server that breaks off, serves ranges, and lies."""

import hashlib
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from graftwerk.data.download import RemoteFile, fetch
from graftwerk.errors import UserError

CONTENT = bytes(range(256)) * 4096  # 1 MiB
SHA256 = hashlib.sha256(CONTENT).hexdigest()


class Server:
    """Serves CONTENT; `plan` says for each request in turn how to misbehave."""

    def __init__(self):
        self.plan = []
        self.ranges = []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                outer.answer(self)

            def log_message(self, format, *args):
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    @property
    def remote(self):
        url = f"http://127.0.0.1:{self.http.server_port}/train.json"
        return RemoteFile(url, len(CONTENT), SHA256)

    def answer(self, request):
        asked = request.headers.get("Range")
        self.ranges.append(asked)
        step = self.plan.pop(0) if self.plan else {}
        if "status" in step:
            request.send_error(step["status"])
            return
        body = step.get("body", CONTENT)
        start = int(asked.removeprefix("bytes=").rstrip("-")) if asked else 0
        if step.get("ignore_range"):
            start = 0
        request.send_response(206 if start else 200)
        request.send_header("Content-Length", str(len(body) - start))
        request.end_headers()
        request.wfile.write(body[start : start + step.get("send", len(body))])
        # Closing here, short of Content-Length, is what a broken connection looks like.


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    server = Server()
    yield server
    server.http.shutdown()
    server.http.server_close()


def get(server, folder):
    return fetch(server.remote, folder, "put it there by hand", say=lambda line: None, pause=0.001)


def test_a_file_arrives_and_is_not_asked_for_again(server, tmp_path):
    path = get(server, tmp_path)
    assert path.read_bytes() == CONTENT
    assert get(server, tmp_path) == path
    assert server.ranges == [None]
    assert [file.name for file in tmp_path.iterdir()] == ["train.json"]


def test_a_broken_connection_goes_on_where_it_broke(server, tmp_path):
    server.plan = [{"send": 300_000}, {"send": 200_000}]
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == [None, "bytes=300000-", "bytes=500000-"]


def test_a_broken_run_is_completed_by_the_next(server, tmp_path):
    server.plan = [{"send": 300_000}] + [{"status": 503}] * 4
    with pytest.raises(UserError, match="503"):
        get(server, tmp_path)
    assert not (tmp_path / "train.json").exists()
    server.ranges.clear()
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=300000-"]


def test_half_a_file_under_its_final_name_is_completed(server, tmp_path):
    (tmp_path / "train.json").write_bytes(CONTENT[:400_000])
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=400000-"]


def test_a_server_without_ranges_sends_all_anew(server, tmp_path):
    server.plan = [{"send": 300_000}, {"ignore_range": True}]
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_a_wrong_start_is_noticed_and_the_file_fetched_anew(server, tmp_path):
    (tmp_path / "train.json").write_bytes(b"x" * 400_000)
    assert get(server, tmp_path).read_bytes() == CONTENT
    assert server.ranges == ["bytes=400000-", None]


def test_a_larger_file_in_its_place_is_replaced(server, tmp_path):
    (tmp_path / "train.json").write_bytes(CONTENT + b"x")
    assert get(server, tmp_path).read_bytes() == CONTENT


def test_wrong_content_never_gets_the_name(server, tmp_path):
    server.plan = [{"body": bytes(len(CONTENT))}] * 5
    with pytest.raises(UserError, match="not the expected one"):
        get(server, tmp_path)
    assert not (tmp_path / "train.json").exists()
    assert len(server.ranges) == 2


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(server, tmp_path):
    server.plan = [{"status": 503}, {"status": 429}]
    assert get(server, tmp_path).read_bytes() == CONTENT
    (tmp_path / "train.json").unlink()
    server.plan, server.ranges = [{"status": 404}], []
    with pytest.raises(UserError, match=r"404.*put it there by hand"):
        get(server, tmp_path)
    assert server.ranges == [None]


def test_no_network_is_one_line_with_the_way_out(server, tmp_path):
    server.http.shutdown()
    server.http.server_close()
    with pytest.raises(UserError) as error:
        get(server, tmp_path)
    assert server.remote.url in str(error.value)
    assert "put it there by hand" in str(error.value)
    assert "\n" not in str(error.value)


def test_the_proxy_of_the_environment_is_asked(server, tmp_path, monkeypatch):
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{server.http.server_port}")
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    remote = RemoteFile("http://nowhere.invalid/train.json", len(CONTENT), SHA256)
    path = fetch(remote, tmp_path, "", say=lambda line: None, pause=0.001)
    assert path.read_bytes() == CONTENT
