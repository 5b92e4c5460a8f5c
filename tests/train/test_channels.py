"""Images of other than 1 or 3 channels: arrays in .npy, and TIFF files of several bands."""

import json
import sys
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image, ImageOps
from rich.console import Console

from foveal.backbones.images import ChannelError, image_shape, open_image, read_image
from foveal.backbones.loading import load
from foveal.configs.schema import SCHEMAS, load_config
from foveal.heads.body import build_body
from foveal.train import evaluate, predict, train
from foveal.train.checkpoint import load_initial
from foveal.train.data import DataError
from foveal.train.data.dataset import ClassificationDataset
from foveal.train.data.files import UNREADABLE, image_size
from foveal.train.data.index import ClassificationIndex, encode_paths
from foveal.train.data.shards import Options, make_shards
from foveal.train.data.survey import draw, survey
from foveal.train.data.transforms import EvalTransform
from foveal.train.data.wds import load_index

CHANNELS = 5
TINY = ["model.name=test_foveal_dinat", "model.pretrained=false", "log.trackers=[]", "train.threads=1"]
TINY += [
    "data.workers=0",
    "model.kwargs={depths: [1, 1, 1, 1], num_heads: [1, 1, 1, 1], dilations: [[1], [1], [1], [1]]}",
]
TYPES = {"uint8": 1 / 255, "uint16": 1 / 65535, "int16": 1 / 65535, "float32": 1.0}


def bands(kind: str = "uint8", size: tuple[int, int] = (24, 36), channels: int = CHANNELS, seed: int = 0) -> np.ndarray:
    draw = np.random.default_rng(seed)
    if kind == "float32":
        return draw.random((*size, channels), np.float32)
    return draw.integers(0, 200 if kind == "uint8" else 20_000, (*size, channels)).astype(kind)


def write(path: Path, pixels: np.ndarray, **tags) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".npy":
        np.save(path, pixels)
        return path
    tifffile = pytest.importorskip("tifffile", reason="the extra foveal[tiff] is not installed")
    tifffile.imwrite(path, pixels, photometric="minisblack", planarconfig="contig", **tags)
    return path


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
@pytest.mark.parametrize("kind", TYPES)
@pytest.mark.parametrize("channels", [2, 4, 5, 12])
def test_values_are_fractions_of_the_range_of_their_type(suffix, kind, channels, tmp_path):
    pixels = bands(kind, channels=channels)
    path = write(tmp_path / f"a{suffix}", pixels)
    image = read_image(path, channels)
    assert image_shape(path, channels) == (24, 36, channels)
    assert image_size(path) == (24, 36)
    expected = torch.from_numpy(pixels.astype(np.float64) * TYPES[kind]).permute(2, 0, 1).float()
    torch.testing.assert_close(image, expected, rtol=1e-6, atol=0)


def test_bands_in_planes_pages_and_rgb_with_more(tmp_path):
    """Pillow reads the first three of 5 samples in silence, and the first of several pages."""
    tifffile = pytest.importorskip("tifffile", reason="the extra foveal[tiff] is not installed")
    planes, rgb, pages = (tmp_path / name for name in ("planes.tif", "rgb.tif", "pages.tif"))
    pixels = bands()
    stack = np.ascontiguousarray(pixels.transpose(2, 0, 1))
    tifffile.imwrite(planes, stack, photometric="minisblack", planarconfig="separate")
    tifffile.imwrite(rgb, pixels, photometric="rgb", planarconfig="contig")
    tifffile.imwrite(pages, stack, photometric="minisblack")
    for path in (planes, rgb, pages):
        assert torch.equal((read_image(path, CHANNELS) * 255).round(), torch.from_numpy(stack).float())
    for path in (planes, rgb):
        with pytest.raises(OSError, match="5 channels, not 3"):
            read_image(path, 3)


@pytest.mark.parametrize("turned", range(1, 9))
def test_bands_are_upright(turned, tmp_path):
    pixels = bands()
    path = write(tmp_path / "a.tif", pixels, extratags=[(274, 3, 1, turned, True)])
    image, exif = Image.fromarray(pixels[..., 1]), Image.Exif()
    exif[274] = turned
    image.save(tmp_path / "a.png", exif=exif)
    with Image.open(tmp_path / "a.png") as opened:
        expected = np.asarray(ImageOps.exif_transpose(opened))
    assert (read_image(path, CHANNELS)[1].numpy() * 255).round().tolist() == expected.tolist()
    assert image_size(path) == expected.shape


def test_arrays_of_grey_and_rgb_are_images(tmp_path):
    grey, rgb = bands("uint16")[..., 0], bands()[..., :3]
    Image.fromarray(grey).save(tmp_path / "grey.png")
    Image.fromarray(rgb).save(tmp_path / "rgb.png")
    for name, pixels in (("grey", grey), ("rgb", rgb)):
        path = write(tmp_path / f"{name}.npy", pixels)
        for channels in (1, 3):
            assert read_image(path, channels).tobytes() == read_image(tmp_path / f"{name}.png", channels).tobytes()
    assert read_image(write(tmp_path / "rgba.npy", bands(channels=4)), 4).shape[0] == 4
    Image.fromarray(bands(channels=4)).save(tmp_path / "rgba.png")
    assert torch.equal(read_image(tmp_path / "rgba.png", 4), read_image(tmp_path / "rgba.npy", 4))


@pytest.mark.parametrize(
    ("pixels", "match"),
    [
        (bands("float32") * np.nan, "NaN"),
        (bands().astype(np.int64), "int64"),
        (bands()[None], "1, 24, 36, 5"),
        (np.array([[{}]]), "object"),
    ],
)
def test_what_is_no_image_is_named(pixels, match, tmp_path):
    np.save(tmp_path / "a.npy", pixels)
    with pytest.raises(OSError, match=rf"a\.npy.*{match}"):
        read_image(tmp_path / "a.npy", CHANNELS)


@pytest.mark.parametrize("suffix", [".npy", ".tif"])
def test_damaged_files_raise_what_readers_report(suffix, tmp_path):
    content = write(tmp_path / f"a{suffix}", bands("uint16")).read_bytes()
    draw = np.random.default_rng(0)
    for number in range(150):
        damaged = bytearray(content[: len(content) // 2] if number % 3 == 0 else content)
        for place in draw.integers(0, min(len(damaged), 600), 6):
            damaged[place] = draw.integers(256)
        path = tmp_path / f"b{suffix}"
        path.write_bytes(damaged)
        for read in (lambda path: open_image(path.open("rb"), CHANNELS), image_shape):
            with suppress(*UNREADABLE):
                read(path)


def test_a_claim_of_a_large_array_is_not_believed(tmp_path):
    with (tmp_path / "a.npy").open("wb") as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "<u2", "fortran_order": False, "shape": (10**6, 10**6, 5)})
    with pytest.raises(OSError, match="too short"):
        read_image(tmp_path / "a.npy", CHANNELS)


def test_without_tifffile_the_extra_is_named(tmp_path, monkeypatch):
    path = write(tmp_path / "a.tif", bands())
    monkeypatch.setitem(sys.modules, "tifffile", None)
    with pytest.raises(ImportError, match=r"foveal\[tiff\]"):
        read_image(path, CHANNELS)


def classified(root: Path) -> None:
    """What a class is by is in the last channel, of 16 bits; every other file is a TIFF."""
    for number in range(32):
        pixels = bands("uint16", seed=number)
        pixels[..., 4] = 500 + 15_000 * (number % 2)
        write(root / "ab"[number % 2] / f"{number:02}{('.npy', '.tif')[number // 2 % 2]}", pixels)


def detected(root: Path) -> None:
    images, annotations = [], []
    for number in range(20):
        pixels = bands("uint8", (48, 64), seed=number)
        x, y = (int(value) for value in np.random.default_rng(number).integers(0, 24, 2))
        pixels[y : y + 20, x : x + 24, 4] = 255
        name = f"{number:02}{('.npy', '.tif')[number % 2]}"
        write(root / "images" / name, pixels)
        images.append({"id": number, "file_name": name, "height": 48, "width": 64})
        corners = [x, y, x + 24, y, x + 24, y + 20, x, y + 20]
        box = {"bbox": [x, y, 24, 20], "area": 480, "iscrowd": 0, "segmentation": [corners]}
        annotations.append({"id": number + 1, "image_id": number, "category_id": 1} | box)
    content = {"images": images, "annotations": annotations, "categories": [{"id": 1, "name": "thing"}]}
    (root / "all.json").write_text(json.dumps(content))


def segmented(root: Path) -> None:
    for number in range(12):
        pixels = bands("float32", (64, 64), seed=number)
        mask = np.zeros((64, 64), np.uint8)
        mask[16:48, 8 + number : 40 + number] = 1
        pixels[..., 4] = mask
        write(root / "images" / f"{number:02}{('.npy', '.tif')[number % 2]}", pixels)
        (root / "masks").mkdir(exist_ok=True)
        Image.fromarray(mask).save(root / "masks" / f"{number:02}.png")


WRITERS = {"classify": classified, "detect": detected, "segment": segmented}


@pytest.mark.parametrize("task", WRITERS)
def test_training_evaluation_and_prediction(task, tmp_path):
    """The number of channels and their statistics are found, printed and kept; colours are not distorted."""
    root, run = tmp_path / "data", tmp_path / "run"
    WRITERS[task](root)
    given = [f"data.root={root}", f"output={run}", "schedule.epochs=1", *TINY]
    given += [] if task == "classify" else ["augment.photometric=true"]
    given += ["augment.crop_size=[64,64]", "model.head_kwargs={channels: 32}"] if task == "segment" else []
    given += ["model.neck_kwargs={out_channels: 64}"] if task == "detect" else []
    given += ["model.head=fcos", "train.batch_size=4", "data.min_size=64"] if task == "detect" else []
    with (tmp_path / "out.txt").open("w") as out:
        summary = train("finetune", given, task, Console(file=out, width=2000))
    text = (tmp_path / "out.txt").read_text()
    config = load_config(run / "config.yaml", (), SCHEMAS[task])
    assert (config.data.in_chans, len(config.data.mean), len(config.data.std)) == (CHANNELS, CHANNELS, CHANNELS)
    for part in (
        "data.in_chans=5",
        "data.mean=[",
        f"augment.{'color_jitter' if task == 'classify' else 'photometric'}",
    ):
        assert part in text
    scale = {"classify": 20_000 / 65535, "detect": 200 / 255, "segment": 1}[task]
    assert config.data.mean[:4] == pytest.approx([scale / 2] * 4, rel=0.05)
    assert config.data.std[:4] == pytest.approx([scale / 12**0.5] * 4, rel=0.05)
    monitor = {"classify": "top1", "detect": "box_ap", "segment": "miou"}[task]
    for source, more in ((run, []), (run / "best", [f"data.root={root}", "data.kind=auto", "data.workers=0"])):
        result = evaluate(source, more)
        if source == run:
            assert result[monitor] == pytest.approx(summary[monitor], abs=1e-3)
    images = sorted(each for each in root.rglob("*") if each.suffix in (".npy", ".tif"))[:2]
    output = None if task == "classify" else tmp_path / "found"
    found = list(predict(run, images, output=output, threshold=0.9, formats=["drawn"] if output else []))
    assert [prediction.error for prediction in found] == [None, None]
    assert output is None or len(list(output.glob("*.png"))) == 2
    photo = tmp_path / "photo.png"
    Image.new("RGB", (40, 30)).save(photo)
    assert "3 channels, not 5" in str(next(iter(predict(run, [photo]))).error)
    checked = survey(root, task=task)
    assert any("5 channels" in line for line in checked.lines)
    assert draw(checked.data, tmp_path / "sheet.png") > 0


@pytest.mark.parametrize("task", WRITERS)
def test_images_of_other_channels_stop_with_their_names(task, tmp_path):
    root = tmp_path / "data"
    WRITERS[task](root)
    other = next(each for each in sorted(root.rglob("*")) if each.suffix == ".npy")
    np.save(other, np.load(other)[..., :4])
    base = [f"data.root={root}", f"output={tmp_path / 'run'}", "schedule.epochs=1", *TINY]
    with pytest.raises(DataError, match=rf"in_chans=5 .*4: .*{other.name}"):
        train("finetune", [*base, "data.in_chans=5"], task, Console(quiet=True))
    with pytest.raises(DataError, match=r"in_chans=3 .*with 4: .*with 5: |in_chans=3 .*with 5: .*with 4: "):
        train("finetune", [*base, "data.in_chans=3"], task, Console(quiet=True))


def test_a_channel_less_in_one_sample_stops_the_run(tmp_path):
    """Also where no header was looked at: in shards."""
    write(tmp_path / "a.npy", bands(channels=4))
    with pytest.raises(ChannelError, match="4 channels, not 5"), (tmp_path / "a.npy").open("rb") as file:
        open_image(file, CHANNELS)
    index = ClassificationIndex(paths=encode_paths([tmp_path / "a.npy"]), label=np.zeros(1, np.int64))
    transform = EvalTransform(
        {"input_size": (5, 24, 24), "interpolation": "bilinear", "crop_pct": 1.0, "crop_mode": "center"}
    )
    error, _ = ClassificationDataset(index, transform, train=False, seed=0)[0, 0]
    assert isinstance(error, DataError)
    assert "a.npy has 4 channels, not 5" in str(error)


def test_shards_keep_the_files(tmp_path):
    classified(tmp_path / "data" / "train")
    done = make_shards(tmp_path / "data", tmp_path / "shards", Options(verify=True))
    assert (done.splits, done.bad) == ({"train": (1, 32)}, {})
    index = load_index(str(tmp_path / "shards"), "train", ["train-000000.tar"])
    read = {Path(index.name(i)).name: open_image(index.open(i), CHANNELS) for i in range(len(index))}
    for path in (tmp_path / "data").rglob("*.*"):
        assert torch.equal(read[path.stem] / 255, read_image(path, CHANNELS))
    with pytest.raises(DataError, match="could be read"):
        make_shards(tmp_path / "data", tmp_path / "small", Options(max_size=30))
    assert "max_size" in (tmp_path / "small" / "bad_samples.csv").read_text()


@pytest.mark.parametrize("name", timm.list_models("test_foveal*"))
def test_weights_of_rgb_are_adapted_as_timm_does(name, tmp_path):
    """By `load`, as the start of a classifier, and in the backbone of a segmenter: filters repeat."""
    model = timm.create_model(name, num_classes=3)
    timm.models.save_for_hf(model, tmp_path, safe_serialization=True)
    first = model.pretrained_cfg["first_conv"]
    expected = {}
    for conv in (first,) if isinstance(first, str) else first:
        rgb = model.get_parameter(f"{conv}.weight")
        expected[f"{conv}.weight"] = torch.cat([rgb, rgb[:, :2]], 1) * 3 / 5
    other = timm.create_model(name, num_classes=3, in_chans=CHANNELS)
    assert load_initial(other, tmp_path) == []
    for each in (load(tmp_path, in_chans=CHANNELS), other):
        for weight, value in expected.items():
            torch.testing.assert_close(each.get_parameter(weight), value)
    strides = tuple(dict.fromkeys(info["reduction"] for info in model.feature_info))[-1:]
    body, _ = build_body(name, checkpoint=tmp_path, strides=strides, in_chans=CHANNELS)
    for value in expected.values():
        assert any(each.shape == value.shape and torch.allclose(each, value) for each in body.parameters())
