"""The walks of docs/own_data.md, from a folder to a served model, on small made data with a small model."""

import http.client
import re
import shlex
import threading
from http.server import HTTPServer
from pathlib import Path

import pytest
from PIL import Image
from typer.testing import CliRunner

from foveal.cli import app

from ..train.test_formats import class_folders, voc, write_masks

PAGE = (Path(__file__).parents[2] / "docs" / "own_data.md").read_text(encoding="utf-8")
# in place of the published weights, and of hours
SMALL = ["model.name=test_foveal_dinat", "model.pretrained=false", "schedule.epochs=1", "train.threads=1"]
SMALL += ["log.trackers=[]"]
DATA = {
    "Classify": lambda: class_folders(Path("flowers")),
    "Detect": lambda: voc(Path("raccoons")),
    "Segment": lambda: write_masks(Path("leaves/images"), Path("leaves/masks")),
}


def walk(section: str) -> list[list[str]]:
    (commands,) = re.findall(rf"## {section}\n\n```\n(.*?)```", PAGE, re.DOTALL)
    return [shlex.split(line)[1:] for line in commands.splitlines()]


def run_walk(section: str) -> None:
    DATA[section]()
    Image.new("RGB", (40, 32), "brown").save("photo.jpg")
    for words in walk(section):
        result = CliRunner().invoke(app, words + (SMALL if words[0] == "train" else []))
        assert result.exit_code == 0, (words, result.output, result.exception)


@pytest.mark.slow
@pytest.mark.parametrize("section", ["Classify", "Segment"])
def test_from_a_folder_to_a_model(section, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_walk(section)
    (card,) = (each for each in tmp_path.glob("*-onnx/README.md"))
    (code,) = re.findall(r"```python\n(.*?)```", card.read_text(), re.DOTALL)
    monkeypatch.chdir(card.parent)
    Image.open("../photo.jpg").save("photo.jpg")
    exec(compile(code, "card", "exec"), {})


@pytest.mark.slow
def test_from_a_folder_to_a_served_detector(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run_walk("Detect")
    (code,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    monkeypatch.setattr(HTTPServer, "serve_forever", lambda server: None)
    names: dict = {}
    exec(compile(code.replace("8000", "0"), "own_data.md", "exec"), names)
    thread = threading.Thread(target=names["server"].handle_request)
    thread.start()
    connection = http.client.HTTPConnection("127.0.0.1", names["server"].server_port, timeout=60)
    connection.request("POST", "/", Path("photo.jpg").read_bytes())
    response = connection.getresponse()
    assert (response.status, response.read()[:1]) == (200, b"[")
    thread.join()
    names["server"].server_close()


def test_every_walk_has_its_steps():
    for section in DATA:
        assert [words[0] for words in walk(section)] == ["data", "train", "evaluate", "predict", "export"]
