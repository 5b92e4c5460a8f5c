"""Trains torchvision's detectors on a folder with the loop of its reference scripts, to compare with `detect/raccoon`.

    python -m foveal.benchmarks.torchvision_detector FOLDER --seconds 900

From random weights, on the split of ``data.kind=auto``. The settings are those of references/detection: for
Faster R-CNN (MobileNetV3 at 320 pixels) batches of 2, SGD of 0.02 / 8, steps after 16/26 and 22/26 of the run; for
SSDlite batches of 24, SGD of 0.15 / 8, a cosine. A linear warm-up over the first epoch, horizontal flips. The
number of epochs follows from the time of the first one.
"""

import argparse
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torchvision.models import detection

from ..configs.schema import DetectConfig, load_config
from ..train.data import build_detection_data
from ..train.detection_metrics import CocoScorer


def steps(share: float) -> float:
    return 0.1 ** ((share >= 16 / 26) + (share >= 22 / 26))


def cosine(share: float) -> float:
    return (1 + math.cos(math.pi * share)) / 2


# batch, rate, weight decay, the rate's factor by the share of the run
SETTINGS: dict[str, tuple[int, float, float, Callable[[float], float]]] = {
    "fasterrcnn_mobilenet_v3_large_320_fpn": (2, 0.02 / 8, 1e-4, steps),
    "ssdlite320_mobilenet_v3_large": (24, 0.15 / 8, 4e-5, cosine),
}


def main() -> None:
    parser = argparse.ArgumentParser(description="torchvision's detectors on a folder")
    parser.add_argument("root")
    parser.add_argument("--seconds", type=float, default=900)
    parser.add_argument("--model", choices=SETTINGS, default="fasterrcnn_mobilenet_v3_large_320_fpn")
    arguments = parser.parse_args()
    torch.manual_seed(0)
    batch, rate, decay, factor = SETTINGS[arguments.model]
    given = ["output=-", "model.name=-", "data.kind=auto", f"data.root={arguments.root}", "data.workers=0"]
    given += [f"train.batch_size={batch}", "augment.min_size=[320]", "augment.max_size=640"]
    data: Any = build_detection_data(load_config(None, given, DetectConfig), masks=False, device=torch.device("cpu"))
    create = getattr(detection, arguments.model)
    model = create(weights=None, weights_backbone=None, num_classes=len(data.categories) + 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=decay)
    warmup = torch.optim.lr_scheduler.LinearLR(optimizer, 0.001, total_iters=min(1000, data.train.batches - 1))
    start, epochs, epoch = time.time(), 1, 0
    while epoch < epochs:
        loss = train_one_epoch(model, optimizer, data.train.epoch(epoch), warmup if epoch == 0 else None)
        epoch += 1
        if epoch == 1:  # the evaluation takes about a tenth of an epoch
            epochs = max(1, int(arguments.seconds / (time.time() - start) - 0.1))
        optimizer.param_groups[0]["lr"] = rate * factor(epoch / epochs)
        print(f"epoch {epoch}/{epochs}  loss {loss:.3f}  {time.time() - start:.0f} s", flush=True)
    scorer = CocoScorer(data.val.dataset.index, masks=False)
    scorer.run(model.eval(), data.val.epoch(0), detect)
    scores = "  ".join(f"{name} {value:.2f}" for name, value in scorer.metrics.items() if value is not None)
    print(f"{scores}  after {epochs} epochs, {time.time() - start:.0f} s")


def train_one_epoch(model, optimizer, batches, warmup) -> float:
    """engine.train_one_epoch of the references, without its log."""
    model.train()
    total, count = 0.0, 0
    for batch in batches:
        targets = [dict(target, labels=target["labels"] + 1) for target in batch.targets]  # 0 is its background
        loss = torch.stack(list(model(list(batch.images), targets).values())).sum()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if warmup is not None:
            warmup.step()
        total, count = total + loss.item(), count + 1
    return total / count


def detect(model, batch):
    return [dict(found, labels=found["labels"] - 1) for found in model(list(batch.images))], None


if __name__ == "__main__":
    main()
