"""Whole runs of train.py: ranks, folders, kills, full disks, flags, and every kind of network.

pytest .ci/test_runs.py

Each run is a process of its own, forked from one that has imported torch.
"""

import contextlib
import json
import multiprocessing
import os
import re
import runpy
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import train
from pixpro import Backbone, Heads, PixPro

ROOT = Path(train.__file__).parent
SMALL = ["--arch", "resnet18", "--layer", "layer2", "--size", "32", "--batch", "4"]
SMALL += ["--hidden-dim", "32", "--amp", "off", "--device", "cpu", "--workers", "1"]
WRITTEN = ["backbone.pt", "features.png", "last.pt", "metrics.jsonl"]
OFTEN = "train.RECORD_STEPS, train.SAVE_SECONDS = 1, 0"  # every step is recorded and saved
SECONDS = 100  # longer than any run takes


# ------------------------------------ Runs ------------------------------------
def child(argv, before, environment, log):
    """train.py in a new process; `before` is code that changes the module."""
    os.setsid()  # so that Ctrl-C and kills reach its workers, and no other process
    for number, kind in ((1, "out"), (2, "err")):
        os.dup2(os.open(f"{log}.{kind}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    multiprocessing.set_start_method("fork", force=True)  # of its workers
    torch.set_num_threads(1)
    os.environ.update(environment)
    sys.argv = ["train.py", *argv]
    if before:
        exec(before, {"train": train, "os": os, "sys": sys, "time": time, "torch": torch})
        train.main()
    else:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


class Run:
    """A run of train.py with these flags; it is ended when the test ends."""

    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["train", "pytest", "torch._dynamo"])
    started = []  # noqa: RUF012

    def __init__(self, log, *flags, before="", environment=None):
        self.log = log
        arguments = ([*SMALL, *map(str, flags)], before, environment or {}, str(log))
        self.process = self.server.Process(target=child, args=arguments)
        self.process.start()
        self.started.append(self)

    def end(self, seconds=SECONDS):
        self.process.join(seconds)
        assert self.process.exitcode is not None, f"it hangs: {self.out} {self.err}"
        return self

    def kill(self, number=signal.SIGKILL, workers=False):
        (os.killpg if workers else os.kill)(self.process.pid, number)

    code = property(lambda self: self.process.exitcode)
    out = property(lambda self: Path(f"{self.log}.out").read_text())
    err = property(lambda self: Path(f"{self.log}.err").read_text())

    def wait_for(self, text):
        """Until it has printed this."""
        for _ in range(100 * SECONDS):
            if Path(f"{self.log}.out").exists() and text in self.out:
                return
            assert self.process.is_alive(), f"it ended before {text!r}: {self.err}"
            time.sleep(0.01)
        raise AssertionError(f"waited in vain for {text!r}")


@pytest.fixture(scope="module", autouse=True)
def environment():
    """Of the process that the others are forked from, and of torchrun."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("OMP_NUM_THREADS", "1")
        yield


@pytest.fixture
def start(tmp_path):
    """Starts a run: start(*flags, before=code, environment=variables)."""
    number = iter(range(100))
    yield lambda *flags, **options: Run(tmp_path / f"log {next(number)}", *flags, **options)
    while Run.started:
        run = Run.started.pop()
        with contextlib.suppress(ProcessLookupError):
            run.kill(workers=True)
        run.process.join()


@pytest.fixture
def start_ranks(start):
    """Starts a run on two ranks, which have these flags and each its own."""

    def start_both(*flags, own=((), ()), before=("", "")):
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        runs = []
        for rank in (0, 1):
            names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port}
            names["MASTER_ADDR"] = "127.0.0.1"
            environment = {name: str(value) for name, value in names.items()}
            more = [*flags, *own[rank]]
            runs.append(start(*more, before=before[rank], environment=environment))
        return runs

    return start_both


def write_images(folder, names):
    folder.mkdir(parents=True)
    for number, name in enumerate(names):
        rng = np.random.default_rng(number)
        pixels = rng.integers(0, 256, (40, 30 + number, 3), dtype=np.uint8)
        PIL.Image.fromarray(pixels).save(folder / name)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A dozen small images."""
    folder = tmp_path_factory.mktemp("given") / "images"
    write_images(folder, [f"{number}.png" for number in range(12)])
    return folder


@pytest.fixture(scope="module")
def whole(images, tmp_path_factory):
    """What a run of six steps that nothing disturbs leaves."""
    folder = tmp_path_factory.mktemp("whole")
    run = Run(folder / "log", "--data", images, "--steps", 6, "--out", folder / "out", before=OFTEN)
    assert run.end().code == 0, run.err
    return folder / "out"


def contents(folder):
    """All that is in a folder but the empty lock file, which is no part of a run."""
    files = {p.relative_to(folder): p for p in Path(folder).rglob("*") if p.is_file()}
    found = {str(name): path.read_bytes() for name, path in files.items()}
    return {name: data for name, data in found.items() if (name, data) != ("lock", b"")}


def checkpoint(out):
    return torch.load(out / "last.pt", weights_only=True)


def assert_same_run(out, whole):
    """Bit for bit: weights, momentum, records, picture."""
    one, other = checkpoint(out), checkpoint(whole)
    for name, tensor in other["model"].items():
        assert torch.equal(one["model"][name], tensor), f"{name} differs"
    for number, state in other["optimizer"]["state"].items():
        assert torch.equal(one["optimizer"]["state"][number]["v"], state["v"]), "v differs"
    for name in ("metrics.jsonl", "features.png"):
        assert (out / name).read_bytes() == (whole / name).read_bytes(), f"{name} differs"
    assert sorted(contents(out)) == sorted(contents(whole)), sorted(contents(out))


def assert_refused(run, *words):
    """It ended before it began, with one sentence that has these words."""
    run.end()
    lines = run.err.splitlines()
    assert len(lines) == 1, f"expected one sentence, found {run.err!r}"
    assert lines[0].startswith("train.py: error: "), lines[0]
    assert run.code == 2, f"exit code {run.code}"
    for word in words:
        assert str(word) in lines[0], f"expected {word!r} in {lines[0]!r}"
    assert run.out == "", f"it printed {run.out!r}"
    return lines[0]


# ------------------------------------ Two ranks ------------------------------------
@pytest.mark.parametrize("kind", ["count", "names", "settings", "seed"])
@pytest.mark.parametrize("other", [0, 1])
def test_ranks_that_differ_are_refused(images, tmp_path, start_ranks, kind, other):
    """An old run's folder is as it was, and a new one has at most an empty lock file."""
    if kind == "count":
        write_images(tmp_path / "other", [f"{number}.png" for number in range(8)])
        words, more = ["images", 12, 8], ["--data", tmp_path / "other"]
    elif kind == "names":
        write_images(tmp_path / "other", [f"{number}.png" for number in range(1, 13)])
        words, more = ["file_names"], ["--data", tmp_path / "other"]
    elif kind == "settings":
        words, more = ["gamma", 2.0, 3.0], ["--gamma", 3]
    else:
        words, more = ["seed", 0, 5], ["--seed", 5]
    own = [[], []]
    own[other] = more
    flags = ["--data", images, "--steps", 6, "--out", tmp_path / "out"]
    runs = start_ranks(*flags, own=own)
    sentences = {assert_refused(run, *words) for run in runs}
    assert len(sentences) == 1, f"the ranks say different things: {sentences}"
    assert contents(tmp_path / "out") == {}, "it wrote"


@pytest.mark.parametrize("rank", [0, 1])
def test_ranks_that_resumed_at_other_steps_are_refused(images, whole, tmp_path, start_ranks, rank):
    outs = [tmp_path / "out 0", tmp_path / "out 1"]
    outs[rank].mkdir()
    before = contents(whole) | {"writing.tmp": b"left by a kill"}
    for name, data in before.items():
        (outs[rank] / name).write_bytes(data)
    own = [["--out", out] for out in outs]
    for run in start_ranks("--data", images, "--steps", 6, own=own):
        assert_refused(run, "step", 6, 0)
    assert contents(outs[rank]) == before, "it changed an old run's folder"
    assert contents(outs[1 - rank]) == {}, "it wrote into the new folder"


CLOSED = """
scandir = os.scandir
def refusing(place):
    if os.path.basename(os.path.normpath(place)) == "closed":
        raise PermissionError(13, "Permission denied", str(place))
    return scandir(place)
os.scandir = refusing
"""


@pytest.mark.parametrize("rank", [0, 1])
def test_one_rank_that_cannot_begin_ends_the_others(tmp_path, start_ranks, rank):
    write_images(tmp_path / "images", [f"{number}.png" for number in range(8)])
    write_images(tmp_path / "images" / "closed", [f"{number}.png" for number in range(4)])
    before = ["", ""]
    before[rank] = CLOSED
    flags = ["--data", tmp_path / "images", "--steps", 2, "--out", tmp_path / "out"]
    runs = start_ranks(*flags, before=before)
    sentences = {assert_refused(run, "Permission denied", "closed") for run in runs}
    assert len(sentences) == 1
    assert contents(tmp_path / "out") == {} if (tmp_path / "out").exists() else True


def test_what_may_differ_between_ranks_and_train_to_the_end(images, tmp_path, start_ranks):
    """Numbers of workers, and where on each machine the same images lie."""
    write_images(tmp_path / "copy", [f"{number}.png" for number in range(12)])
    own = (["--data", images], ["--data", tmp_path / "copy", "--workers", 0])
    runs = start_ranks("--steps", 3, "--out", tmp_path / "out", own=own)
    assert [run.end().code for run in runs] == [0, 0], runs[0].err + runs[1].err
    assert "complete: 3 steps" in runs[0].out and runs[1].out == ""
    assert sorted(contents(tmp_path / "out")) == WRITTEN


WRAPPER = """
import os, sys
sys.path.insert(0, {root!r})
import train
if os.environ["RANK"] == "1":
    sys.argv[sys.argv.index("--data") + 1] = {other!r}
train.main()
"""


def torchrun(ranks, folder, *command):
    """Runs a script under torchrun; its exit code and what each rank wrote."""
    launch = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    launch += ["--redirects=3", f"--log-dir={folder}"]
    done = subprocess.run(
        [sys.executable, *launch, *map(str, command)], capture_output=True, timeout=SECONDS
    )
    written = {}
    for kind in ("stdout", "stderr"):
        logs = sorted(folder.glob(f"**/{kind}.log"))
        written[kind] = [log.read_text() for log in logs]
    return done.returncode, written


def test_torchrun_on_unequal_folders_ends(images, tmp_path):
    write_images(tmp_path / "other", [f"{number}.png" for number in range(8)])
    script = tmp_path / "wrapper.py"
    script.write_text(WRAPPER.format(root=str(ROOT), other=str(tmp_path / "other")))
    flags = [*SMALL, "--data", images, "--epochs", 3, "--out", tmp_path / "out"]
    code, written = torchrun(2, tmp_path / "logs", script, *flags)
    assert code != 0
    # torchrun ends the other rank when the first has ended, maybe before its sentence
    said = set(written["stderr"]) - {""}
    assert len(said) == 1, said
    assert re.fullmatch("train.py: error: expected the same .* on all ranks, .*\n", said.pop())
    assert contents(tmp_path / "out") == {}


def test_torchrun_with_one_rank_trains_as_without(images, whole, tmp_path):
    flags = [*SMALL, "--data", images, "--steps", 6, "--out", tmp_path / "out"]
    code, written = torchrun(1, tmp_path / "logs", ROOT / "train.py", *flags)
    assert code == 0 and "complete: 6 steps" in written["stdout"][0], written
    one, other = checkpoint(tmp_path / "out")["model"], checkpoint(whole)["model"]
    assert all(torch.equal(one[name], tensor) for name, tensor in other.items())


ONE_RANK = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
COUNTING = """
parallel = torch.nn.parallel.DistributedDataParallel
def counting(model):
    print("in parallel", flush=True)
    return parallel(model)
torch.nn.parallel.DistributedDataParallel = counting
"""


def test_one_rank_of_torchrun_uses_ddp(images, tmp_path, start):
    flags = ["--data", images, "--steps", 1, "--out", tmp_path / "out"]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        ranks = ONE_RANK | {"MASTER_PORT": str(free.getsockname()[1])}
    run = start(*flags, before=COUNTING, environment=ranks).end()
    assert run.code == 0 and run.out.count("in parallel") == 1, run.err
    alone = start(*flags, before=COUNTING).end()
    assert alone.code == 0 and "in parallel" not in alone.out


@pytest.mark.parametrize(
    "changes",
    [
        {"RANK": None, "MASTER_ADDR": None, "LOCAL_RANK": None},
        {"WORLD_SIZE": None, "MASTER_ADDR": None, "LOCAL_RANK": None},
        {"MASTER_ADDR": None},
        {"MASTER_PORT": None},
        {"RANK": "first"},
        {"WORLD_SIZE": ""},
    ],
    ids=str,
)
def test_half_of_torchruns_variables_is_refused(images, tmp_path, start, changes):
    environment = ONE_RANK | {"MASTER_PORT": "29999"} | changes
    environment = {name: value for name, value in environment.items() if value is not None}
    run = start("--data", images, "--out", tmp_path / "out", environment=environment)
    assert_refused(run, "RANK")
    assert not (tmp_path / "out").exists()


# ------------------------------------ One run, one folder ------------------------------------
SLOW = """
load = train.load_image
def slowly(*arguments):
    time.sleep(0.2)
    return load(*arguments)
train.load_image = slowly
"""


def test_a_second_run_in_a_folder_is_refused(images, whole, tmp_path, start):
    flags = ["--data", images, "--steps", 6, "--out", tmp_path / "out"]
    first = start(*flags, before=OFTEN + SLOW)
    first.wait_for("\n1/6")
    before = contents(tmp_path / "out")
    second = [start(*flags), start(*flags, "--seed", 1)]
    assert_refused(second[0], tmp_path / "out")
    assert_refused(second[1], tmp_path / "out")
    assert before.keys() <= contents(tmp_path / "out").keys()
    assert first.process.is_alive(), "the first run ended too early for this test"
    assert first.end().code == 0, first.err
    assert_same_run(tmp_path / "out", whole)


def test_two_ranks_in_the_folder_of_a_run_are_refused(images, whole, tmp_path, start, start_ranks):
    flags = ["--data", images, "--steps", 6, "--out", tmp_path / "out"]
    first = start(*flags, before=OFTEN + SLOW)
    first.wait_for("off, step 0")
    sentences = {assert_refused(run, tmp_path / "out") for run in start_ranks(*flags)}
    assert len(sentences) == 1, sentences
    assert first.end().code == 0, first.err
    assert_same_run(tmp_path / "out", whole)


def test_a_finished_or_refused_run_leaves_the_folder_free(images, whole, tmp_path, start):
    flags = ["--data", images, "--out", tmp_path / "out"]
    assert_refused(start(*flags, "--steps", 6, "--layer", "layer9"), "layer9")
    for _ in range(2):
        assert start(*flags, "--steps", 6, before=OFTEN).end().code == 0
    assert_same_run(tmp_path / "out", whole)
    assert_refused(start(*flags, "--steps", 7), "steps was 6, is 7")
    assert_same_run(tmp_path / "out", whole)


HANGING = """
load, calls = train.load_image, []
def hanging(*arguments):
    calls.append(0)
    if len(calls) > 10:  # of a worker: in the middle of its third batch
        open(sys.argv[-1] + "/../hangs", "w").close()
        time.sleep(60)
    return load(*arguments)
train.load_image = hanging
"""


def test_a_run_killed_in_the_middle_of_a_batch_continues_at_once(images, whole, tmp_path, start):
    """Its workers live on for a while, in the middle of loading, with all that they inherited."""
    flags = ["--data", images, "--steps", 6, "--workers", 2, "--out", tmp_path / "out"]
    killed = start(*flags, before=OFTEN + HANGING)
    killed.wait_for("\n4/6")
    while not (tmp_path / "hangs").exists():
        time.sleep(0.01)
    killed.kill()
    killed.end()
    os.killpg(killed.process.pid, 0)  # raises an error if no worker is alive
    step = checkpoint(tmp_path / "out")["step"]
    continued = start(*flags, before=OFTEN).end()
    assert continued.code == 0, continued.err
    assert f"step {step}\n" in continued.out.splitlines(keepends=True)[0]
    os.killpg(killed.process.pid, 0)
    assert_same_run(tmp_path / "out", whole)


@pytest.mark.parametrize("moment", ["save", "save_picture", "record", "os.replace"])
def test_a_run_killed_at_any_moment_continues(images, whole, tmp_path, start, moment):
    """In the middle of writing: before this function's third call, or its first if it has one."""
    calls = {"save": 3, "record": 3, "os.replace": 3, "save_picture": 1}[moment]
    owner, name = (f"train.{moment}" if "." not in moment else moment).rsplit(".", 1)
    dying = f"""
whole, calls = {owner}.{name}, []
def dying(*arguments):
    calls.append(0)
    if len(calls) == {calls}:
        os.kill(os.getpid(), 9)
    return whole(*arguments)
{owner}.{name} = dying
"""
    flags = ["--data", images, "--steps", 6, "--out", tmp_path / "out"]
    killed = start(*flags, before=OFTEN + dying).end()
    assert killed.code == -9, killed.err
    assert start(*flags, before=OFTEN).end().code == 0
    (tmp_path / "out" / "writing.tmp").unlink(missing_ok=True)
    assert_same_run(tmp_path / "out", whole)


def test_where_the_outputs_may_not_be(tmp_path, start, monkeypatch):
    data = tmp_path / "data"
    write_images(data, [f"{number}.png" for number in range(4)])
    (tmp_path / "link").symlink_to(data)
    before = sorted(data.rglob("*"))
    monkeypatch.chdir(tmp_path)
    places = [(data, data), (data, data / "run"), (data, data / "runs" / "a")]
    places += [("link", data / "run"), (data, "link"), (data, "link/run"), ("link", "link/run")]
    places += [("data", "data/../link/run"), (".", "runs/a")]
    runs = [start("--data", place, "--steps", 1, "--out", out) for place, out in places]
    for run, (place, out) in zip(runs, places):
        assert_refused(run, "--out", "--data", out, place)
    assert sorted(data.rglob("*")) == before, "it wrote into --data"
    assert not (tmp_path / "runs").exists()


def test_the_data_may_lie_in_the_folder_of_the_outputs(tmp_path, start, monkeypatch):
    write_images(tmp_path / "data", [f"{number}.png" for number in range(4)])
    write_images(tmp_path / "database", [])
    for out in (tmp_path, tmp_path / "database", tmp_path / "data" / ".." / "new"):
        run = start("--data", tmp_path / "data", "--steps", 1, "--out", out).end()
        assert run.code == 0 and "on 4 images" in run.out, run.err


def test_a_view_of_six_pixels_trains(images, tmp_path, start):
    flags = ["--layer", "layer1", "--size", 6, "--steps", 1]
    run = start("--data", images, "--out", tmp_path / "out", *flags).end()
    assert run.code == 0 and "complete: 1 steps" in run.out, run.err


def test_results_without_their_checkpoint_are_not_overwritten(images, tmp_path, start):
    for name in ("backbone.pt", "features.png"):
        out = tmp_path / name / "out"
        out.mkdir(parents=True)
        (out / name).write_text("results")
        run = start("--data", images, "--steps", 1, "--out", out)
        assert_refused(run, "last.pt", out)
        assert contents(out) == {name: b"results"}


# ------------------------------------ What a run writes ------------------------------------
def test_the_first_line_names_what_is_left_out(tmp_path, start):
    write_images(tmp_path / "data", [f"{number}.png" for number in range(4)])
    for name in ("a.heic", "b.HEIC", "c.txt"):
        (tmp_path / "data" / name).touch()
    flags = ["--data", tmp_path / "data", "--steps", 1]
    run = start(*flags, "--out", tmp_path / "out").end()
    first = run.out.splitlines()[0]
    for words in ("4 images", "2 .heic", "1 .txt", "step 0"):
        assert words in first, f"expected {words!r} in {first!r}"
    for path in (tmp_path / "data").glob("*.png"):
        path.unlink()
    none = start(*flags, "--out", tmp_path / "none")
    assert_refused(none, tmp_path / "data", "found none", "2 .heic", "1 .txt")


@pytest.mark.parametrize("name", [b"\xff.png", b"a.\xff"])
def test_names_that_are_no_text_can_be_printed(tmp_path, start, name):
    """A file that cannot be read and one that is left out, where the output takes UTF-8 alone."""
    write_images(tmp_path / "data", [f"{number}.png" for number in range(4)])
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path / "data"), name))).touch()
    strict = "sys.stdout.reconfigure(encoding='utf-8', errors='strict')"
    flags = ["--data", tmp_path / "data", "--steps", 2, "--out", tmp_path / "out"]
    run = start(*flags, before=strict).end()
    assert run.code == 0, run.err.splitlines()[-1]


def test_the_log_fits_eighty_columns(whole):
    log = Path(f"{whole.parent / 'log'}.out").read_text().splitlines()
    steps = [line for line in log if re.match(r"\d+/6 ", line)]
    assert len(steps) == 6
    for line in steps:
        assert re.search(r"loss .* similarity .* spread .* images/s .* left", line), line
        assert len(line) <= 80, line
    records = [json.loads(line) for line in (whole / "metrics.jsonl").read_text().splitlines()]
    names = {"step", "loss", "similarity", "pairs", "spread", "lr", "m"}
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert all(record.keys() == names for record in records)


def assert_contiguous(path):
    for name, tensor in torch.load(path, weights_only=True).items():
        assert tensor.is_contiguous(), f"{name} of {path.name} has strides {tensor.stride()}"
        size = tensor.untyped_storage().nbytes()
        assert size == tensor.nbytes, f"{name} of {path.name} shares its memory"


def test_keep_writes_the_backbone_of_these_steps(images, tmp_path, start):
    out = tmp_path / "out"
    flags = ["--data", images, "--steps", 5, "--out", out]
    snapshots = """
whole = train.save_checkpoint
def keeping(out, settings, step, parts):
    whole(out, settings, step, parts)
    os.link(out / "last.pt", out.parent / f"{step}.pt")
train.save_checkpoint = keeping
"""
    run = start(*flags, "--keep", 2, before=OFTEN + snapshots).end()
    assert run.code == 0, run.err
    assert sorted(contents(out)) == ["backbone-2.pt", "backbone-4.pt", *WRITTEN]
    for step, path in ((2, "backbone-2.pt"), (4, "backbone-4.pt"), (5, "backbone.pt")):
        model = torch.load(tmp_path / f"{step}.pt", weights_only=True)["model"]
        kept = torch.load(out / path, weights_only=True)
        assert kept.keys() == {
            name.removeprefix("backbone.body.") for name in model if name[:14] == "backbone.body."
        }
        for name, tensor in kept.items():
            assert torch.equal(tensor, model[f"backbone.body.{name}"]), f"{name} of {path}"
        assert_contiguous(out / path)
    again = start(*flags, "--keep", 3).end()  # it may change, and all is done
    assert again.code == 0, again.err


def test_heads_are_written_contiguous(images, tmp_path, start):
    out = tmp_path / "out"
    flags = ["--data", images, "--steps", 1, "--heads", "--size", 64, "--out", out]
    run = start(*flags).end()
    assert run.code == 0, run.err
    assert sorted(contents(out)) == sorted([*WRITTEN, "heads.pt"])
    assert_contiguous(out / "backbone.pt")
    assert_contiguous(out / "heads.pt")
    Heads("resnet18").load_state_dict(torch.load(out / "heads.pt", weights_only=True))


FULL = """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, resource.RLIM_INFINITY))
"""


@pytest.mark.parametrize("name", ["last.pt", "backbone.pt", "backbone-3.pt"])
def test_a_full_disk_keeps_the_last_checkpoint(images, whole, tmp_path, start, name):
    out = tmp_path / "out"
    flags = ["--data", images, "--steps", 6, "--out", out]
    killed = start(*flags, before=OFTEN + SLOW)
    killed.wait_for("\n2/6")
    killed.kill(workers=True)
    killed.end()
    last = (out / "last.pt").read_bytes()
    size = {"last.pt": len(last), "backbone.pt": (whole / "backbone.pt").stat().st_size}
    size["backbone-3.pt"] = size["backbone.pt"]
    more = ["--keep", 3] if name == "backbone-3.pt" else []
    before = "" if name == "last.pt" else "train.save_checkpoint = lambda *_: None"
    full = FULL.format(limit=size[name] // 2)
    run = start(*flags, *more, before=OFTEN + "\n" + before + full).end()
    assert run.code == 1
    sentence = f"cannot write {out / name}; is the disk full?"
    assert run.err.splitlines()[-1].endswith(sentence), run.err
    assert (out / "last.pt").read_bytes() == last
    again = start(*flags, before=OFTEN).end()
    assert again.code == 0, again.err
    assert_same_run(out, whole)


BROKEN = """
whole, calls = train.LARS.step, []
def breaking(optimizer):
    whole(optimizer)
    calls.append(0)
    if len(calls) == 4:
        optimizer.param_groups[0]["params"][{which}].data.fill_({value})
train.LARS.step = breaking
"""


@pytest.mark.parametrize("value", ["float('nan')", "float('inf')", "-float('inf')"])
@pytest.mark.parametrize("which", [0, -1])
def test_weights_that_are_not_finite_are_never_saved(images, tmp_path, start, value, which):
    out = tmp_path / "out"
    flags = ["--data", images, "--steps", 6, "--keep", 1, "--out", out]
    broken = BROKEN.format(value=value, which=which)
    run = start(*flags, before=OFTEN + broken).end()
    assert run.code == 1 and "not finite" in run.err.splitlines()[-1], run.err
    assert checkpoint(out)["step"] == 3
    for path in [out / "last.pt", *out.glob("backbone*.pt")]:
        state = torch.load(path, weights_only=True)
        for name, tensor in state.get("model", state).items():
            assert tensor.isfinite().all(), f"{name} of {path.name}"
    assert not (out / "backbone.pt").exists()


@pytest.mark.parametrize("workers", [False, True])
def test_ctrl_c_ends_in_one_line(images, whole, tmp_path, start, workers):
    """For the process alone, and as at a terminal for its workers, too."""
    flags = ["--data", images, "--steps", 100_000, "--out", tmp_path / "out"]
    run = start(*flags)
    run.wait_for("\n10/")
    run.kill(signal.SIGINT, workers=workers)
    run.end()
    sentence = "train.py: interrupted; the same command continues from the last checkpoint"
    assert run.err.strip() == sentence, run.err
    assert run.code == 1


# ------------------------------------ Flags ------------------------------------
FLAGS = ["--data", "--recipe", "--out", "--arch", "--layer", "--size", "--crop-scale", "--batch"]
FLAGS += ["--epochs", "--warmup-epochs", "--steps", "--lr", "--loss-scale", "--ema-momentum"]
FLAGS += ["--hidden-dim", "--gamma", "--num-layers", "--threshold", "--instance-weight"]
FLAGS += ["--objective", "--temperature", "--seed", "--keep", "--amp", "--workers", "--device"]
FLAGS += ["--heads", "--compile"]


def test_help_has_one_meaning_per_flag(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    with pytest.raises(SystemExit) as stop:
        train.parse(["--help"])
    assert stop.value.code == 0
    printed = capsys.readouterr().out.partition("options:")[2]
    found = re.findall(r"^  (--[a-z-]+)(?: \S+)?\s+(\S.*)$", printed, re.MULTILINE)
    assert [flag for flag, _ in found] == FLAGS
    meanings = [meaning.partition(" (default:")[0] for _, meaning in found]
    assert len(set(meanings)) == len(FLAGS)


WRONG = {
    "--batch": ["0", "-4", "2.5", "four", "", "nan", "1e3"],
    "--size": ["0", "-1", "224x224"],
    "--hidden-dim": ["0"],
    "--steps": ["0", "1.5"],
    "--keep": ["0", "-2"],
    "--num-layers": ["-1", "1.0"],
    "--workers": ["-1", "many"],
    "--seed": ["-1", "0.5"],
    "--epochs": ["0", "-1", "nan", "inf"],
    "--warmup-epochs": ["-1", "nan"],
    "--lr": ["0", "-0.1", "nan", "inf", "1e400", "high"],
    "--loss-scale": ["0"],
    "--gamma": ["0", "-2", "nan"],
    "--threshold": ["-0.1", "nan", "inf"],
    "--instance-weight": ["-1"],
    "--temperature": ["0"],
    "--crop-scale": ["0", "1.1", "-0.08", "nan"],
    "--ema-momentum": ["-0.1", "1.01", "nan"],
    "--objective": ["simclr", ""],
    "--recipe": ["authors"],
    "--amp": ["int8"],
    "--device": ["tpu"],
}


@pytest.mark.parametrize("flag, value", [(flag, value) for flag in WRONG for value in WRONG[flag]])
def test_a_wrong_value_is_refused_with_its_flag(capsys, monkeypatch, flag, value):
    monkeypatch.setattr(sys, "argv", ["train.py"])
    with pytest.raises(SystemExit) as stop:
        train.parse([f"{flag}={value}"])
    assert stop.value.code == 2
    sentence = capsys.readouterr().err.splitlines()[-1]
    assert sentence.startswith(f"train.py: error: argument {flag}: "), sentence
    assert value in sentence and "function" not in sentence and "0x" not in sentence, sentence


@pytest.mark.parametrize("argv", [["--bat", "4"], ["images"], ["--compile", "yes"], ["--lars"]])
def test_what_is_no_flag_is_refused(capsys, argv):
    with pytest.raises(SystemExit) as stop:
        train.parse(argv)
    assert stop.value.code == 2
    assert f"unrecognized arguments: {' '.join(argv[argv[0] == '--compile' :])}" in (
        capsys.readouterr().err
    )


def test_defaults_are_the_papers_and_the_demos():
    paper, demo = train.parse(["--data", "images"]), train.parse([])
    values = {"arch": "resnet50", "layer": "layer4", "size": 224, "batch": 1024, "epochs": 100}
    values |= {"crop_scale": 0.08, "ema_momentum": 0.99, "gamma": 2, "threshold": 0.7}
    assert {name: getattr(paper, name) for name in values} == values
    small = {"arch": "resnet18", "size": 112, "batch": 32, "epochs": 20, "gamma": 2}
    assert {name: getattr(demo, name) for name in small} == small
    assert (paper.out, demo.out) == (Path("runs/paper"), Path("runs/demo"))
    changed = train.parse(["--batch", "8", "--epochs", "1"])
    assert (changed.batch, changed.epochs, changed.arch) == (8, 1, "resnet18")


@pytest.mark.parametrize(
    "flags, word",
    [
        (["--heads", "--size", "64", "--batch", "1"], "1"),
        (["--layer", "layer1", "--size", "4"], "4"),
        (["--arch", "vit_b_16", "--layer", "conv_proj", "--size", "224"], "conv_proj"),
        (["--arch", "vit_b_16", "--layer", "conv_proj", "--size", "112"], "conv_proj"),
        (["--arch", "swin_t", "--layer", "features", "--size", "64"], "permute"),
        (["--arch", "resnet19"], "resnet19"),
        (["--arch", "fcos_resnet50_fpn"], "fcos_resnet50_fpn"),
        (["--layer", "layer9"], "layer9"),
        (["--layer", ""], ""),
        (["--heads", "--arch", "vgg11"], "vgg11"),
        (["--batch", "13"], "13"),
        (["--data", "nowhere"], "nowhere"),
    ],
)
def test_what_cannot_be_trained_is_refused(images, tmp_path, start, flags, word):
    run = start("--data", images, "--steps", 1, "--out", tmp_path / "out", *flags)
    assert_refused(run, word)
    assert not (tmp_path / "out").exists() or contents(tmp_path / "out") == {}


# ------------------------------------ Networks ------------------------------------
NETWORKS = {
    "alexnet": "features",
    "convnext_tiny": "features.7",
    "densenet121": "features",
    "efficientnet_b0": "features",
    "googlenet": "inception5b",
    "inception_v3": "Mixed_7c",
    "maxvit_t": "blocks.3",
    "mnasnet0_5": "layers",
    "mobilenet_v2": "features",
    "mobilenet_v3_small": "features",
    "regnet_y_400mf": "trunk_output",
    "resnet18": "layer4",
    "resnext50_32x4d": "layer4",
    "shufflenet_v2_x0_5": "conv5",
    "squeezenet1_0": "features",
    "swin_t": "permute",
    "swin_v2_t": "permute",
    "vgg11": "features",
    "wide_resnet50_2": "layer4",
}


@pytest.mark.parametrize("arch", NETWORKS)
@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
def test_every_kind_of_network_trains(arch):
    """One step: every weight gets a gradient, and all that have one other than 0 move."""
    torch.manual_seed(0)
    backbone = Backbone(arch, NETWORKS[arch])
    model = PixPro(backbone, hidden_dim=8)
    sizes = [224] if arch == "maxvit_t" else [224, 112]
    for size in sizes:
        train.try_network(model, 2, size)
    views = torch.randn(2, 2, 3, sizes[-1], sizes[-1])
    boxes = torch.tensor([[0.0, 0.0, 9.0, 9.0]]).expand(2, 4)
    weights = {name: p for name, p in model.named_parameters() if p.requires_grad}
    before = {name: p.clone() for name, p in weights.items()}
    model.update_momentum(0.99)
    model(*views, boxes, boxes).loss.backward()
    assert [name for name, p in weights.items() if p.grad is None] == []
    train.LARS(weights.values(), lr=1.0).step()
    still = [name for name, p in weights.items() if torch.equal(p, before[name])]
    assert not [name for name in still if weights[name].grad.abs().max() > 1e-6], "did not move"
    scales = [name for name in weights if name.endswith("layer_scale")]
    assert len(scales) == (18 if arch == "convnext_tiny" else 0)
    for name in scales:  # the step of a vector, lr g, and not that of a matrix
        expected = before[name] - weights[name].grad
        assert torch.allclose(weights[name], expected, rtol=1e-4, atol=0), name


def test_a_network_of_one_size_is_refused_at_another():
    model = PixPro(Backbone("maxvit_t", "blocks.3"), hidden_dim=8)
    with pytest.raises((RuntimeError, AssertionError, ValueError)):
        train.try_network(model, 2, 112)


def test_a_network_of_one_size_is_refused_in_one_sentence(images, tmp_path, start):
    flags = ["--arch", "maxvit_t", "--layer", "blocks.3", "--size", 112, "--batch", 2]
    run = start(*flags, "--data", images, "--out", tmp_path / "out", "--steps", 1)
    assert_refused(run)
    assert not (tmp_path / "out").exists() or contents(tmp_path / "out") == {}


FEW = "train.SCENES, train.PROBE_SCENES = 4, 3"


def test_a_network_of_one_size_completes(tmp_path, start):
    """Its probe and picture are made at that size, too."""
    flags = ["--arch", "maxvit_t", "--layer", "blocks.3", "--size", 224, "--batch", 2]
    run = start(*flags, "--steps", 1, "--out", tmp_path / "out", before=FEW).end()
    assert run.code == 0 and "complete: 1 steps" in run.out, run.err
    assert run.out.count("linear probe, mIoU") == 3
    assert sorted(contents(tmp_path / "out")) == WRITTEN
    assert_contiguous(tmp_path / "out" / "backbone.pt")
    with PIL.Image.open(tmp_path / "out" / "features.png") as image:
        assert image.size == (3 * 228 + 4, 3 * 228 + 4), image.size  # 3 scenes, 3 rows


def test_other_networks_keep_the_size_of_their_picture(tmp_path, start):
    run = start("--steps", 1, "--out", tmp_path / "out", before=FEW).end()
    assert run.code == 0 and run.out.count("linear probe, mIoU") == 3, run.err
    with PIL.Image.open(tmp_path / "out" / "features.png") as image:
        assert image.size == (3 * 68 + 4, 3 * 68 + 4), image.size  # twice the size of 32


BREAKING = """
def breaking(*arguments):
    raise RuntimeError("the picture cannot be made")
train.{name} = breaking
"""


@pytest.mark.parametrize("name", ["save_picture", "linear_probe", "frozen_features"])
def test_weights_are_written_before_what_may_fail(tmp_path, start, name):
    flags = ["--steps", 1, "--out", tmp_path / "out", "--heads", "--size", 64]
    run = start(*flags, before=FEW + BREAKING.format(name=name)).end()
    assert run.code == 1 and "the picture cannot be made" in run.err
    assert {"backbone.pt", "heads.pt", "last.pt"} <= contents(tmp_path / "out").keys()
    assert "complete" not in run.out and not (tmp_path / "out" / "features.png").exists()
    again = start(*flags, before=FEW).end()
    assert again.code == 0 and "complete: 1 steps" in again.out, again.err
