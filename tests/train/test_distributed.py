"""Several processes on one machine, through gloo: DDP and FSDP, going on with more or fewer, failures."""

import argparse
import functools
import itertools
import json
import multiprocessing
import os
import re
import runpy
import shlex
import socket
import subprocess
import sys
import time
import types
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.run import get_args_parser

from foveal.configs.schema import ConfigError, TrainConfig, load_config
from foveal.heads.build import build_detector, build_segmenter
from foveal.train import checkpoint, distributed, evaluate, run, train
from foveal.train.checkpoint import CheckpointError
from foveal.train.data.order import EpochOrder
from foveal.train.run import shared_store

from .test_resume import assert_same_run, metrics

SCRIPT = Path(__file__).with_name("one_process.py")
OWN_STORE = {"TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1"}  # for restarts, as docs/distributed.md says

PARTS = ("head", "auxiliary")
PORTS = itertools.count(os.getpid() * 37)

PLAIN = """\
model: {name: test_foveal_dinat, kwargs: {depths: [1, 1], num_heads: [1, 2], dilations: [[2], [1]]}}
data: {kind: digits, image_size: 16, in_chans: 1, mean: [0.3], std: [0.37], limit: 128, val_limit: 63}
augment: {hflip: 0.0}
optim: {lr: 3e-3, clip_grad: 1.0}
schedule: {epochs: 2, warmup_fraction: 0.1}
train: {batch_size: 8, grad_accum_steps: 2, ema_decay: 0.9, threads: 1}
"""


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    path = tmp_path / "plain.yaml"
    path.write_text(PLAIN)
    return path


def free_port() -> int:
    """One below those that the system gives away by itself, which another program could get before it is used here;
    every process of the tests begins its search elsewhere."""
    for port in (20000 + number % 10000 for number in itertools.islice(PORTS, 10000)):
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("none of 20000..29999 is free")


def launch(recipe: Path, overrides: list[str], world: int, **job) -> list[int]:
    """The exit codes of ``world`` processes, forked from one that has imported everything."""
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["foveal.train.classify"])
    port = free_port()
    processes = []
    for rank in range(world):
        ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world, "LOCAL_WORLD_SIZE": world}
        place = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        environment = {name: str(value) for name, value in (ranks | place).items()}
        given = {"recipe": str(recipe), "overrides": overrides, "environment": environment, **job}
        processes.append(server.Process(target=runpy.run_path, args=(str(SCRIPT), {"JOB": given}, "__main__")))
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join()
    finally:  # also when the test runs out of time
        for process in processes:
            process.kill()
    return [process.exitcode for process in processes]


def torchrun(recipe: Path, overrides: list[str], world: int, folder: Path, restarts: int = 0, **job) -> str:
    """What a real launch says; it has to succeed."""
    environment = OWN_STORE if restarts else {}
    file = folder / "job.json"
    file.write_text(json.dumps({"recipe": str(recipe), "overrides": overrides, **job}))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(world)]
    process = subprocess.Popen(
        [*command, f"--max-restarts={restarts}", str(SCRIPT), str(file)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"} | environment,
    )
    try:
        said, _ = process.communicate()
    finally:  # also when the test runs out of time; torchrun ends the processes that it has started
        process.terminate()
    assert process.returncode == 0, said
    return said


def close(run: Path, other: Path, names: tuple[str, ...] = ("model", "raw")) -> None:
    """The same training, in another order of additions."""
    for name in names:
        a, b = (load_file(folder / "last" / f"{name}.safetensors") for folder in (run, other))
        assert a.keys() == b.keys()
        for key in a:
            torch.testing.assert_close(a[key], b[key], rtol=1e-3, atol=2e-5, msg=lambda text, key=key: f"{key}: {text}")


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("samples", [64, 83])
def test_an_update_is_of_the_same_images_for_any_number_of_processes(world, samples):
    """16 images each: the k-th 16 of the epoch's order, whoever reads them."""
    orders = [EpochOrder(samples, 4, train=True, seed=3, rank=rank, world=world) for rank in range(world)]
    batches = [list(order) for order in orders]
    alone = [i for batch in EpochOrder(samples, 16, train=True, seed=3) for i in batch]
    forward = 4 // world  # passes for an update
    for update in range(samples // 16):
        mine = [i for b in batches for batch in b[update * forward : (update + 1) * forward] for i in batch]
        assert sorted(mine) == sorted(alone[update * 16 : (update + 1) * 16])


def test_an_unreadable_image_of_one_process_stops_all(folder_recipe, make_images, tmp_path):
    """It alone cannot go on; the others say why they stop, and do not wait."""
    root = make_images(train=40)
    for path in sorted((root / "train/red").iterdir())[:3]:
        path.write_bytes(b"no image")
    options = [f"data.root={root}", f"output={tmp_path / 'run'}", "train.batch_size=8", "data.max_bad_fraction=0"]
    assert sorted(launch(folder_recipe, options, 2, said=str(tmp_path / "said"))) == [1, 2]
    said = " ".join((tmp_path / "said").read_text().split())
    assert "data.max_bad_fraction" in said
    assert "Traceback" not in said


@pytest.mark.slow
def test_an_unreadable_held_out_image_of_one_process_stops_all(folder_recipe, make_images, tmp_path):
    root = make_images()
    sorted((root / "val/red").iterdir())[2].write_bytes(b"no image")
    options = [f"data.root={root}", f"output={tmp_path / 'run'}", "train.batch_size=8", "data.max_bad_fraction=0"]
    assert sorted(launch(folder_recipe, options, 2, said=str(tmp_path / "said"))) == [1, 2]
    assert "data.max_bad_fraction" in " ".join((tmp_path / "said").read_text().split())


@pytest.mark.slow
def test_a_disk_that_is_full_for_the_first_process_stops_all(recipe, tmp_path):
    (tmp_path / "run").write_text("a file where a folder should be")
    assert launch(recipe, [f"output={tmp_path / 'run'}"], 2, said=str(tmp_path / "said")) == [1, 1]
    assert "File exists" in " ".join((tmp_path / "said").read_text().split())


@pytest.mark.parametrize(
    ("override", "says"),
    [({"amp": "fp16"}, "train.amp=fp16"), ({"channels_last": True}, "train.channels_last")],
)
def test_what_fsdp_cannot_do_is_refused(override, says):
    with pytest.raises(ConfigError, match=says):
        distributed.check_sharding(TrainConfig(parallel="fsdp", **override))


@pytest.fixture
def mesh(tmp_path, monkeypatch):
    """This process alone, as a group that FSDP divides among."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'meet'}", rank=0, world_size=1)
    alone = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
    monkeypatch.setattr(distributed, "fully_shard", functools.partial(distributed.fully_shard, mesh=alone))
    yield alone
    torch.distributed.destroy_process_group()


def _dense(kind: str) -> tuple[nn.Module, Callable[[nn.Module], torch.Tensor]]:
    """A small dense model, and its loss."""
    images = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    if kind == "detect":
        model = build_detector("test_foveal_dinat", "fcos", num_classes=2, neck_kwargs={"out_channels": 32})
        targets = [{"boxes": torch.tensor([[8.0, 8.0, 40.0, 40.0]]), "labels": torch.tensor([1])}] * 2
        return model, lambda m: sum(m(list(images), targets).values())
    model = build_segmenter("test_foveal_dinat", num_classes=3, **{f"{k}_kwargs": {"channels": 16} for k in PARTS})
    return model, lambda m: sum(each.square().mean() for each in m(images))


@pytest.mark.parametrize("kind", ["detect", "segment"])
def test_fsdp_of_dense_models(mesh, kind):
    """Which call parts of a stage, not the stage: each block is divided by itself, and the gradients are the same."""
    model, loss = _dense(kind)
    sharded = deepcopy(model)
    distributed.shard(sharded, 1000)
    units = {name for name, module in sharded.named_modules() if isinstance(module, FSDPModule)}
    assert any(".blocks." in name for name in units)
    for each in (model, sharded):
        torch.manual_seed(0)
        loss(each.train()).backward()
    found = dict(sharded.named_parameters())
    for name, parameter in model.named_parameters():
        if parameter.grad is None:
            assert found[name].grad is None
        else:
            torch.testing.assert_close(distributed.full(found[name].grad), parameter.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["train.amp=bf16", "model.grad_checkpointing=true"]], ids=["float32", "bf16"])
def test_fsdp_is_ddp_is_one_process(recipe, tmp_path, more):
    """The same images in each update: the same weights but for rounding, and files of the same form."""
    runs = {"one": 1, "ddp": 2, "fsdp": 2}
    for name, world in runs.items():
        parts = [f"train.grad_accum_steps={4 // world}", f"train.parallel={'fsdp' if name == 'fsdp' else 'ddp'}"]
        options = [f"output={tmp_path / name}", "train.fsdp_min_num_params=1000", "train.batch_size=4", *parts, *more]
        assert launch(recipe, options, world) == [0] * world
    if not more:  # in bf16 rounding decides too much
        close(tmp_path / "ddp", tmp_path / "one")
        close(tmp_path / "fsdp", tmp_path / "one")
    states = [torch.load(tmp_path / n / "last" / checkpoint.TRAINER, weights_only=True)["optimizer"] for n in runs]
    shapes = [{k: {n: tuple(t.shape) for n, t in v.items()} for k, v in s["state"].items()} for s in states]
    assert shapes[0] == shapes[1] == shapes[2]
    loss = [float(metrics(tmp_path / name)[-1]["val_loss"]) for name in runs]
    assert loss[1:] == pytest.approx([loss[0]] * 2, rel=2e-2 if more else 1e-4)
    evaluate(tmp_path / "fsdp", [f"output={tmp_path / 'result.json'}"])
    best = max(float(row["top1"]) for row in metrics(tmp_path / "fsdp"))
    assert json.loads((tmp_path / "result.json").read_text())["top1"] == best


@pytest.mark.slow
@pytest.mark.parametrize(
    ("before", "after"), [(("fsdp", 2), ("fsdp", 2)), (("fsdp", 2), ("ddp", 1)), (("ddp", 1), ("fsdp", 2))], ids=str
)
def test_going_on_with_others(recipe, tmp_path, before, after):
    """Stopped in the second epoch, with FSDP and without, by one process and by two: every image of the epoch is seen
    once, and without anything drawn at random the weights are those of a run that was not stopped."""
    whole, run, record = tmp_path / "whole", tmp_path / "run", tmp_path / "record"
    record.mkdir()

    def options(kind: str, world: int) -> list[str]:
        return [
            f"train.parallel={kind}",
            f"train.grad_accum_steps={4 // world}",
            "train.batch_size=4",
            "train.fsdp_min_num_params=1000",
        ]

    assert launch(recipe, [f"output={whole}", *options(*before)], before[1]) == [0] * before[1]
    batch = 4 // before[1] * (8 + 3)  # of the eleventh update of sixteen
    stopped = [f"output={run}", *options(*before)]
    assert launch(recipe, stopped, before[1], stop=[before[1] - 1, batch], record=str(record)) == [0] * before[1]
    assert not (run / "summary.json").exists()
    going_on = [f"output={run}", "resume=auto", *options(*after)]
    assert launch(recipe, going_on, after[1], record=str(record)) == [0] * after[1]
    if before == after:
        assert_same_run(run, whole)
    else:
        close(run, whole)
    seen = []
    for file in record.iterdir():
        seen += [
            i for number, _, indices in map(json.loads, file.read_text().splitlines()) if number == 1 for i in indices
        ]
    # the batch that each process had read ahead when it was stopped is none
    assert sorted(seen) == list(range(128))


def test_another_number_of_processes_needs_updates_of_as_many_images(recipe, tmp_path):
    train(recipe, [f"output={tmp_path / 'run'}", "schedule.epochs=1"])
    path = tmp_path / "run/last" / checkpoint.TRAINER
    saved = torch.load(path, weights_only=True)
    saved["shape"] |= {"images per update": 32, "updates per epoch": 4}
    saved["random"], saved["losses"] = saved["random"] * 2, saved["losses"] * 2  # as by two processes
    torch.save(saved, path)
    checkpoint.seal(path.parent)
    with pytest.raises(CheckpointError, match=r"epoch .*4.*8.* 1 .* 2.*train\.grad_accum_steps=4"):
        train(recipe, [f"output={tmp_path / 'run'}", "resume=auto"])
    train(recipe, [f"output={tmp_path / 'run'}", "resume=auto", "train.grad_accum_steps=4"])


def bare(*command: str, folder: Path) -> subprocess.CompletedProcess:
    """A command as a user types it: none of the variables by which tests or launchers steer."""
    set_here = re.compile("OMP_NUM_THREADS|MKL_NUM_THREADS|ACCELERATE_.*|MASTER_.*|WORLD_SIZE|(LOCAL_)?RANK")
    environment = {name: value for name, value in os.environ.items() if not set_here.fullmatch(name)}
    program = str(Path(sys.executable).with_name(command[0]))
    return subprocess.run([program, *command[1:]], cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_torchrun_without_a_gpu(tmp_path):
    """The documented command as it stands is one run of two processes."""
    short = ["schedule.epochs=1", "data.limit=128"]
    done = bare(
        "torchrun", "--nproc_per_node", "2", "-m", "foveal", "train", "classify", "digits", *short, folder=tmp_path
    )
    assert done.returncode == 0, done.stderr
    assert "cpu x 2" in done.stdout
    assert json.loads((tmp_path / "runs/digits/environment.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_accelerate_launch_that_starts_one_process_is_refused(tmp_path):
    """accelerate starts a single process with --cpu: better no run than half of one."""
    launch = ["accelerate", "launch", "--cpu", "--num_processes", "2", "-m", "foveal", "train", "classify", "digits"]
    done = bare(*launch, folder=tmp_path)
    assert done.returncode != 0
    assert "torchrun --nproc_per_node" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_a_launcher_with_other_processes_than_joined_is_refused(monkeypatch):
    alone = types.SimpleNamespace(num_processes=1, device=torch.device("cpu"))
    monkeypatch.setattr(distributed, "Accelerator", lambda **_: alone)
    assert distributed.join_processes() is alone
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(ConfigError, match=r"3 processes.*1 .*torchrun"):
        distributed.join_processes()


@pytest.mark.slow
def test_four_processes_of_torchrun(recipe, tmp_path):
    train(recipe, [f"output={tmp_path / 'one'}", "train.batch_size=4", "train.grad_accum_steps=4"])
    options = [f"output={tmp_path / 'four'}", "train.batch_size=4", "train.grad_accum_steps=1"]
    torchrun(recipe, options, 4, tmp_path)
    close(tmp_path / "four", tmp_path / "one")


@pytest.mark.slow
def test_a_killed_process_is_restarted_from_the_last_checkpoint(recipe, tmp_path):
    """torchrun's elastic restart: the second process dies without a word in the second epoch."""
    options = ["resume=auto", "train.save_interval=3", "model.drop_path_rate=0.2", "augment.mixup=0.3"]
    assert launch(recipe, [f"output={tmp_path / 'whole'}", *options], 2) == [0, 0]
    said = torchrun(recipe, [f"output={tmp_path / 'run'}", *options], 2, tmp_path, restarts=1, kill=[1, 13])
    assert "epoch 2, update 1" in said
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE" not in said
    assert_same_run(tmp_path / "run", tmp_path / "whole")


def test_restarts_that_may_fail_are_told():
    """torchrun keeps one store over its restarts, with the addresses of processes that are gone."""
    shared = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_MAX_RESTARTS": "3"}
    assert "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1" in shared_store(shared, processes=2)
    assert shared_store(shared, processes=1) is None
    assert shared_store(shared | {"TORCHELASTIC_MAX_RESTARTS": "0"}, processes=2) is None
    assert shared_store(shared | {"TORCHELASTIC_USE_AGENT_STORE": "False"}, processes=2) is None
    assert shared_store({}, processes=2) is None


@pytest.fixture
def slurm(tmp_path):
    """Commands of Slurm's names that write down what they are asked; `srun` runs nothing but ``SRUN``."""
    folder = tmp_path / "bin"
    folder.mkdir()
    for name, text in {
        "scontrol": 'echo "scontrol $*" >> "$ASKED"; [ "$1" != show ] || printf "node1\\nnode2\\n"',
        "srun": 'echo "srun $*" >> "$ASKED"; eval "$SRUN"',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)

    def sbatch(arguments: list[str], srun: str, stop: bool = False) -> tuple[int, list[str]]:
        asked = tmp_path / "asked.txt"
        asked.write_text("")
        settings = {"ASKED": str(asked), "SRUN": srun, "PATH": f"{folder}:{os.environ['PATH']}"}
        settings |= {"SLURM_JOB_ID": "7", "SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "node[1-2]"}
        script = Path(__file__).parents[2] / "docs/slurm.sbatch"
        process = subprocess.Popen(["bash", str(script), *arguments], env=settings, stderr=subprocess.DEVNULL)
        while stop and process.poll() is None and "ready" not in asked.read_text():
            time.sleep(0.01)
        if stop:
            process.terminate()
        return process.wait(), asked.read_text().splitlines()

    return sbatch


def test_the_slurm_script(slurm, tmp_path):
    """Asked to stop, it passes that on and has the job queued again; a run that is finished or failed is left alone."""
    run = tmp_path / "run"
    run.mkdir()
    arguments = ["dinat_tiny", f"output={run}", "optim.lr=1e-3"]
    code, asked = slurm(arguments, "exit 3")
    assert (code, len(asked)) == (3, 2)
    assert "--nnodes=2" in asked[1]
    assert "--rdzv_endpoint=node1:29500" in asked[1]
    assert asked[1].endswith(f"-m foveal train classify dinat_tiny output={run} optim.lr=1e-3 resume=auto")
    waits = 'trap \'kill $!; echo stopped >> "$ASKED"; exit 1\' TERM; sleep 600 & echo ready >> "$ASKED"; wait'
    code, asked = slurm(arguments, waits, stop=True)
    assert (code, asked[2:]) == (1, ["ready", "stopped", "scontrol requeue 7"])
    code, asked = slurm(arguments, f"touch {run}/summary.json")
    assert (code, len(asked)) == (0, 2)
    assert slurm(["dinat_tiny"], "true") == (1, [])
    code, asked = slurm(arguments, 'env >> "$ASKED"')
    assert {f"{name}={value}" for name, value in OWN_STORE.items()} <= set(asked)


PAGE = (Path(__file__).parents[2] / "docs/distributed.md").read_text(encoding="utf-8")


def launched(command: str) -> argparse.Namespace:
    """What torchrun makes of a command, whose end has to be a training that `foveal` would begin."""
    words = shlex.split(command, comments=True)
    found = get_args_parser().parse_args(words[words.index("torchrun") + 1 :])
    assert (found.module, found.training_script) == (True, "foveal")
    verb, task, name, *overrides = found.training_script_args
    assert (verb, task) == ("train", "classify")
    load_config(name, overrides)
    return found


def test_the_commands_of_the_page():
    (block,) = re.findall(r"```\n(torchrun .*?)```", PAGE, re.DOTALL)
    alone, many = map(launched, block.replace("\\\n", "").strip().splitlines())
    assert (alone.standalone, alone.nproc_per_node) == (True, "8")
    assert all(f"{name}={value} torchrun" in block for name, value in OWN_STORE.items())
    assert (many.nnodes, many.max_restarts, many.rdzv_endpoint) == ("4", 3, "HOST:29500")


def test_the_kubernetes_job():
    """Its parts agree: pods with nodes, GPUs with processes, addresses with names, paths with volumes."""
    job = yaml.safe_load(re.search(r"```yaml\n(.*?)```", PAGE, re.DOTALL)[1])
    pod = job["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (command,) = container["args"]
    found = launched(command.replace("$JOB_COMPLETION_INDEX", "3"))
    assert (job["kind"], job["spec"]["completionMode"]) == ("Job", "Indexed")
    assert int(found.nnodes) == job["spec"]["completions"] == job["spec"]["parallelism"]
    assert (found.node_rank, int(found.nproc_per_node)) == (3, container["resources"]["limits"]["nvidia.com/gpu"])
    assert {entry["name"]: entry["value"] for entry in container["env"]}.items() >= OWN_STORE.items()
    assert found.rdzv_endpoint == f"{job['metadata']['name']}-0.{pod['subdomain']}:29500"
    assert pod["terminationGracePeriodSeconds"] > 30  # which torchrun gives its processes
    mounts = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounts.keys() == {volume["name"] for volume in pod["volumes"]}
    paths = [o.partition("=")[2] for o in found.training_script_args if o.startswith(("output=", "data.root="))]
    assert len(paths) == 2
    assert all(any(path.startswith(mount) for mount in mounts.values()) for path in paths)


def test_the_code_for_ray(monkeypatch):
    """With classes of Ray's names, of which the trainer runs its function here."""

    class TorchTrainer:
        def __init__(self, worker: Callable, train_loop_config: dict, scaling_config: dict, run_config: dict):
            assert scaling_config["num_workers"] == 32
            assert run_config["failure_config"]["max_failures"] > 0
            self.fit = functools.partial(worker, train_loop_config)

    asked, fails = [], [False, True]

    def fake(name: str, overrides: list[str]) -> None:
        asked.append((name, overrides))
        if fails.pop(0):
            raise CheckpointError("a full disk")

    names = ("ScalingConfig", "RunConfig", "FailureConfig")
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    monkeypatch.setitem(sys.modules, "ray.train", types.SimpleNamespace(**dict.fromkeys(names, dict)))
    monkeypatch.setitem(sys.modules, "ray.train.torch", types.SimpleNamespace(TorchTrainer=TorchTrainer))
    monkeypatch.setattr(run, "train", fake)
    code = compile(re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1], "distributed.md", "exec")
    exec(code, {})
    with pytest.raises(CheckpointError, match="a full disk"):
        exec(code, {})
    for name, overrides in asked:
        assert load_config(name, overrides).resume == "auto"


@pytest.mark.slow
def test_sigterm_to_torchrun_saves(recipe, tmp_path):
    """As a scheduler sends it: every process stops at the same update, and the run goes on from there."""
    run, file = tmp_path / "run", tmp_path / "job.json"
    options = [f"output={run}", "schedule.epochs=500", "resume=auto"]
    file.write_text(json.dumps({"recipe": str(recipe), "overrides": options}))
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        str(SCRIPT),
        str(file),
    ]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"},
    )
    try:
        while process.poll() is None and not (run / "metrics.csv").exists():
            time.sleep(0.1)
        process.terminate()
        said, _ = process.communicate()
    finally:  # also when this test runs out of time; torchrun ends the processes that it has started
        process.terminate()
    assert f"{run}/last" in said, said
    checkpoint.verify(run / "last")
    assert not (run / "summary.json").exists()
    epochs = torch.load(run / "last" / checkpoint.TRAINER, weights_only=True)["state"]["epoch"]
    assert launch(recipe, [*options, f"schedule.epochs={epochs + 1}"], 2) == [0, 0]
    assert len(metrics(run)) == epochs + 1
