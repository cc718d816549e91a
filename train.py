"""Pre-training with PixPro: LARS, data, AMP, DDP, checkpoints; then a linear probe and a picture.

    python train.py                                   the demo: drawn scenes, minutes on a CPU
    python train.py --data DIR                        the paper's values, on every image below DIR
    torchrun --nproc_per_node=8 train.py --data DIR   the same on 8 GPUs; --batch counts all of them

The same command continues a run that was stopped, bit for bit on a CPU.
"""

import argparse
import ast
import collections
import contextlib
import copy
import io
import json
import math
import os
import sys
import time
import zlib
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import distributed
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.utils import save_image

from pixpro import MEAN, STD, Backbone, Heads, Output, PixPro, PixProOnLevels, TwoViews, momentum_at

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None

# ------------------------------------ Flags ------------------------------------
# The defaults are the paper's. The demo, which needs no data, differs in these.
DEMO = {"arch": "resnet18", "layer": "layer3", "size": 112, "batch": 32, "epochs": 20.0, "lr": 4.0}
MODEL = ("hidden_dim", "gamma", "num_layers", "threshold", "instance_weight")  # flags of PixPro
MODEL += ("objective", "temperature")
# What may change when a run continues; epochs count by the number of steps that they make.
FREE = ("recipe", "data", "out", "workers", "device", "compile", "keep", "epochs", "warmup_epochs")
SCENES = 512  # drawn for pre-training
PROBE_SCENES = 256  # drawn for fitting the probe, and as many for testing it
RECORD_STEPS = 10  # between records in metrics.jsonl and lines of the log
SAVE_SECONDS = 60  # between checkpoints


def number(kind, least, most=1e12):
    """The type of a flag: an int or a float from least to most."""

    def number(text):
        if not least <= kind(text) <= most:
            raise argparse.ArgumentTypeError(f"expected {least} to {most:g}, found {text}")
        return kind(text)

    number.__name__ = kind.__name__  # argparse names it
    return number


def new_parser():
    """The flags and the paper's values."""
    count, natural, share = number(int, 1), number(int, 0), number(float, 1e-9, 1)
    positive, not_negative = number(float, 1e-9), number(float, 0)
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    cpus = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser = argparse.ArgumentParser(
        usage="train.py [--data DIR] [flags]",
        epilog=f"The demo has other values: {' '.join(f'--{k} {v}' for k, v in DEMO.items())}.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )

    def add(flag, kind, default, meaning, choices=None):
        parser.add_argument(flag, type=kind, default=default, help=meaning, choices=choices)

    add("--data", str, None, "train on every image below this folder, not on drawn scenes")
    add("--recipe", str, None, "default values; None: paper with --data", ["demo", "paper"])
    add("--out", Path, None, "folder for everything that is written; None: runs/RECIPE")
    add("--arch", str, "resnet50", "classification network of torchvision")
    add("--layer", str, "layer4", "its layer whose output is the feature map")
    add("--size", count, 224, "side of the views in pixels")
    add("--crop-scale", share, 0.08, "smallest crop, as a share of the image's area")
    add("--batch", count, 1024, "images per step, over all ranks")
    add("--epochs", positive, 100.0, "length of the run in passes over the images")
    add("--warmup-epochs", not_negative, 5.0, "length of the warm-up, at most a quarter of the run")
    add("--steps", count, None, "length of the run, instead of --epochs")
    add("--lr", positive, None, "peak learning rate; None: batch / 256")
    add("--loss-scale", positive, 2.0, "factor of the loss: the authors' rates are for 2 x Eq. 5")
    add("--ema-momentum", share, 0.99, "EMA decay m at the first step; it rises to 1")
    add("--hidden-dim", count, 2048, "width of the projection heads")
    add("--gamma", positive, 2.0, "exponent of the similarity in Eq. 4")
    add("--num-layers", natural, 1, "layers of g in Eq. 3")
    add("--threshold", not_negative, 0.7, "T of Eq. 1")
    add("--instance-weight", not_negative, 0.0, "alpha of Eq. 6")
    add("--objective", str, "pixpro", "Eq. 5 or Eq. 2", ["pixpro", "pixcontrast"])
    add("--temperature", positive, 0.3, "tau of Eq. 2")
    add("--seed", natural, 0, "of scenes, weights, order and views")
    add("--keep", count, None, "write backbone-STEP.pt after every so many steps, too")
    add("--amp", str, "auto", "precision", ["auto", "bf16", "fp16", "off"])
    add("--workers", natural, min(8, cpus // 2 or 1), "data processes per rank")
    add("--device", str, devices[0], "where to train", devices)
    parser.add_argument("--heads", action="store_true", help="train an FPN and a head, too")
    parser.add_argument("--compile", action="store_true", help="use torch.compile")
    return parser


def parse(argv):
    """The flags, with the paper's values, or the demo's, for those that are not given."""
    parser = new_parser()
    args = parser.parse_args(argv)
    recipe = args.recipe or ("demo" if args.data is None else "paper")
    if recipe == "demo":  # what stands in the namespace goes before the defaults
        args = parser.parse_args(argv, argparse.Namespace(**DEMO))
    args.out = args.out or Path("runs", recipe)
    args.code = digest_of_code()
    return args


def digest_of_code():
    """A number that changes with the code here and in pixpro.py, but not with its comments."""
    files = [Path(__file__), Path(__file__).with_name("pixpro.py")]
    trees = [ast.dump(ast.parse(file.read_bytes())) for file in files]
    return zlib.crc32("".join(trees).encode())


def refuse(reason):
    """Ends the program before the run, with one sentence and exit code 2."""
    print(f"train.py: error: {reason}", file=sys.stderr)
    sys.exit(2)


# ------------------------------------ Schedule and optimizer ------------------------------------
def lr_at(step, total_steps, warmup_steps, peak, floor=1e-6):
    """Learning rate: linear from peak / 100 to the peak, then half a cosine down to the floor.

    The peak is at step warmup_steps, which may be 0 or larger than total_steps.
    """
    if step < warmup_steps:
        return peak * (0.01 + 0.99 * step / warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


class LARS(torch.optim.Optimizer):
    """SGD with momentum and a rate for each layer (arXiv 1708.03888), as in the authors' code.

    g <- g + weight_decay p;  g <- g trust_coefficient |p| / (|g| + eps), if |p| > 0
    v <- momentum v + g;  p <- p - lr v

    Vectors skip the first line: no decay, no scaling. These are the parameters with at most one
    dimension larger than 1: biases, norms, and scales of shape [C, 1, 1].
    """

    def __init__(
        self, params, lr, momentum=0.9, weight_decay=1e-5, trust_coefficient=1e-3, eps=1e-8
    ):
        options = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__(params, options | {"trust_coefficient": trust_coefficient, "eps": eps})

    @torch.no_grad()
    def step(self, closure=None):
        with torch.enable_grad():
            loss = closure() if closure else None
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                g = p.grad
                if p.squeeze().dim() > 1:
                    g = g.add(p, alpha=group["weight_decay"])
                    scale = group["trust_coefficient"] * p.norm() / (g.norm() + group["eps"])
                    g *= torch.where(scale > 0, scale, 1.0)
                if p not in self.state:
                    self.state[p]["v"] = torch.zeros_like(p)
                v = self.state[p]["v"].mul_(group["momentum"]).add_(g)
                p.sub_(v, alpha=group["lr"])
        return loss


# ------------------------------------ Data ------------------------------------
ENDINGS = (*IMG_EXTENSIONS, ".gif", ".avif", ".jfif", ".jpe", ".jp2", ".mpo")


def printable(name):
    """A file's name, with ? for bytes that are no text."""
    return os.fsencode(name).decode(errors="replace")


def find_images(folder):
    """Names of the images below a folder, relative to it, and how many files of which endings
    are left out. Raises OSError for a folder that cannot be read.
    """

    def unreadable(error):
        raise error

    folder = os.path.join(folder, "")
    names, left_out = [], collections.Counter()
    for place, folders, files in os.walk(folder, onerror=unreadable):
        links = [os.path.islink(os.path.join(place, name)) for name in folders]
        left_out["links to folders"] += sum(links)  # not followed
        left_out["hidden"] += sum(name[0] == "." for name in folders + files)
        folders[:] = [name for name in folders if name[0] != "."]
        for name in files:
            ending = os.path.splitext(name)[1].lower()
            if name[0] == ".":
                continue
            if ending in ENDINGS:
                names.append(os.path.join(place, name)[len(folder) :])
            else:
                left_out[printable(ending) or "without ending"] += 1
    # Bytes take a quarter of the memory of text. Each worker may have a copy.
    return np.array([os.fsencode(name) for name in sorted(names)]), +left_out


def open_data(args):
    """The images of a run, and in words what is left out. Notes in args what they are."""
    if args.data is None:
        images, left_out = Scenes(SCENES, args.seed).images, collections.Counter()
    elif args.out.resolve().is_relative_to(Path(args.data).resolve()):
        raise ValueError(f"expected --out outside of --data, found {args.out} in {args.data}")
    else:
        images, left_out = find_images(args.data)
    kinds = [f"{count} {kind}" for kind, count in left_out.most_common(9)]
    left_out = ", ".join(kinds + ["others"] * (len(left_out) > 9)) or "nothing"
    if len(images) == 0:
        raise ValueError(f"expected images below {args.data!r}, found none; left out: {left_out}")
    args.images = len(images)
    args.files = zlib.crc32(np.asarray(images).tobytes())
    # Two folders of numbered files have the same names. The sizes of some tell them apart.
    for name in images[:: len(images) // 100 + 1] if args.data else ():
        path = os.path.join(args.data, os.fsdecode(name))
        size = os.path.exists(path) and os.path.getsize(path)
        args.files = zlib.crc32(b"%d" % size, args.files)
    return images, left_out


def load_image(path, size=None, scale=0.08):
    """The RGB image that a viewer shows: upright, first frame, opaque, 8 bits.

    size, scale: the side of the views and the smallest crop's share of the area. With them a JPEG
    is decoded at the smallest scale at which that crop still has size x size pixels.
    """
    with open(path, "rb") as file:  # PIL maps a path into memory, and turns mapped TIFFs wrongly
        image = Image.open(file)
        if size is not None:
            side = math.ceil(size * math.sqrt(4 / 3 / scale))
            image.draft(None, (side, side))
        upright = ImageOps.exif_transpose(image)
    if upright.mode[0] not in "IF":
        return upright.convert("RGB")

    # Grey, of more than 8 bits. Tag 339 of a TIFF says whether integers have signs; PIL ignores it.
    values, tags = np.asarray(upright), getattr(image, "tag_v2", {})
    if upright.mode == "I" and tags.get(339, (1,)) == (1,):
        values = values.view(np.uint32)
    known = values[np.abs(values) < 3e38].astype(np.float64)  # nan, infinity and "no data" are not
    low, high = np.percentile(known, [0.1, 99.9])
    if high - low <= 1e-9 * abs(high):  # equal, up to rounding
        low, high = known.min(), known.max()
    values = np.nan_to_num((values - low) / (high - low or 1)).clip(0, 1)
    return Image.fromarray((255 * values).astype(np.uint8)).convert("RGB")


def seed_of(*numbers):
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Samples:
    """Sample n of a run: two views and boxes of an image, a function of (seed, n) and the images.

    images: uint8 [count, 3, h, w], or names of files in folder. Epoch n // count shows each image
    once. The next sample replaces one whose file cannot be read; raises RuntimeError after ten.
    """

    def __init__(self, images, views, seed, folder=None):
        self.images = images
        self.views = views
        self.seed = seed
        self.folder = folder
        self.epoch = None

    def __getitem__(self, n):
        image, number = self.image(n)
        torch.default_generator.manual_seed(seed_of(self.seed, number))
        return self.views(image)

    def image(self, n):
        """The image of sample n, or of the next one that can be read, and that one's number."""
        for number in range(n, n + 10):
            epoch, place = divmod(number, len(self.images))
            if epoch != self.epoch:
                self.epoch = epoch
                rng = np.random.default_rng([self.seed, epoch])
                self.order = rng.permutation(len(self.images))
            image = self.images[self.order[place]]
            if torch.is_tensor(image):
                return image, number
            path = os.path.join(self.folder, os.fsdecode(image))
            try:
                return load_image(path, self.views.size, self.views.scale[0]), number
            except Exception as error:  # decoders raise many kinds
                reason = f"cannot read {printable(path)}: {error!r}"
                print(f"warning: {reason}; the next sample is used", flush=True)
        raise RuntimeError(f"ten images in a row cannot be read; the last: {reason}")


# ------------------------------------ Checkpoints and ranks ------------------------------------
def weights_of(module):
    """Its state, contiguous, as safetensors wants it. Raises FloatingPointError if not finite."""
    weights = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
    if not all(tensor.isfinite().all() for tensor in weights.values()):
        raise FloatingPointError("the weights are not finite; try a lower --lr, with another --out")
    return weights


def save(path, state):
    """torch.save, whole or not at all: written beside and renamed."""
    beside = path.with_name("writing.tmp")
    try:
        torch.save(state, beside)
    except (OSError, RuntimeError) as error:
        raise OSError(f"cannot write {path}; is the disk full?") from error
    os.replace(beside, path)


def save_checkpoint(out, settings, step, parts):
    """Writes last.pt: all that the next step depends on."""
    state = {name: part.state_dict() for name, part in parts.items()}
    state |= {"model": weights_of(parts["model"]), "settings": settings, "step": step}
    state["metrics_size"] = (out / "metrics.jsonl").stat().st_size
    save(out / "last.pt", state)


def load_checkpoint(out, settings):
    """last.pt, or the start of a run. Raises ValueError if out has another run's files."""
    path = out / "last.pt"
    if not path.exists():
        metrics = out / "metrics.jsonl"
        records = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        if records > 1 or any(out.glob("*.pt")) or (out / "features.png").exists():
            raise ValueError(f"expected last.pt beside the results in {out}, found none")
        return {"step": 0, "metrics_size": 0}
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        old = dict(checkpoint["settings"])
    except Exception as error:  # of another program, damaged, or with code, which is not run
        found = f"{path} ({type(error).__name__})"
        raise ValueError(f"expected a checkpoint of train.py, found {found}") from error
    changes = [f"{k} was {old.get(k)}, is {v}" for k, v in settings.items() if old.get(k) != v]
    if changes:
        wanted = f"the settings of {path}, or another --out"
        raise ValueError(f"expected {wanted}; found: {'; '.join(changes)}")
    return checkpoint


def lock(out):
    """Reserves the folder for this process, as long as the file that it returns is open."""
    out.mkdir(parents=True, exist_ok=True)
    file = (out / "lock").open("a")
    try:
        if fcntl:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        raise ValueError(f"expected a free --out, found a run that writes to {out}") from None
    except OSError:
        pass  # a file system without locks
    return file


def join_ranks(device):
    """This process's number and that of all. torchrun starts one for each GPU and numbers them."""
    if not {"RANK", "WORLD_SIZE"} & os.environ.keys():
        return 0, 1
    try:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group()  # NCCL for GPUs, gloo for CPUs
    except (KeyError, ValueError) as error:
        refuse(f"expected RANK, LOCAL_RANK and WORLD_SIZE as torchrun sets them, found: {error}")
    return distributed.get_rank(), distributed.get_world_size()


@contextlib.contextmanager
def agreement(ranks):
    """Ends all ranks in one sentence if one cannot begin, or if they do not begin alike.

    Each rank writes into the dict that it is given what all must have in common.
    """
    state = {}
    try:
        with contextlib.redirect_stderr(io.StringIO()):  # torch.fx prints what it raises
            yield state
    except (AssertionError, OSError, RuntimeError, ValueError) as error:
        state = {"refusal": (str(error) or repr(error)).partition("\n")[0]}
    states = [state] * ranks
    if ranks > 1:
        distributed.all_gather_object(states, state)
    for other in states:
        if "refusal" in other:
            refuse(other["refusal"])
    for name in state:
        values = [other[name] for other in states]
        if values.count(values[0]) < ranks:
            refuse(f"expected the same {name} on all ranks, found {values}")


def try_network(model, images, size):
    """Raises an error unless the network can train on so many views of this size.

    It runs on the meta device, which has shapes and no numbers.
    """
    trial = copy.deepcopy(model).to("meta")
    maps = trial.backbone(torch.empty(images, 3, size, size, device="meta"))
    levels = list(maps.values()) if isinstance(maps, dict) else [maps]
    for level in levels:
        trial.projector(level)
    if min(levels[0].shape[2:]) < 2:
        raise ValueError(f"expected a size that makes a map of at least 2 x 2, found {size}")


# ------------------------------------ The run ------------------------------------
def main(argv=None):
    """One pre-training run, from the flags to backbone.pt."""
    args = parse(argv)
    device, out = args.device, args.out
    rank, ranks = join_ranks(device)

    with agreement(ranks) as state:
        # Data
        images, left_out = open_data(args)
        share = args.batch // ranks
        if args.batch > len(images) or args.batch % ranks != 0:
            wanted = f"a batch of at most {len(images)} images, a multiple of {ranks}"
            raise ValueError(f"expected {wanted}, found {args.batch}")
        epoch_steps = len(images) / args.batch
        args.steps = args.steps or max(1, round(args.epochs * epoch_steps))
        args.warmup_steps = min(round(args.warmup_epochs * epoch_steps), args.steps // 4)

        # Model. `initial` keeps the first weights, for comparison.
        torch.manual_seed(args.seed)
        initial = Heads(args.arch) if args.heads else Backbone(args.arch, args.layer)
        kind = PixProOnLevels if args.heads else PixPro
        model = kind(copy.deepcopy(initial), **{name: getattr(args, name) for name in MODEL})
        try_network(model, share, args.size)

        # Resume. What is not in last.pt is a function of settings, code and step.
        args.lr = args.lr or args.batch / 256
        args.amp = auto_amp(device) if args.amp == "auto" else args.amp
        settings = {name: value for name, value in vars(args).items() if name not in FREE}
        checkpoint = load_checkpoint(out, settings)
        step = checkpoint["step"]
        state.update({"images": args.images} | settings | {"step": step})
        held = lock(out) if rank == 0 else None

    # Optimizer and precision. The scaler keeps small gradients of fp16 from vanishing.
    if ranks > 1 and device == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    torch.backends.cudnn.benchmark = True
    model.to(device, memory_format=torch.channels_last)
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[args.amp]
    optimizer = LARS([p for p in model.parameters() if p.requires_grad], args.lr)
    scaler = torch.amp.GradScaler(device, enabled=args.amp == "fp16")
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    for name in parts if step > 0 else ():
        parts[name].load_state_dict(checkpoint.pop(name))
    network = torch.nn.parallel.DistributedDataParallel(model) if "RANK" in os.environ else model
    network = torch.compile(network) if args.compile else network

    # Loop. Step k takes the samples k * batch to (k + 1) * batch - 1, shared by the ranks.
    starts = range(step * args.batch + rank * share, args.steps * args.batch, args.batch)
    batches = [range(start, start + share) for start in starts]
    samples = Samples(images, TwoViews(args.size, (args.crop_scale, 1.0)), args.seed, args.data)
    pin = device == "cuda"
    loader = DataLoader(samples, batch_sampler=batches, num_workers=args.workers, pin_memory=pin)
    if rank == 0:
        start_log(args, left_out, step, checkpoint["metrics_size"])
    outputs = []
    recorded, saved = time.monotonic(), -math.inf  # the first checkpoint comes at once
    for batch in loader:
        batch = [tensor.to(device, non_blocking=True) for tensor in batch]
        torch.manual_seed(seed_of(args.seed, step, rank))  # of dropout
        lr = lr_at(step, args.steps, args.warmup_steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        m = momentum_at(step, args.steps, args.ema_momentum)
        model.update_momentum(m)

        with torch.autocast(device, dtype, enabled=dtype is not None):
            output = network(*batch)
        scaler.scale(args.loss_scale * output.loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        step += 1
        outputs.append(torch.stack(output).detach())  # [4]
        if rank == 0 and args.keep and step % args.keep == 0:
            save(out / f"backbone-{step}.pt", weights_of(model.backbone.body))
        if step % RECORD_STEPS == 0 or step == args.steps:
            values = means_of(outputs, ranks) | {"lr": lr, "m": m}
            now = time.monotonic()
            if rank == 0:
                record(args, step, values, len(outputs) / (now - recorded))
            if rank == 0 and (now - saved > SAVE_SECONDS or step == args.steps):
                save_checkpoint(out, settings, step, parts)
                saved = now
            outputs, recorded = [], now

    # Finish. features.png is written last: with it the run is complete.
    if rank == 0:
        finish(args, samples, initial.to(device), model.backbone)
        print(f"complete: {args.steps} steps, in {out}")
        held.close()
    if "RANK" in os.environ:
        distributed.destroy_process_group()


def start_log(args, left_out, step, metrics_size):
    """Removes records of steps that will be made again, and prints the first line of the log."""
    with open(args.out / "metrics.jsonl", "a") as file:
        file.truncate(min(file.tell(), metrics_size))
    about = f"{args.arch} on {args.images} images (left out: {left_out})"
    print(f"{args.out}: {about}, {args.device}, {args.amp}, step {step}", flush=True)


def means_of(outputs, ranks):
    """Means over steps and ranks, by name. Reading them in every step would slow a GPU down."""
    means = torch.stack(outputs).mean(0)  # [steps, 4] -> [4]
    if ranks > 1:
        distributed.all_reduce(means)
    values = dict(zip(Output._fields, (means / ranks).tolist()))
    if not math.isfinite(values["loss"]):
        raise FloatingPointError(f"the loss is {values['loss']}; lower --lr, with another --out")
    return values


def record(args, step, values, speed):
    """A record in metrics.jsonl, and a line of the log, of at most 80 columns."""
    with open(args.out / "metrics.jsonl", "a") as file:
        file.write(json.dumps({"step": step} | values) + "\n")
    minutes = (args.steps - step) / speed / 60
    left = f"{minutes:.0f} min" if minutes < 59.5 else f"{minutes / 60:.3g} h"
    figures = "loss {loss:.3f} similarity {similarity:.2f} spread {spread:.2f}".format(**values)
    speed = f"{speed * args.batch:.0f} images/s"
    print(f"{step}/{args.steps} {figures} {speed} {left} left", flush=True)
    if values["spread"] < 0.4 and step > args.warmup_steps:  # the demo stays above
        print("warning: low spread, the features may have collapsed", flush=True)


def auto_amp(device):
    """bf16 where the hardware computes in it, else fp16 on GPUs, else off."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cpuinfo = Path("/proc/cpuinfo")  # on Linux
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "off"


# ------------------------------------ Appendix: probe, picture ------------------------------------
def finish(args, samples, initial, trained):
    """Writes the weights; then compares them with the first ones and draws features.png.

    Where all this is there already, nothing is done.
    """
    names = ["features.png", "backbone.pt"] + ["heads.pt"] * args.heads
    if all((args.out / name).exists() for name in names):
        return
    if args.heads:
        save(args.out / "heads.pt", weights_of(trained))
    save(args.out / "backbone.pt", weights_of(trained.body))
    if args.data is None:
        scenes = Scenes(PROBE_SCENES, args.seed, SCENES)
        test = Scenes(PROBE_SCENES, args.seed, SCENES + PROBE_SCENES)
        images, test_images = [fitted(initial, part.images, args.size) for part in (scenes, test)]
        data = (images, scenes.masks, test_images, test.masks)
        start = linear_probe(initial, *data)
        blocks_on = linear_probe(with_blocks_on(initial), *data)
        print(f"linear probe, mIoU {start:.1f}: random")
        print(f"linear probe, mIoU {blocks_on:.1f}: random, blocks on")
        print(f"linear probe, mIoU {linear_probe(trained, *data):.1f}: pre-trained")
        shown = v2.functional.resize(test.images[:8], [2 * args.size])
    else:
        shown = [samples.image(n)[0] for n in range(min(8, len(samples.images)))]
        shown = [ImageOps.fit(image, [2 * args.size] * 2) for image in shown]
        shown = torch.stack([v2.functional.pil_to_tensor(image) for image in shown])
    beside = args.out / "writing.png"
    save_picture(beside, fitted(initial, shown, args.size), initial, trained)
    os.replace(beside, args.out / "features.png")


def fitted(backbone, images, size):
    """The images, resized if the network refuses theirs: some networks take one size alone."""
    quiet = contextlib.redirect_stderr(io.StringIO())  # torch.fx prints what it raises
    with contextlib.suppress(AssertionError, RuntimeError), quiet:
        frozen_features(backbone, images[:1])
        return images
    return v2.functional.resize(images, [size, size])


@torch.no_grad()
def frozen_features(backbone, images):
    """Maps [N, C, H, W] of uint8 images (or floats in [0, 1]) in eval mode; the first of a dict.

    Raises ValueError for other values.
    """
    backbone = copy.deepcopy(backbone).eval()  # a copy, so that the original keeps its mode
    images = images.to(next(backbone.parameters()).device)
    views = images / 255 if images.dtype == torch.uint8 else images
    if not 0 <= views.min() <= views.max() <= 1:
        found = f"{views.min():g} to {views.max():g}"
        raise ValueError(f"expected uint8 images or floats in [0, 1], found {found}")
    views = v2.functional.normalize(views, MEAN, STD)
    maps = []
    for batch in views.split(32):
        features = backbone(batch)
        maps.append(next(iter(features.values())) if isinstance(features, dict) else features)
    return torch.cat(maps)


def with_blocks_on(backbone):
    """A copy whose residual blocks, which start at 0 (ConvNeXt's: 1e-6), are switched on."""
    backbone = copy.deepcopy(backbone)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
        if hasattr(module, "layer_scale"):
            torch.nn.init.ones_(module.layer_scale)
    return backbone


def linear_probe(backbone, images, masks, test_images, test_masks, ignore=255):
    """Mean IoU in percent of a 1x1 convolution on frozen features, fitted by ridge regression.

    images: uint8 [N, 3, h, w]; masks: [N, h, w], numbers of classes. The test, at full resolution,
    is on the others. Pixels of the label `ignore` count neither in the fit nor in the test. Raises
    ValueError for masks of one class or of other shapes, and for features that are not finite.
    """
    # Features with a channel of ones, whose weight is the bias
    x, test = [
        F.pad(frozen_features(backbone, part), (0, 0, 0, 0, 0, 1), value=1.0)
        for part in (images, test_images)
    ]  # [N, C + 1, H, W] each

    # Regression of each class's share of a cell. A cell weighs as much as it has counted pixels.
    counted = masks != ignore  # [N, h, w]
    classes = masks[counted].unique()  # [K]
    if len(classes) < 2 or masks.is_floating_point():
        found = f"{classes[:9].tolist()} beside {ignore}"
        raise ValueError(f"expected integers of two classes or more, found {found}")
    parts = torch.stack([counted, *[masks == number for number in classes]], 1).float()
    shares = F.adaptive_avg_pool2d(parts, x.shape[2:]).to(x.device)  # [N, 1 + K, H, W]
    x = x.transpose(0, 1).flatten(1)  # [N, C + 1, H, W] -> [C + 1, NHW]
    shares = shares.transpose(0, 1).flatten(1)  # [N, 1 + K, H, W] -> [1 + K, NHW]
    gram = (x * shares[0]) @ x.T  # [C + 1, C + 1]
    gram.diagonal().mul_(1.0001).add_(1e-6)  # ridge: 0.01%, and 1e-6 for channels of zeros
    weight = torch.linalg.solve(gram, x @ shares[1:].T).T  # [C + 1, K] -> [K, C + 1]
    if not weight.isfinite().all():
        raise ValueError("expected finite features, found NaN or infinity")

    logits = F.conv2d(test, weight[:, :, None, None])  # [N, C + 1, H, W] -> [N, K, H, W]
    logits = F.interpolate(logits, test_masks.shape[1:], mode="bilinear")  # [N, K, h, w]
    predicted = classes[logits.argmax(1).cpu()]  # [N, h, w]
    highest = int(torch.cat([classes, test_masks[test_masks != ignore]]).max())
    return mean_iou(predicted, test_masks, highest + 1, ignore)


def mean_iou(predicted, masks, classes, ignore=255):
    """Mean IoU in percent over the numbers below `classes` that are present or predicted."""
    if predicted.shape != masks.shape:
        raise ValueError(f"expected masks {list(predicted.shape)}, found {list(masks.shape)}")
    counted = masks != ignore
    ious = []
    for number in range(classes):
        found = (predicted == number) & counted
        true = (masks == number) & counted
        ious.append((found & true).sum() / (found | true).sum())
    return 100 * torch.stack(ious).nanmean().item()


def save_picture(path, images, *backbones):
    """Images uint8 [N, 3, h, w]; below them backbones' maps, three principal components as RGB."""
    rows = [images / 255]
    for backbone in backbones:
        maps = frozen_features(backbone, images).cpu().permute(0, 2, 3, 1)  # [N, H, W, C]
        centred = (maps - maps.mean((0, 1, 2))).flatten(0, 2)  # [N, H, W, C] -> [NHW, C]
        scores = torch.linalg.svd(centred, full_matrices=False).U[:, :3]  # [NHW, 3]
        colours = torch.sigmoid(1.3 * scores / scores.std(0))
        colours = colours.view(*maps.shape[:3], 3).permute(0, 3, 1, 2)  # [NHW, 3] -> [N, 3, H, W]
        rows.append(F.interpolate(colours, images.shape[2:]))  # [N, 3, H, W] -> [N, 3, h, w]
    save_image(torch.cat(rows), path, nrow=len(images), padding=4, pad_value=1.0)


# ------------------------------------ Appendix: drawn scenes ------------------------------------
CLASSES = ("sky", "cloud", "mountain", "meadow", "road", "water", "tree", "house")


class Scenes:
    """Drawn landscapes from number `first` on, each a function of (seed, number, size).

    images: uint8 [count, 3, size, size]. masks: [count, size, size], indices into CLASSES.
    """

    def __init__(self, count, seed=0, first=0, size=144):
        scenes = [draw_scene(seed, number, size) for number in range(first, first + count)]
        images, self.masks = default_collate(scenes)
        self.images = images.permute(0, 3, 1, 2)  # [count, h, w, 3] -> [count, 3, h, w]


def draw_scene(seed, number, size):
    """One landscape, painted from back to front: image uint8 [size, size, 3], mask [size, size]."""
    rng = np.random.default_rng([seed, number])
    uniform = rng.uniform
    y, x = np.mgrid[:size, :size].astype(np.float32) / size  # y runs downward
    smooth, rough, grain = [noise(rng, size, slope) for slope in (1.6, 1.1, 0.3)]
    sky = uniform((0.25, 0.4, 0.55), (0.65, 0.6, 0.85))
    horizon = uniform(0.35, 0.55)
    depth = (y - horizon) / (1 - horizon)  # 0 at the horizon, 1 at our feet
    land = depth > 0

    # A layer is its class, where it is, its colour and its shade from pixel to pixel.
    ridge = horizon - uniform(0.05, 0.15) + 0.06 * smooth[0]
    slope = np.roll(rough, 2, 1) - rough
    river = abs(depth + 0.06 * smooth - uniform(0.1, 0.8)) < uniform(0.05, 0.2)
    road = abs(x - uniform(-0.2, 1.2) - uniform(-0.6, 0.6) * depth)
    road /= 0.02 + 0.2 * depth  # 0 in its middle, 1 at its edges
    line = road < 0.06
    layers = [
        ("sky", y >= 0, sky, 0.9 * y / horizon),
        ("cloud", uniform(0, 1.2) + 2 * y < smooth.T, 0.85, 0.08 * rough),
        ("mountain", y > ridge, 0.5 * sky + 0.2, 0.2 * slope),
        ("meadow", land, (0.38, 0.48, 0.22), 0.1 * smooth + 0.3 * depth * grain),
        ("water", land & river, 0.6 * sky + (0.1, 0.2, 0.25), 0.15 * rough.T),
        ("road", land & (road < 1), (0.45, 0.43, 0.43), 0.06 * grain + 0.4 * line),
    ]

    # Trees and houses, the farthest first. u runs from their middle, v upward from their foot.
    for near in np.sort(uniform(0.02, 0.8, rng.integers(5, 14))):
        height = 0.06 + 0.3 * near
        u = abs(x - rng.random()) * uniform(0.8, 1.3) / height
        v = (near - depth) * (1 - horizon) / height
        if rng.random() < 0.4:
            walls = (u < 0.55) & (v > 0) & (v < 1.1 - 0.9 * u)
            windows = abs(7 * u % 2 - 1) < 0.4
            windows &= abs(v - 0.32) < 0.14
            layers.append(("house", walls, (0.7, 0.6, 0.5), 0.03 * grain - 0.5 * windows))
        else:
            crown = np.hypot(u / 0.42, (v - 0.6) / 0.6) + 0.1 * grain < 1
            layers.append(("tree", crown, (0.25, 0.37, 0.18), 0.2 * grain + 0.4 * (v - 0.8)))

    image = np.zeros((size, size, 3), np.float32)
    mask = np.zeros((size, size), np.int64)
    for name, where, colour, shade in layers:
        colour = colour + uniform(-0.12, 0.12, 3) + uniform(-0.1, 0.1)  # new in each scene
        image[where] = (colour * (1 + shade[where])[:, None]).clip(0.02, 1.2)  # [pixels, 3]
        mask[where] = CLASSES.index(name)
    light = uniform(0.7, 1.1, 3)
    return (255 * (image * light).clip(0, 1)).astype(np.uint8), mask


def noise(rng, size, slope):
    """A random field [size, size] of deviation 1, the smoother the larger slope is."""
    down, across = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)
    frequency = size * np.hypot(down, across)
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) / np.maximum(frequency, 1) ** slope
    field = np.fft.irfft2(spectrum, (size, size)).astype(np.float32)
    return field / field.std()


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\ntrain.py: interrupted; the same command continues from the last checkpoint")
