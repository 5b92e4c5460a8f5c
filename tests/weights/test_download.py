"""Downloads from a server that breaks off, sends other things and refuses: the right file arrives complete, or none."""

from __future__ import annotations

import hashlib
import http.server
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import timm
import torch

import foveal
from foveal.backbones import download
from foveal.backbones.download import fetch
from foveal.weights.manifest import checkpoints

CONTENT = bytes(range(256)) * 4096  # 1 MiB
DIGEST = hashlib.sha256(CONTENT).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """Sends CONTENT as its settings say, and keeps the requested paths."""

    content = CONTENT
    breaks: int = 0  # how many responses end in the middle
    status: int | None = None
    headers: dict[str, str] = {}  # noqa: RUF012  replaced, not changed

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []

    def handle_error(self, *_: object) -> None:
        pass  # a client that has seen enough hangs up

    def address(self, name: str = "weights.pth") -> str:
        return f"http://127.0.0.1:{self.server_port}/{name}"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        server = self.server
        server.asked.append(self.path)
        if server.status is not None or "absent" in self.path:
            self.send_error(server.status or 404)
            return
        body = b"wrong" if "wrong" in self.path else server.content
        headers = {"Content-Type": "application/octet-stream", "Content-Length": str(len(body))}
        self.send_response(200)
        for name, value in {**headers, **server.headers}.items():
            if value:
                self.send_header(name, value)
        self.end_headers()
        if server.breaks:
            server.breaks -= 1
            body = body[: len(body) // 2]
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Server]:
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return tmp_path / "hub" / "checkpoints" / "weights.pth"


def left_over(place: Path) -> set[str]:
    return {path.name for path in place.parent.iterdir()} - {f"{place.name}.lock"}


def test_a_file_and_its_record(server: Server, place: Path) -> None:
    assert fetch("x", [server.address()]) == place
    assert place.read_bytes() == CONTENT
    assert place.with_name("weights.pth.sha256").read_text() == f"{DIGEST}  weights.pth\n"
    assert left_over(place) == {"weights.pth", "weights.pth.sha256"}
    fetch("x", [server.address()])
    assert len(server.asked) == 1  # the second time it is there


def test_a_broken_connection_leaves_nothing(server: Server, place: Path) -> None:
    server.breaks = 1
    with pytest.raises(OSError, match=r"weights of x .*524,288 of 1,048,576"):
        fetch("x", [server.address()])
    assert left_over(place) == set()
    fetch("x", [server.address()], DIGEST)
    assert place.read_bytes() == CONTENT


def test_a_broken_connection_of_unknown_length(server: Server, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks, of which the last never comes."""
    monkeypatch.setattr(Handler, "protocol_version", "HTTP/1.1")
    server.headers = {"Content-Length": "", "Transfer-Encoding": "chunked", "Connection": "close"}
    whole = b"100000\r\n" + CONTENT + b"\r\n0\r\n\r\n"
    server.content = whole[:-10]
    with pytest.raises(OSError, match=r"weights of x .*IncompleteRead"):
        fetch("x", [server.address()])
    assert left_over(place) == set()
    server.content = whole
    fetch("x", [server.address()], DIGEST)
    assert place.read_bytes() == CONTENT


def test_an_interrupted_download_leaves_nothing(server: Server, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as killed, pytest.raises(KeyboardInterrupt):
        killed.setattr(download, "_verify", interrupt)
        fetch("x", [server.address()])
    assert left_over(place) == set()


@pytest.mark.parametrize(
    ("headers", "named"),
    [
        ({"Content-Encoding": "gzip"}, "gzip"),
        ({"Content-Length": ""}, "Content-Length missing"),
        ({"Content-Length": "many"}, "Content-Length many"),
        ({"Content-Type": "text/html"}, "text/html"),
        ({"Content-Type": "application/xml"}, "application/xml"),
        ({"Content-Type": "application/json; charset=utf-8"}, "application/json"),
    ],
)
def test_responses_that_are_not_the_file(headers: dict[str, str], named: str, server: Server, place: Path) -> None:
    server.headers = headers
    with pytest.raises(OSError, match=named):
        fetch("x", [server.address()])
    assert left_over(place) == set()


def test_wrong_bytes(server: Server, place: Path) -> None:
    server.content = b"\xff" + CONTENT[1:]
    with pytest.raises(OSError, match=rf"{hashlib.sha256(server.content).hexdigest()}.* {DIGEST}"):
        fetch("x", [server.address()], DIGEST)
    assert left_over(place) == set()


def test_the_hash_in_a_name(server: Server, place: Path) -> None:
    """torch.hub's convention."""
    assert download.hash_in_name("https://host/folder-abcdef12/net_256-3083328c.pth") == "3083328c"
    assert download.hash_in_name("https://host/net-224.pth") is None
    good, bad = f"net-{DIGEST[:8]}.pth", "net-00000000.pth"
    assert fetch("x", [server.address(good)]).read_bytes() == CONTENT
    with pytest.raises(OSError, match=f"{DIGEST}.* 00000000"):
        fetch("x", [server.address(bad)])
    assert not place.with_name(bad).exists()


def test_mirrors_in_order(server: Server, place: Path) -> None:
    """Nothing there, the wrong file, the right one, one that is not needed: named alike, kept apart."""
    names = ["absent/weights.pth", "wrong/weights.pth", "right/weights.pth", "spare/weights.pth"]
    fetch("x", [server.address(name) for name in names], DIGEST[:8])
    assert place.read_bytes() == CONTENT
    assert server.asked == [f"/{name}" for name in names[:3]]


def test_each_failure_is_named(server: Server, place: Path) -> None:
    dead = Server()
    dead.server_close()  # nobody listens there now
    server.headers = {"Content-Type": "text/html"}
    addresses = [server.address("absent.pth"), dead.address(), server.address()]
    with pytest.raises(OSError, match="dinat_x") as caught:
        fetch("dinat_x", addresses)
    message = str(caught.value)
    for address, reason in zip(addresses, ("404", "refused", "text/html"), strict=True):
        assert re.search(rf"{re.escape(address)}: [^;]*{reason}", message)
    assert str(place.with_name("absent.pth")) in message  # where to put it by hand


@pytest.mark.parametrize("status", [404, 403, 503, 429])
def test_errors_of_the_server(status: int, server: Server, place: Path) -> None:
    server.status = status
    with pytest.raises(OSError, match=str(status)):
        fetch("x", [server.address()])
    assert left_over(place) == set()


def test_the_first_hash_is_held(server: Server, place: Path) -> None:
    fetch("x", [server.address()])
    place.write_bytes(b"\x01" + CONTENT[1:])  # a bit of the disk
    with pytest.raises(OSError, match=rf"weights\.pth .*weights\.pth\.sha256 has {DIGEST}"):
        fetch("x", [server.address()])
    place.unlink()
    server.content = CONTENT[::-1]  # the address holds another file now
    with pytest.raises(OSError, match=DIGEST):
        fetch("x", [server.address()])
    assert not place.exists()
    place.with_name("weights.pth.sha256").unlink()
    fetch("x", [server.address()])
    assert place.read_bytes() == CONTENT[::-1]


def test_a_damaged_file_of_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    blob = tmp_path / hashlib.sha256(b"good").hexdigest()
    blob.write_bytes(b"good")
    file = tmp_path / "model.safetensors"
    file.symlink_to(blob)
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_, **__: str(file))
    assert fetch("x", ["hf://a/b"]) == file
    blob.write_bytes(b"bad")
    with pytest.raises(OSError, match=rf"model\.safetensors .*{blob.name}"):
        fetch("x", ["hf://a/b"])


def test_offline(server: Server, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(OSError, match="HF_HUB_OFFLINE"):
        fetch("x", [server.address(), "hf://a/b"])
    assert server.asked == []
    place.parent.mkdir(parents=True)
    place.write_bytes(CONTENT)
    assert fetch("x", [server.address()]) == place


def test_a_proxy_of_the_environment(server: Server, place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server is asked for a host that does not exist: it is the proxy."""
    monkeypatch.setenv("http_proxy", server.address("")[:-1])
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.setattr("urllib.request._opener", None)  # made once in a process, with the proxies of its start
    fetch("x", ["http://weights.invalid/weights.pth"])
    assert server.asked == ["http://weights.invalid/weights.pth"]


@pytest.mark.slow
def test_the_client_of_the_hub(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After a mirror that has nothing; its own process, as the client reads the environment when it is imported."""

    def headers(self: Handler) -> None:
        self.server.asked.append(self.path)
        found = self.path.endswith("/resolve/main/pytorch_model.bin")
        self.send_response(200 if found else 404)
        self.send_header("X-Repo-Commit", "0" * 40)
        if not found:
            self.send_header("X-Error-Code", "EntryNotFound")  # as the hub does
        self.send_header("ETag", f'"{DIGEST}"')
        self.send_header("Content-Length", str(len(CONTENT) if found else 0))
        self.end_headers()

    monkeypatch.setattr(Handler, "do_HEAD", headers, raising=False)
    addresses = [server.address("absent.pth"), "hf://someone/model"]
    script = f"from foveal.backbones.download import fetch; print(fetch('x', {addresses}))"
    environment = {**os.environ, "HF_ENDPOINT": server.address("")[:-1], "HF_HUB_CACHE": str(tmp_path / "cache")}
    environment |= {"TORCH_HOME": str(tmp_path), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    file = Path(done.stdout.strip())
    assert file.name == "pytorch_model.bin"
    assert file.read_bytes() == CONTENT
    assert file.resolve().name == DIGEST
    assert server.asked[0] == "/absent.pth"
    # the second time, without a network
    server.asked.clear()
    environment["HF_HUB_OFFLINE"] = "1"
    again = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, env=environment)
    assert Path(again.stdout.strip()) == file
    assert server.asked == []


@pytest.mark.slow
def test_the_files_of_torch_hub(place: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """timm reads the one that was fetched here and does not compare it; `foveal.load` does."""

    def no_network(*_: object, **__: object) -> None:
        raise AssertionError("a download begins")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    monkeypatch.setattr(download, "urlopen", no_network)
    model = timm.create_model("overlock_xt")
    file = place.with_name("overlock_xt_in1k_224.pth")
    file.parent.mkdir(parents=True)
    torch.save(model.state_dict(), file)
    weight = foveal.load("overlock_xt.in1k").head[4].weight  # which writes the hash down
    assert torch.equal(weight, model.head[4].weight)
    model.head[4].weight.data[0] += 1
    torch.save(model.state_dict(), file)
    assert not torch.equal(timm.create_model("overlock_xt.in1k", pretrained=True).head[4].weight, weight)
    with pytest.raises(OSError, match=r"overlock_xt_in1k_224\.pth\.sha256"):
        foveal.load("overlock_xt.in1k")


def test_one_download_for_many_who_ask(server: Server, place: Path) -> None:
    with ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda _: fetch("x", [server.address()], DIGEST), range(4)))
    assert found == [place] * 4
    assert len(server.asked) == 1
    assert place.read_bytes() == CONTENT


@pytest.mark.slow
def test_one_download_for_two_processes(server: Server, place: Path, tmp_path: Path) -> None:
    script = f"from foveal.backbones.download import fetch; fetch('x', ['{server.address()}'], '{DIGEST}')"
    environment = {**os.environ, "TORCH_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    running = [subprocess.Popen([sys.executable, "-c", script], env=environment) for _ in range(2)]
    assert [each.wait() for each in running] == [0, 0]
    assert len(server.asked) == 1
    assert place.read_bytes() == CONTENT


def test_checkpoints_of_the_manifest(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[object, ...]] = []
    monkeypatch.setattr("foveal.weights.manifest.download.fetch", lambda *given: asked.append(given))
    checkpoints()["dinat_mini.maskrcnn_coco"].fetch()
    checkpoints()["halo26t.a1h_in1k"].fetch()
    detector, hybrid = asked
    assert detector[1] == ("https://shi-labs.com/projects/dinat/checkpoints/coco/maskrcnn_dinat_mini.pth",)
    assert hybrid[1][1:] == ("hf://timm/halonet26t.a1h_in1k",)
    assert hybrid[2] == "3083328c"
    with pytest.raises(OSError, match=r"CARETrans_S0\.pth\.tar.*https:..drive\.google\.com"):
        checkpoints()["care_s0.in1k"].fetch()
