"""Pre-training with PixPro: recipes, LARS, data, AMP, DDP, checkpoints, a linear probe, a picture.

    python train.py                                   recipe demo: drawn scenes, minutes on a CPU
    python train.py --data DIR                        recipe paper, on every image below DIR
    torchrun --nproc_per_node=8 train.py --data DIR   the same on 8 GPUs; --batch counts all of them

The same command continues a run that was stopped, bit for bit on a CPU.
"""

import argparse
import contextlib
import copy
import errno
import io
import json
import math
import os
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, default_collate
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.utils import save_image

from pixpro import MEAN, STD, Backbone, Heads, Output, PixPro, TwoViews, momentum_at

# ------------------------------------ Recipes and flags ------------------------------------
RECIPES = {  # flag, of the type of its demo value: (demo, paper, meaning)
    "arch": ("resnet18", "resnet50", "classification network of torchvision"),
    "layer": ("layer3", "layer4", "its layer whose output is the feature map"),
    "size": (112, 224, "side of the views in pixels"),
    "batch": (32, 1024, "images per step, over all ranks"),
    "epochs": (20.0, 100.0, "length of the run in passes over the images"),
    "warmup_epochs": (5.0, 5.0, "length of the warm-up, at most a quarter of the run"),
    "lr": (4.0, None, "peak learning rate; None is batch / 256"),
    "loss_scale": (2.0, 2.0, "factor of the loss: the authors' rates belong to 2 x Eq. 5"),
    "hidden_dim": (2048, 2048, "width of the projection heads"),
    "gamma": (2.0, 2.0, "exponent of the similarity in Eq. 4"),
    "num_layers": (1, 1, "layers of g in Eq. 3"),
    "threshold": (0.7, 0.7, "T of Eq. 1"),
    "instance_weight": (0.0, 0.0, "alpha of Eq. 6"),
    "objective": ("pixpro", "pixpro", "pixpro (Eq. 5) or pixcontrast (Eq. 2)"),
    "temperature": (0.3, 0.3, "tau of Eq. 2"),
}
MODEL = list(RECIPES)[list(RECIPES).index("hidden_dim") :]  # the arguments of PixPro
DEMO = {name: demo for name, (demo, _, _) in RECIPES.items()}
PAPER = {name: paper for name, (_, paper, _) in RECIPES.items()}

SCENES = 512  # drawn for pre-training
PROBE_SCENES = 256  # drawn for fitting the probe, and as many for testing it
RECORD_STEPS = 10  # between records in metrics.jsonl
PRINT_SECONDS = 5  # between lines of the log
SAVE_SECONDS = 60  # between checkpoints
FORMAT = 2  # of last.pt
# What may change when a run continues; epochs count by the number of steps that they make.
FREE = ("recipe", "data", "out", "workers", "device", "compile", "epochs", "warmup_epochs")
MAY_BE_0 = ("seed", "workers", "warmup_epochs", "num_layers", "threshold", "instance_weight")


def parse(argv):
    """The flags; those that are not given take the recipe's values."""
    devices = ["cuda", "cpu"] if torch.cuda.is_available() else ["cpu"]
    workers = min(8, os.cpu_count() // 2 or 1)
    parser = argparse.ArgumentParser(usage="train.py [--data DIR] [flags]", allow_abbrev=False)
    add = parser.add_argument
    add("--data", help="train on every image below this folder, not on drawn scenes")
    add("--recipe", choices=["demo", "paper"], help="values of the flags below (paper with --data)")
    add("--out", type=Path, help="folder for everything that is written (runs/RECIPE)")
    add("--steps", type=int, help="length of the run, instead of --epochs")
    add("--seed", type=int, default=0, help="of scenes, weights, order and views (0)")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="precision (auto)")
    add("--workers", type=int, default=workers, help=f"data processes per rank ({workers})")
    add("--device", choices=devices, default=devices[0], help=f"where to train ({devices[0]})")
    add("--compile", action="store_true", help="run the model through torch.compile")
    add("--heads", action="store_true", help="train an FPN and a head too; --layer is then unused")
    for name, (demo, paper, meaning) in RECIPES.items():
        flag = "--" + name.replace("_", "-")
        add(flag, type=type(demo), help=f"{meaning} (demo {demo}, paper {paper})")

    # The first reading finds the recipe, the second fills in its values.
    args = parser.parse_args(argv)
    recipe = args.recipe or ("demo" if args.data is None else "paper")
    parser.set_defaults(recipe=recipe, out=Path("runs", recipe))
    parser.set_defaults(**(DEMO if recipe == "demo" else PAPER))
    args = parser.parse_args(argv)
    for name, value in vars(args).items():
        lowest = ">= 0" if name in MAY_BE_0 else "> 0"
        in_range = type(value) not in (int, float) or 0 < value < math.inf
        if not in_range and not (value == 0 and name in MAY_BE_0):
            parser.error(f"expected --{name.replace('_', '-')} {lowest}, found {value}")
    return args


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

    Biases and norms, which are one-dimensional, skip the first line: no decay, no scaling.
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
                if p.dim() > 1:
                    g.add_(p, alpha=group["weight_decay"])
                    scale = group["trust_coefficient"] * p.norm() / (g.norm() + group["eps"])
                    g.mul_(torch.where(scale > 0, scale, 1.0))
                if p not in self.state:
                    self.state[p]["v"] = torch.zeros_like(p)
                v = self.state[p]["v"].mul_(group["momentum"]).add_(g)
                p.sub_(v, alpha=group["lr"])
        return loss


# ------------------------------------ Data ------------------------------------
def find_images(folder, out):
    """Paths of the images below a folder, without hidden ones and those below out."""
    paths = []
    for place, folders, files in os.walk(folder):
        folders[:] = [name for name in folders if name[0] != "."]
        if f"{os.path.abspath(place)}{os.sep}".startswith(f"{out}{os.sep}"):
            continue
        for name in files:
            if name[0] != "." and name.lower().endswith((*IMG_EXTENSIONS, ".gif")):
                paths.append(os.path.join(place, name))
    # Forked workers share an array; each would copy a list of strings.
    return np.array(sorted(paths))


def load_image(path):
    """The RGB image that a viewer shows: upright, first frame, opaque, the upper 8 of 16 bits."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype("uint8"))
    return image.convert("RGB")


def seed_of(*numbers):
    """One seed from several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Unreadable(Exception):
    """Ten photographs in a row cannot be read."""


class Samples:
    """Sample n of a run: two views and boxes of an image, a function of (seed, n) and the images.

    images: uint8 [count, 3, h, w], or paths. Epoch n // count shows each image once. The next
    sample replaces one whose file cannot be read; raises Unreadable after ten of them in a row.
    """

    def __init__(self, images, views, seed):
        self.images = images
        self.views = views
        self.seed = seed
        self.epoch = None

    def __getitem__(self, n):
        for number in range(n, n + 10):
            epoch, place = divmod(number, len(self.images))
            if epoch != self.epoch:
                self.epoch = epoch
                rng = np.random.default_rng([self.seed, epoch])
                self.order = rng.permutation(len(self.images))
            image = self.images[self.order[place]]
            try:
                image = load_image(image) if isinstance(image, str) else image
            except Exception:  # decoders raise many kinds
                print(f"warning: cannot read {image}, the next sample is used", flush=True)
                continue
            torch.default_generator.manual_seed(seed_of(self.seed, number))
            return self.views(image)
        raise Unreadable


# ------------------------------------ Errors and checkpoints ------------------------------------
def refuse(reason):
    """Ends the program before the run, with one sentence and exit code 2."""
    print(f"train.py: error: {reason}", file=sys.stderr)
    sys.exit(2)


def stop(reason):
    """Ends the run with one sentence and exit code 1."""
    sys.exit(f"\ntrain.py: {reason}")


@contextlib.contextmanager
def foreseen_errors():
    """Ends the run in one sentence for errors that are expected; others keep their traceback."""
    try:
        yield
    except KeyboardInterrupt:
        stop("interrupted; the same command continues from the last checkpoint")
    except Unreadable:
        stop("ten photographs in a row cannot be read; mend them, and the same command continues")
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        stop(f"the disk is full ({error}); make room, and the same command continues")


def save(path, state):
    """torch.save, whole or not at all: written beside and renamed."""
    buffer = io.BytesIO()  # into a file, torch.save would hide the OSError of a full disk
    torch.save(state, buffer)
    beside = path.with_name("writing.tmp")
    beside.write_bytes(buffer.getbuffer())
    os.replace(beside, path)


def save_checkpoint(out, settings, step, parts):
    """Writes last.pt: all that the next step depends on. Ends the run at weights not finite."""
    state = {name: part.state_dict() for name, part in parts.items()}
    if not all(tensor.isfinite().all() for tensor in state["model"].values()):
        stop(f"the weights are not finite at step {step}; try a lower --lr, with another --out")
    metrics_size = (out / "metrics.jsonl").stat().st_size
    state |= {"settings": settings, "step": step, "metrics_size": metrics_size}
    save(out / "last.pt", state)


def resume(out, settings, parts):
    """Loads last.pt, if there is one, and returns the number of steps done.

    Refuses other files and other settings. Removes later records and an earlier backbone.pt.
    """
    path = out / "last.pt"
    checkpoint = {"step": 0, "metrics_size": 0}
    if path.exists():
        try:
            checkpoint = torch.load(path, map_location="cpu", weights_only=True)
            old = dict(checkpoint["settings"])
        except Exception as error:  # of another program, damaged, or with code, which is not run
            refuse(f"expected a checkpoint of train.py, found {path} ({type(error).__name__})")
        changes = [f"{k} was {old.get(k)}, is {v}" for k, v in settings.items() if old.get(k) != v]
        if changes:
            refuse(f"{path} has other settings: {'; '.join(changes)}; keep them or change --out")
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])

    try:
        out.mkdir(parents=True, exist_ok=True)
        with open(out / "metrics.jsonl", "a") as file:
            file.truncate(min(file.tell(), checkpoint["metrics_size"]))
    except OSError as error:
        refuse(f"cannot write to {out}: {error.strerror}")
    if checkpoint["step"] == 0:
        (out / "backbone.pt").unlink(missing_ok=True)  # of an earlier run
    return checkpoint["step"]


# ------------------------------------ The run ------------------------------------
@foreseen_errors()
def main(argv=None):
    """One pre-training run, from the flags to backbone.pt."""
    args = parse(argv)
    out = Path(os.path.abspath(args.out))

    # Processes. torchrun starts one for each GPU and numbers them.
    device = args.device
    rank = int(os.environ.get("RANK", 0))
    ranks = int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1:
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group()  # NCCL for GPUs, gloo for CPUs

    # Data
    images = Scenes(SCENES, args.seed).images if args.data is None else find_images(args.data, out)
    if len(images) == 0:
        refuse(f"expected images below {args.data!r}, found none")
    if args.batch > len(images) or args.batch % ranks != 0:
        refuse(f"expected a batch <= {len(images)}, a multiple of {ranks}, found {args.batch}")
    args.images = len(images)
    epoch_steps = len(images) / args.batch
    args.steps = args.steps or max(1, round(args.epochs * epoch_steps))
    args.warmup_steps = min(round(args.warmup_epochs * epoch_steps), args.steps // 4)

    # Model. `initial` keeps the first weights, for comparison.
    torch.manual_seed(args.seed)
    try:
        initial = Heads(args.arch) if args.heads else Backbone(args.arch, args.layer)
        model = PixPro(copy.deepcopy(initial), **{name: getattr(args, name) for name in MODEL})
        shape = frozen_features(initial, torch.zeros(1, 3, args.size, args.size)).shape
    except (ValueError, RuntimeError) as error:
        refuse(str(error).partition("\n")[0])
    if min(shape[2:]) < 2:
        refuse(f"expected a size that makes a map of at least 2 x 2, found {args.size}")
    if ranks > 1 and device == "cuda":
        model = torch.nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model.to(device, memory_format=torch.channels_last)

    # Optimizer and precision. The scaler keeps small gradients of fp16 from vanishing.
    args.lr = args.lr or args.batch / 256
    args.amp = auto_amp(device) if args.amp == "auto" else args.amp
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[args.amp]
    optimizer = LARS([p for p in model.parameters() if p.requires_grad], args.lr)
    scaler = torch.amp.GradScaler(device, enabled=args.amp == "fp16")

    # Resume. What is not in last.pt is a function of the settings and the step.
    parts = {"model": model, "optimizer": optimizer, "scaler": scaler}
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    settings["format"] = FORMAT
    step = resume(out, settings, parts)

    # DDP waits for all ranks, so that rank 0 saves only after all have read last.pt.
    network = torch.nn.parallel.DistributedDataParallel(model) if ranks > 1 else model
    network = torch.compile(network) if args.compile else network

    # Loop. Step k takes the samples k * batch to (k + 1) * batch - 1, shared by the ranks.
    share = args.batch // ranks
    starts = range(step * args.batch + rank * share, args.steps * args.batch, args.batch)
    batches = [range(start, start + share) for start in starts]
    samples = Samples(images, TwoViews(args.size), args.seed)
    pin = device == "cuda"
    loader = DataLoader(samples, batch_sampler=batches, num_workers=args.workers, pin_memory=pin)
    if rank == 0:
        print(f"{args.out}: {args.arch} on {len(images)} images, {device}, {args.amp}, step {step}")
    printed = saved = time.monotonic()
    printed_step = step
    outputs = []
    for batch in loader:
        batch = [tensor.to(device, non_blocking=True) for tensor in batch]
        torch.manual_seed(seed_of(args.seed, step, rank))  # of dropout
        lr = lr_at(step, args.steps, args.warmup_steps, args.lr)
        for group in optimizer.param_groups:
            group["lr"] = lr
        m = momentum_at(step, args.steps)
        model.update_momentum(m)

        with torch.autocast(device, dtype, enabled=dtype is not None):
            output = network(*batch)
        scaler.scale(args.loss_scale * output.loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()

        step += 1
        outputs.append(torch.stack(output).detach())  # [4]
        if step % RECORD_STEPS != 0 and step < args.steps:
            continue

        # Record the means since the last record. Reading them in every step would slow a GPU down.
        means = torch.stack(outputs).mean(0)  # [steps, 4] -> [4]
        outputs.clear()
        if ranks > 1:
            torch.distributed.all_reduce(means)
        if rank > 0:
            continue
        means = (means / ranks).tolist()
        values = dict(zip(Output._fields, means), lr=lr, m=m)
        if not math.isfinite(values["loss"]):
            stop(f"the loss is {values['loss']} before step {step}; lower --lr, with another --out")
        with open(out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": step} | values) + "\n")
        now = time.monotonic()
        if now - printed > PRINT_SECONDS or step == args.steps:
            print_progress(args, step, values, (step - printed_step) / (now - printed))
            printed, printed_step = now, step

        # Save
        if now - saved > SAVE_SECONDS or step == args.steps:
            save_checkpoint(out, settings, step, parts)
            saved = now

    # Finish. backbone.pt is written last: it marks the run as complete.
    if rank == 0:
        if batches or not (out / "backbone.pt").exists():
            finish(args, out, images, initial.to(device), model.backbone)
        written = "last.pt, backbone.pt, metrics.jsonl and features.png"
        print(f"complete: {args.steps} steps; {args.out} has {written}")
    if ranks > 1:
        torch.distributed.destroy_process_group()


def print_progress(args, step, values, speed):
    """One line of the log, redrawn in place on a terminal. speed: steps per second."""
    figures = "  ".join(f"{name} {value:.4g}" for name, value in values.items())
    minutes = (args.steps - step) / speed / 60
    line = f"step {step}/{args.steps}  {figures}  {speed * args.batch:.0f} images/s"
    line += f"  {minutes:.1f} min left"
    if values["spread"] < 0.4 and step > args.warmup_steps:  # healthy runs stay above
        line = f"warning: low spread, the features may have collapsed; {line}"
    live = sys.stdout.isatty()
    if live:
        line = "\r\033[K" + line[: os.get_terminal_size().columns - 1]
    print(line, end="" if live and step < args.steps else "\n", flush=True)


def auto_amp(device):
    """bf16 where the hardware computes in it, else fp16 on GPUs, else off."""
    if device == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    cpuinfo = Path("/proc/cpuinfo")  # on Linux
    flags = cpuinfo.read_text() if cpuinfo.exists() else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "off"


def finish(args, out, images, initial, trained):
    """Compares the backbone with its first weights; writes features.png and backbone.pt."""
    if args.data is not None:
        square = Samples(images, lambda image: ImageOps.fit(image, [2 * args.size] * 2), args.seed)
        shown = [v2.functional.pil_to_tensor(square[n]) for n in range(min(8, len(images)))]
        shown = torch.stack(shown)  # [8 or fewer, 3, 2 size, 2 size]
    else:
        scenes = Scenes(PROBE_SCENES, args.seed, SCENES)
        held_out = Scenes(PROBE_SCENES, args.seed, SCENES + PROBE_SCENES)
        shown = v2.functional.resize(held_out.images[:8], [2 * args.size])
        for name, backbone in (
            ("random, as the recipe starts it", initial),
            ("random, with its residual blocks switched on", with_blocks_on(initial)),
            ("pre-trained", trained),
        ):
            print(f"linear probe, mIoU {linear_probe(backbone, scenes, held_out):.1f}: {name}")
    save_picture(out / "features.png", shown, initial, trained)
    if args.heads:
        save(out / "heads.pt", trained.state_dict())
    save(out / "backbone.pt", trained.body.state_dict())


# ------------------------------------ Appendix: probe, picture ------------------------------------
@torch.no_grad()
def frozen_features(backbone, images):
    """Maps [N, C, H, W] of images uint8 [N, 3, h, w] in eval mode; the first map of a dict."""
    backbone = copy.deepcopy(backbone).eval()  # a copy, so that the original keeps its mode
    images = images.to(next(backbone.parameters()).device)
    views = v2.functional.normalize(images / 255, MEAN, STD)
    maps = []
    for batch in views.split(32):
        features = backbone(batch)
        maps.append(next(iter(features.values())) if isinstance(features, dict) else features)
    return torch.cat(maps)


def with_blocks_on(backbone):
    """A copy with all BatchNorm weights at 1: residual blocks that start at 0 are switched on."""
    backbone = copy.deepcopy(backbone)
    for module in backbone.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.ones_(module.weight)
    return backbone


def linear_probe(backbone, scenes, held_out, ignore=255):
    """Mean IoU in percent of a 1x1 convolution on frozen features, fitted by ridge regression.

    scenes, held_out: images uint8 [N, 3, h, w] and masks [N, h, w] of the classes 0 to K - 1.
    Pixels of the label `ignore` count neither in the fit nor in the test, which is at full
    resolution.
    """
    # Features with a channel of ones, whose weight is the bias
    x, test = [
        F.pad(frozen_features(backbone, images), (0, 0, 0, 0, 0, 1), value=1.0)
        for images in (scenes.images, held_out.images)
    ]  # [N, C + 1, H, W] each

    # Regression of each class's share of a cell. A cell weighs as much as it has counted pixels.
    counted = scenes.masks != ignore  # [N, h, w]
    classes = range(int(scenes.masks[counted].max()) + 1)
    masks = torch.stack([counted, *[scenes.masks == number for number in classes]], 1).float()
    shares = F.adaptive_avg_pool2d(masks, x.shape[2:]).to(x.device)  # [N, 1 + K, H, W]
    x = x.transpose(0, 1).flatten(1)  # [N, C + 1, H, W] -> [C + 1, NHW]
    shares = shares.transpose(0, 1).flatten(1)  # [N, 1 + K, H, W] -> [1 + K, NHW]
    gram = (x * shares[0]) @ x.T  # [C + 1, C + 1]
    gram.diagonal().mul_(1.0001).add_(1e-6)  # ridge: 0.01%, and 1e-6 for channels of zeros
    weight = torch.linalg.solve(gram, x @ shares[1:].T).T  # [C + 1, K] -> [K, C + 1]

    logits = F.conv2d(test, weight[:, :, None, None])  # [N, C + 1, H, W] -> [N, K, H, W]
    logits = F.interpolate(logits, held_out.masks.shape[1:], mode="bilinear")  # [N, K, h, w]
    predicted = logits.argmax(1).cpu()  # [N, h, w]
    return mean_iou(predicted, held_out.masks, len(classes), ignore)


def mean_iou(predicted, masks, classes, ignore=255):
    """Mean IoU in percent over the numbers below `classes` that are present or predicted."""
    counted = masks != ignore
    ious = []
    for number in range(classes):
        found = (predicted == number) & counted
        true = masks == number
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
    y, x = np.mgrid[:size, :size].astype(np.float32) / size  # y runs downward
    smooth, rough, grain = [noise(rng, size, slope) for slope in (1.6, 1.1, 0.3)]
    sky = rng.uniform((0.25, 0.4, 0.55), (0.65, 0.6, 0.85))
    horizon = rng.uniform(0.35, 0.55)
    depth = (y - horizon) / (1 - horizon)  # 0 at the horizon, 1 at our feet
    land = depth > 0

    # A layer is its class, where it is, its colour and its shade from pixel to pixel.
    ridge = horizon - rng.uniform(0.05, 0.15) + 0.06 * smooth[0]
    slope = np.roll(rough, 2, 1) - rough
    river = np.abs(depth + 0.06 * smooth - rng.uniform(0.1, 0.8)) < rng.uniform(0.05, 0.2)
    road = np.abs(x - rng.uniform(-0.2, 1.2) - rng.uniform(-0.6, 0.6) * depth)
    road /= 0.02 + 0.2 * depth  # 0 in its middle, 1 at its edges
    line = road < 0.06
    layers = [
        ("sky", y >= 0, sky, 0.9 * y / horizon),
        ("cloud", rng.uniform(0, 1.2) + 2 * y < smooth.T, 0.85, 0.08 * rough),
        ("mountain", y > ridge, 0.5 * sky + 0.2, 0.2 * slope),
        ("meadow", land, (0.38, 0.48, 0.22), 0.1 * smooth + 0.3 * depth * grain),
        ("water", land & river, 0.6 * sky + (0.1, 0.2, 0.25), 0.15 * rough.T),
        ("road", land & (road < 1), (0.45, 0.43, 0.43), 0.06 * grain + 0.4 * line),
    ]

    # Trees and houses, the farthest first. u runs from their middle, v upward from their foot.
    for near in np.sort(rng.uniform(0.02, 0.8, rng.integers(5, 14))):
        height = 0.06 + 0.3 * near
        u = np.abs(x - rng.random()) * rng.uniform(0.8, 1.3) / height
        v = (near - depth) * (1 - horizon) / height
        if rng.random() < 0.4:
            walls = (u < 0.55) & (v > 0) & (v < 1.1 - 0.9 * u)
            windows = np.abs(7 * u % 2 - 1) < 0.4
            windows &= np.abs(v - 0.32) < 0.14
            layers.append(("house", walls, (0.7, 0.6, 0.5), 0.03 * grain - 0.5 * windows))
        else:
            crown = np.hypot(u / 0.42, (v - 0.6) / 0.6) + 0.1 * grain < 1
            layers.append(("tree", crown, (0.25, 0.37, 0.18), 0.2 * grain + 0.4 * (v - 0.8)))

    image = np.zeros((size, size, 3), np.float32)
    mask = np.zeros((size, size), np.int64)
    for name, where, colour, shade in layers:
        colour = colour + rng.uniform(-0.12, 0.12, 3) + rng.uniform(-0.1, 0.1)  # new in each scene
        image[where] = (colour * (1 + shade[where])[:, None]).clip(0.02, 1.2)  # [pixels, 3]
        mask[where] = CLASSES.index(name)
    light = rng.uniform(0.7, 1.1, 3)
    return (255 * (image * light).clip(0, 1)).astype(np.uint8), mask


def noise(rng, size, slope):
    """A random field [size, size] of deviation 1, the smoother the larger slope is."""
    down, across = np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)
    frequency = size * np.hypot(down, across)
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) / np.maximum(frequency, 1) ** slope
    field = np.fft.irfft2(spectrum, (size, size)).astype(np.float32)
    return field / field.std()


if __name__ == "__main__":
    main()
