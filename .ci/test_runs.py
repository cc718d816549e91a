"""Whole runs of train.py: flags, refusals, kills, full disks, ranks, and every kind of network.

With OMP_NUM_THREADS=1: forked processes wait for ever for threads that they do not have.
"""

import argparse
import fnmatch
import json
import math
import multiprocessing
import os
import pkgutil
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import numpy as np
import PIL.Image
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import distributed, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from backbones import FAMILIES, train_step

import train
from pixpro import Backbone, Heads, PixPro, momentum_at
from test_pixpro import HERE, small_batch, small_pixpro, trained

SMALL = ["--arch", "resnet18", "--layer", "layer2", "--size", "32", "--batch", "4"]
SMALL += ["--hidden-dim", "32", "--amp", "off", "--device", "cpu", "--workers", "0"]
SECONDS = 100  # longer than any run takes


# ------------------------------------ Runs ------------------------------------
def run(out, *flags):
    train.main([*SMALL, "--out", str(out), *map(str, flags)])


def write_images(folder, numbers, height=40):
    folder.mkdir(parents=True)
    for number in numbers:
        pixels = np.random.default_rng(number).integers(0, 256, (height, 30 + number, 3))
        PIL.Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.png")


@pytest.fixture(autouse=True, scope="module")
def often():
    """Every step is recorded and saved; few scenes are drawn."""
    values = {"RECORD_STEPS": 1, "SAVE_SECONDS": 0, "SCENES": 8, "PROBE_SCENES": 6}
    with mock.patch.multiple(train, **values), mock.patch("sys.argv", ["train.py"]):
        yield


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    folder = tmp_path_factory.mktemp("given") / "images"
    write_images(folder, range(12))
    return folder


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """What a run of six steps that nothing disturbs leaves."""
    out = tmp_path_factory.mktemp("whole") / "out"
    run(out, "--data", images, "--steps", 6)
    return out


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.glob("*") if path.is_file()}


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def assert_same(out, whole):
    """Bit for bit: weights, state of the optimizer, records, picture."""
    names = {path.name for path in out.glob("*") if path.is_file()} - {"writing.tmp"}
    assert names == contents(whole).keys()
    for name in names - {"last.pt"}:
        assert (out / name).read_bytes() == (whole / name).read_bytes(), name
    one, other = torch.load(out / "last.pt"), torch.load(whole / "last.pt")
    assert one.pop("settings") == other.pop("settings")
    torch.testing.assert_close(one, other, rtol=0, atol=0)


def run_disturbed(number, name, action, *arguments):
    """A run in which something happens before this call of a function."""
    function, calls = pkgutil.resolve_name(name), []

    def disturbed(*arguments, **options):
        calls.append(arguments)
        if len(calls) == number:
            action(*arguments)
        return function(*arguments, **options)

    with mock.patch(name, disturbed):
        run(*arguments)


def die(*arguments):
    if isinstance(arguments[-1], Path) and not isinstance(arguments[0], Path):
        arguments[-1].write_bytes(b"half of what was to be saved")
    raise KeyboardInterrupt  # like a kill, it is caught nowhere in a run


def run_killed(number, name, *arguments):
    with pytest.raises(KeyboardInterrupt):
        run_disturbed(number, name, die, *arguments)


def assert_refused(capsys, words, *arguments):
    """One sentence that has these words and exit code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        run(*arguments)
    printed = capsys.readouterr()
    *usage, sentence = printed.err.splitlines()
    assert sentence.startswith("train.py: error: ") and words in sentence, sentence
    assert stop.value.code == 2 and printed.out == "" and len(usage) <= 1


# ------------------------------------ What a run writes ------------------------------------
def test_a_demo_run_writes_everything(tmp_path, capsys):
    """With heads; the weights are written before what may fail."""
    flags = ["--heads", "--size", 64, "--steps", 2, "--lr", 1, "--keep", 1]
    run_killed(1, "train.linear_probe", tmp_path, *flags)
    about = f"{tmp_path}: resnet18 on 8 images (left out: nothing), cpu, off, step 0\n1/2 loss "
    printed = capsys.readouterr().out
    assert printed.startswith(about) and "complete" not in printed
    files = {"backbone-1.pt", "backbone-2.pt", "backbone.pt", "heads.pt", "last.pt", "lock"}
    assert contents(tmp_path).keys() == files | {"metrics.jsonl"}
    run(tmp_path, *flags)
    printed = capsys.readouterr().out
    probes = re.findall(r"linear probe, mIoU (\d+\.\d): (.+)", printed)
    assert [name for _, name in probes] == ["random", "random, blocks on", "pre-trained"]
    assert len({miou for miou, _ in probes}) == 3 and "complete: 2 steps" in printed
    before = contents(tmp_path)
    assert before.keys() == files | {"metrics.jsonl", "features.png"}
    assert before["backbone-2.pt"] == before["backbone.pt"] != before["backbone-1.pt"]
    for name in ("backbone.pt", "heads.pt", "lock"):  # the last time nothing is left to do
        (tmp_path / name).unlink()
        run(tmp_path, *flags[:-1], 5)
        assert contents(tmp_path) == before

    model, heads = torch.load(tmp_path / "last.pt")["model"], torch.load(tmp_path / "heads.pt")
    assert all(torch.equal(w, model[f"backbone.{name}"]) for name, w in heads.items())
    Heads("resnet18").load_state_dict(heads)
    network, weights = torchvision.models.resnet18(), torch.load(tmp_path / "backbone.pt")
    missing, unexpected = network.load_state_dict(weights, strict=False)
    assert missing == ["fc.weight", "fc.bias"] and not unexpected
    for state in (weights, heads):
        save_file(state, tmp_path / "a.safetensors")  # wants contiguous tensors


def test_the_probe_and_the_picture_fit_a_network_of_one_size(whole, tmp_path, capsys):
    layers = nn.Flatten(), nn.Linear(3 * 32 * 32, 4), nn.Unflatten(1, (4, 1, 1))
    network = nn.Sequential()
    network.add_module("body", nn.Sequential(*layers))
    args = argparse.Namespace(out=tmp_path, data=None, size=32, heads=False, seed=0)
    train.finish(args, None, network, network)
    assert capsys.readouterr().out.count("linear probe, mIoU") == 3
    # Images and two rows of features; other networks show twice the size of their views.
    for folder, count, side in ((tmp_path, 6, 32), (whole, 8, 64)):
        with PIL.Image.open(folder / "features.png") as image:
            assert image.size == (count * (side + 4) + 4, 3 * (side + 4) + 4)


def test_a_line_of_the_log_has_80_columns_and_warns_of_collapse(tmp_path, capsys):
    values = {"loss": -1.9876, "similarity": -0.123, "pairs": 1234.5, "spread": 0.9}
    args = argparse.Namespace(out=tmp_path, steps=40, batch=32, warmup_steps=10)
    train.record(args, 10, values, 0.25)
    line = "10/40 loss -1.988 similarity -0.12 spread 0.90 8 images/s 2 min left\n"
    assert capsys.readouterr().out == line
    assert metrics(tmp_path) == [{"step": 10} | values]
    for step, spread, warned in ((20, 0.2, True), (20, 0.8, False), (10, 0.2, False)):
        train.record(args, step, values | {"spread": spread}, 1.0)
        assert ("the features may have collapsed" in capsys.readouterr().out) == warned
    args.steps, args.batch = 125100, 1024  # the paper's
    train.record(args, 99990, values | {"loss": 15.4321}, 1.25)
    assert re.fullmatch(r".{,55}1280 images/s 5.58 h left\n", capsys.readouterr().out)


# After the last step before a checkpoint, and after the one before, so that the loss shows it.
@pytest.mark.parametrize("step, words", [(4, "the weights are not finite"), (3, "the loss is nan")])
def test_numbers_that_are_not_finite_are_never_saved(images, tmp_path, monkeypatch, step, words):
    def spoil(optimizer):
        optimizer.param_groups[0]["params"][0].data.fill_(math.inf)

    monkeypatch.setattr(train, "RECORD_STEPS", 2)
    with pytest.raises(FloatingPointError, match=words):
        run_disturbed(step, "train.LARS.step", spoil, tmp_path, "--data", images, "--steps", 6)
    assert torch.load(tmp_path / "last.pt")["step"] == 2
    assert contents(tmp_path).keys() == {"last.pt", "lock", "metrics.jsonl"}


def test_precisions_differ_by_rounding_and_fp16_keeps_its_scale(images, tmp_path):
    flags = ["--data", images, "--steps", 2, "--layer", "layer1", "--size", 16]
    for amp in ("off", "bf16", "fp16"):
        run(tmp_path / amp, *flags, "--amp", amp)
    losses = [metrics(tmp_path / amp)[-1]["loss"] for amp in ("off", "bf16", "fp16")]
    assert len(set(losses)) == 3 and losses == pytest.approx([losses[0]] * 3, abs=0.05)
    run_killed(2, "train.momentum_at", tmp_path / "killed", *flags, "--amp", "fp16")
    run(tmp_path / "killed", *flags, "--amp", "fp16")
    assert_same(tmp_path / "killed", tmp_path / "fp16")
    assert torch.load(tmp_path / "killed" / "last.pt")["scaler"]["_growth_tracker"] == 2


def test_seeds_ranks_and_steps_draw_dropout_of_their_own(images, tmp_path, monkeypatch):
    seeds, update = [], PixPro.update_momentum

    def recording(model, m):
        seeds.append(torch.initial_seed())
        update(model, m)

    monkeypatch.setattr(PixPro, "update_momentum", recording)
    for seed, rank in ((0, 0), (0, 1), (1, 0)):
        monkeypatch.setattr(train, "join_ranks", lambda _, rank=rank: (rank, 1))
        run(tmp_path / f"{seed}{rank}", "--data", images, "--steps", 2, "--seed", seed)
    assert len(set(seeds)) == len(seeds) >= 5


# ------------------------------------ Flags and refusals ------------------------------------
def test_flags_have_the_papers_values_and_the_demos(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: range(6), raising=False)
    paper, demo = train.parse(["--data", "images"]), train.parse([])
    values = {"arch": "resnet50", "layer": "layer4", "size": 224, "batch": 1024, "epochs": 100}
    values |= {"crop_scale": 0.08, "ema_momentum": 0.99, "gamma": 2, "threshold": 0.7}
    values |= {"warmup_epochs": 5, "lr": None, "out": Path("runs/paper"), "workers": 3}  # of six
    assert values.items() <= vars(paper).items()
    values |= train.DEMO | {"out": Path("runs/demo")}
    assert values.items() <= vars(demo).items()
    changed = train.parse(["--batch", "8", "--recipe", "demo", "--data", "images"])
    assert (changed.batch, changed.arch) == (8, "resnet18")


# Flags, after those of a run that is complete, and words of the refusal.
REFUSED = [
    ("--obj pixpro", "unrecognized arguments: --obj"),
    ("--batch 0", "argument --batch: expected 1 to 1e+12, found 0"),
    ("--steps 1e4", "argument --steps: invalid int value: '1e4'"),
    ("--lr nan", "argument --lr: expected 1e-09 to 1e+12, found nan"),
    ("--crop-scale 1.1", "argument --crop-scale: expected 1e-09 to 1, found 1.1"),
    ("--out {new} --arch resnet19", "classification network of torchvision, found 'resnet19'"),
    ("--out {new} --arch vit_b_16 --layer conv_proj --size 224", "conv_proj"),
    ("--out {new} --arch maxvit_t --layer blocks.3 --size 112", ""),  # it takes one size
    ("--out {new} --arch swin_t --layer features --size 64", "permute"),
    ("--out {new} --heads --size 64 --batch 1", "1"),
    ("--out {new} --layer layer9", "'layer9' is not present in model"),
    ("--out {new} --layer layer1 --size 4", "a map of at least 2 x 2, found 4"),
    ("--out {new} --batch 13", "expected a batch of at most 12 images, a multiple of 1, found 13"),
    ("--out {new} --data nowhere", "No such file or directory: 'nowhere/'"),
    ("--out {new} --data {tmp}/none", "none', found none; left out: 1 .csv"),
    ("--out {tmp}/link/runs/a", "expected --out outside of --data"),
    ("--out {tmp}/none/table.csv", "File exists"),
    ("--out {tmp}/drawn", "expected last.pt beside the results in"),
    ("--out {tmp}/kept", "expected last.pt beside the results in"),
    ("--out {tmp}/log", "expected last.pt beside the results in"),
    ("--gamma 1 --seed 3", "or another --out; found: gamma was 2.0, is 1.0; seed was 0, is 3"),
    ("--data {tmp}/renamed", "files was "),
    ("--data {tmp}/others", "files was "),
]


@pytest.mark.parametrize("flags, words", REFUSED)
def test_a_refusal_writes_nothing(images, whole, tmp_path, capsys, flags, words):
    for name in ("none/table.csv", "drawn/features.png", "kept/heads.pt", "log/metrics.jsonl"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("{}\n{}\n")
    (tmp_path / "link").symlink_to(images)
    write_images(tmp_path / "renamed", range(1, 13))
    write_images(tmp_path / "others", range(12), height=41)
    folders = (tmp_path, images, whole)
    before = [sorted(folder.rglob("*")) for folder in folders], contents(whole)
    flags = flags.format(tmp=tmp_path, data=images, new=tmp_path / "new").split()
    assert_refused(capsys, words, whole, "--data", images, "--steps", 6, *flags)
    assert ([sorted(folder.rglob("*")) for folder in folders], contents(whole)) == before


def test_other_code_is_another_run(images, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(train, "__file__", str(tmp_path / "train.py"))
    for changed, line in (("train.py", "x = 1"), ("pixpro.py", "x = 1"), ("pixpro.py", "# x")):
        for name in ("train.py", "pixpro.py"):
            shutil.copy(HERE / name, tmp_path)
        with open(tmp_path / changed, "a") as file:
            file.write(line)
        if line == "x = 1":
            assert_refused(capsys, "code was ", whole, "--data", images, "--steps", 6)
    run(whole, "--data", images, "--steps", 6)  # a comment changes nothing


def test_what_is_no_checkpoint_is_refused(whole, tmp_path):
    path, last = tmp_path / "last.pt", torch.load(whole / "last.pt")
    with_code = last | {"step": re.compile("")}
    for other in ({"epoch": 3}, last["model"], with_code, "text", b"half", b""):
        torch.save(other, path)
        if isinstance(other, bytes):
            path.write_bytes((whole / "last.pt").read_bytes()[: 1000 * len(other)])
        with pytest.raises(ValueError, match=r"expected a checkpoint of train.py, found .*last.pt"):
            train.load_checkpoint(tmp_path, last["settings"])


def test_what_a_machine_may_lack(tmp_path, monkeypatch):
    """Locks of files, in a file system or at all; bf16; a list of what the CPU can."""
    fcntl = mock.Mock(LOCK_EX=2, LOCK_NB=4)
    fcntl.lockf.side_effect = OSError
    for module in (fcntl, None):
        monkeypatch.setattr(train, "fcntl", module)
        train.lock(tmp_path).close()
    for flags, amp in (("avx512_bf16", "bf16"), ("amx_bf16", "bf16"), ("avx512f", "off")):
        monkeypatch.setattr(Path, "read_text", lambda path, flags=flags: flags)
        assert train.auto_amp("cpu") == amp
    monkeypatch.setattr(Path, "exists", lambda path: False)
    assert train.auto_amp("cpu") == "off"


# ------------------------------------ Stopped and continued ------------------------------------
MOMENTS = [
    (4, "train.momentum_at", ["--amp", "bf16", "--instance-weight", 1, "--num-layers", 2]),
    (3, "train.record", ["--objective", "pixcontrast"]),
    (1, "train.save_checkpoint", []),
    (3, "torch.save", []),
    (3, "os.replace", []),
    (1, "train.save_image", []),
]


@pytest.mark.parametrize("number, name, flags", MOMENTS)
def test_a_killed_run_continues_bit_for_bit(images, tmp_path, number, name, flags):
    """With the data in another place and other workers. The data may lie in --out."""
    out, data = tmp_path / "killed", tmp_path / "killed" / "data"
    shutil.copytree(images, data)
    (data / "spoiled.png").touch()  # is replaced by the same image in both runs
    flags = ["--steps", 6, "--lr", 1, *flags]
    run(tmp_path / "whole", *flags, "--data", data)
    run_killed(number, name, out, *flags, "--data", data)
    assert not (out / "features.png").exists()
    with open(out / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # what a kill in the middle of writing leaves
    data.rename(tmp_path / "moved")
    run(out, *flags, "--data", tmp_path / "moved", "--workers", 2)
    assert_same(out, tmp_path / "whole")


def test_train_continues_at_the_step_that_was_saved(images, tmp_path):
    """m goes on, too, and records that are lost stay lost."""
    flags = ["--data", images, "--steps", 5, "--ema-momentum", 0.9]
    run_killed(4, "train.momentum_at", tmp_path, *flags)
    (tmp_path / "metrics.jsonl").unlink()
    update = PixPro.update_momentum
    with mock.patch.object(PixPro, "update_momentum", autospec=True, side_effect=update) as used:
        run(tmp_path, *flags)
    wanted = [momentum_at(step, 5, base=0.9) for step in (3, 4)]
    assert [call.args[1] for call in used.call_args_list] == wanted
    assert [(record["step"], record["m"]) for record in metrics(tmp_path)] == [*zip((4, 5), wanted)]


def test_a_full_disk_keeps_the_last_checkpoint(images, whole, tmp_path):
    """A limit on the size of files fails as a full disk does, midway."""
    arguments = [tmp_path, "--data", images, "--steps", 6]
    run_killed(3, "train.momentum_at", *arguments)
    before, limits = contents(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before["last.pt"]) // 2, limits[1]))
    try:
        with pytest.raises(OSError, match=r"cannot write .*last.pt; is the disk full\?"):
            run(*arguments)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert (tmp_path / "last.pt").read_bytes() == before["last.pt"]
    run(*arguments)
    assert_same(tmp_path, whole)


def test_ctrl_c_ends_in_one_line(images, tmp_path):
    """As at a terminal it reaches the workers, too."""
    flags = [*SMALL, "--data", images, "--steps", "100000", "--workers", "1", "--out", tmp_path]
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    options["preexec_fn"] = lambda: signal.signal(signal.SIGINT, signal.SIG_DFL)  # if ignored
    command = [sys.executable, HERE / "train.py", *flags]
    with subprocess.Popen(command, start_new_session=True, **options) as process:
        while not process.stdout.readline().startswith("10/100000 loss "):
            assert process.poll() is None
        os.killpg(process.pid, signal.SIGINT)
        _, errors = process.communicate(timeout=SECONDS)
    sentence = "train.py: interrupted; the same command continues from the last checkpoint"
    assert errors.strip() == sentence and process.returncode == 1


# ------------------------------------ Ranks, processes ------------------------------------
def start(log, environment, function, *arguments):
    """Calls a function in another process, which prints to files of this name."""

    def child():
        os.setsid()  # so that a kill reaches its workers, and no other process
        os.environ.update(environment)
        with open(f"{log}.out", "w", 1) as out, open(f"{log}.err", "w", 1) as err:
            sys.stdout, sys.stderr = out, err
            function(*arguments)

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    return process


def rank_variables(ranks):
    """What torchrun sets for each rank."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    shared = {"WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    return [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]


def run_ranks(log, function, *arguments):
    """Calls a function on two ranks, with arguments of each; their exit codes, outputs, errors."""
    variables = rank_variables(2)
    ranks = [start(f"{log}{k}", variables[k], function, *arguments[k]) for k in (0, 1)]
    for process in ranks:
        process.join(SECONDS)
        process.kill()
    texts = [[Path(f"{log}{k}.{kind}").read_text() for k in (0, 1)] for kind in ("out", "err")]
    return [process.exitcode for process in ranks], *texts


# What one rank has besides the flags of both, and words of the refusal.
UNEQUAL = {
    "--data {}/fewer": "expected the same images on all ranks, found [",
    "--data {}/renamed": "expected the same files on all ranks, found [",
    "--data {}/nowhere": "[Errno 2] No such file or directory",
    "--gamma 3": "expected the same gamma on all ranks, found [",
    "--out {}/old": "expected the same step on all ranks, found [",
}


@pytest.mark.parametrize("other", [0, 1])
@pytest.mark.parametrize("flags", UNEQUAL)
def test_ranks_that_differ_are_refused(images, whole, tmp_path, flags, other):
    """An old run's folder is as it was, and a new one has at most an empty lock file."""
    write_images(tmp_path / "fewer", range(8))
    write_images(tmp_path / "renamed", range(1, 13))
    shutil.copytree(whole, tmp_path / "old")
    shared = [tmp_path / "new", "--data", images, "--steps", 6]
    arguments = [shared, [*shared, *flags.format(tmp_path).split()]]
    ranks = arguments[1 - other], arguments[other]
    codes, outs, errors = run_ranks(tmp_path / "log", run, *ranks)
    assert (codes, outs) == ([2, 2], ["", ""]), errors
    assert errors[0] == errors[1] and errors[0].count("\n") == 1
    assert errors[0].startswith(f"train.py: error: {UNEQUAL[flags]}")
    assert_same(tmp_path / "old", whole)
    assert contents(tmp_path / "new") in ({}, {"lock": b""})


@pytest.mark.parametrize("name, value", [("RANK", "first"), ("WORLD_SIZE", ""), ("RANK", None)])
def test_half_of_torchruns_variables_is_refused(tmp_path, monkeypatch, capsys, name, value):
    for variable, number in (rank_variables(1)[0] | {name: value}).items():
        if number is not None:
            monkeypatch.setenv(variable, number)
    assert_refused(capsys, "expected RANK, LOCAL_RANK and WORLD_SIZE", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_rank_of_torchrun_is_ddp_and_trains_as_without(images, whole, tmp_path, monkeypatch):
    for name, value in rank_variables(1)[0].items():
        monkeypatch.setenv(name, value)
    parallel = nn.parallel.DistributedDataParallel
    with mock.patch.object(nn.parallel, "DistributedDataParallel", side_effect=parallel) as used:
        run(tmp_path, "--data", images, "--steps", 6)
    assert used.call_count == 1 and not distributed.is_initialized()
    assert_same(tmp_path, whole)


def test_two_ranks_continue_after_one_has_died(images, whole, tmp_path):
    """One process began the run; torchrun continues it."""
    arguments = [tmp_path, "--data", images, "--steps", 6]

    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    run_killed(3, "train.momentum_at", *arguments)
    ranks = [(3, "train.momentum_at", action, *arguments) for action in (print, kill)]
    codes, outs, _ = run_ranks(tmp_path / "log", run_disturbed, *ranks)
    assert codes == [1, -signal.SIGKILL] and "off, step 2\n" in outs[0] and outs[1] == ""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    command += [HERE / "train.py", *SMALL, "--out", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    printed = done.stdout
    assert printed.count("complete: 6 steps") == printed.count("off, step 4\n") == 1, done.stderr
    before, after = metrics(whole)[3], metrics(tmp_path)[3]  # of the same samples and crops
    assert after["pairs"] == pytest.approx(before["pairs"])
    assert after["loss"] == pytest.approx(before["loss"], abs=0.2)  # BatchNorm sees half batches


def test_the_gradient_of_two_ranks_is_the_mean(tmp_path):
    def save_gradients(rank, path):
        distributed.init_process_group("gloo")
        model = nn.parallel.DistributedDataParallel(small_pixpro(instance_weight=1.0).eval())
        model(*[part[2 * rank : 2 * rank + 2] for part in small_batch()]).loss.backward()
        torch.save([p.grad for p in trained(model)], path)
        distributed.destroy_process_group()

    paths = [tmp_path / "0.pt", tmp_path / "1.pt"]
    run_ranks(tmp_path / "log", save_gradients, *enumerate(paths))
    model = small_pixpro(instance_weight=1.0).eval()  # every image has positives
    whole = torch.autograd.grad(model(*small_batch()).loss, trained(model))
    for path in paths:
        for a, b in zip(torch.load(path), whole, strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_one_run_has_a_folder_until_it_is_killed(images, whole, tmp_path, capsys):
    """Its workers live on for a while, with all that they inherited, and reserve nothing."""
    arguments = [tmp_path, "--data", images, "--steps", 6]
    hanging = (11, "train.load_image", lambda *_: time.sleep(20))  # in the third batch
    first = start(f"{tmp_path} log", {}, run_disturbed, *hanging, *arguments, "--workers", 2)
    while not (tmp_path / "last.pt").exists() or torch.load(tmp_path / "last.pt")["step"] < 4:
        assert first.is_alive()
        time.sleep(0.1)
    before = contents(tmp_path)
    words = f"expected a free --out, found a run that writes to {tmp_path}"
    assert_refused(capsys, words, *arguments)
    assert contents(tmp_path) == before
    first.kill()
    first.join()
    os.killpg(first.pid, 0)  # raises an error if no worker is alive
    run(*arguments)
    assert "off, step 4\n" in capsys.readouterr().out
    os.killpg(first.pid, signal.SIGKILL)
    assert_same(tmp_path, whole)


# ------------------------------------ Networks ------------------------------------
def test_every_network_of_torchvision_is_in_one_family():
    for name in torchvision.models.list_models(torchvision.models):
        assert sum(fnmatch.fnmatchcase(name, family) for family in FAMILIES) == 1


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"maxvit_t", "vit_*"}))
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_every_kind_of_network_trains_from_its_least_size_on(family):
    """One step; README's table has the side of the map; and with_blocks_on leaves no block off."""
    arch, layer, least = FAMILIES[family]
    torch.manual_seed(0)
    model = PixPro(Backbone(arch, layer).eval(), hidden_dim=8)
    assert all(module.training for module in model.modules())
    train.try_network(model, 2, least)
    with pytest.raises((RuntimeError, ValueError)):
        train.try_network(model, 2, least - 1)
    for name, p in train.with_blocks_on(model.backbone).named_parameters():
        assert p.squeeze().dim() > 1 or name.endswith("bias") or p.min() > 0.1
    row, side = re.escape(f"\n| `{family}` | `{layer}` | {least} | "), train_step(model, 112)
    assert re.search(rf"{row}\d+, {side} \|", (HERE / "README.md").read_text("utf-8"))
