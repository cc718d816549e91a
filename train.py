"""Pre-training with PixPro: recipes, LARS, data, AMP, DDP, checkpoints, a linear probe and a picture.

    python train.py                                       recipe demo: drawn scenes, minutes on a CPU
    python train.py --data DIR                            recipe paper, on every image below DIR
    torchrun --nproc_per_node=8 train.py --data DIR       the same on 8 GPUs; --batch is their total
    (any of them again)                                   continues a stopped run, on a CPU bit for bit
"""

import argparse
import copy
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
from torch.utils.data import DataLoader
from torchvision import models, ops
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import v2
from torchvision.utils import save_image

from pixpro import MEAN, STD, Backbone, Output, PixPro, TwoViews, check_name, momentum_at

# ------------------------------------ Recipes ------------------------------------
VALUES = {  # flag: (value in recipe demo, in recipe paper, meaning)
    "arch": ("resnet18", "resnet50", "classification network of torchvision"),
    "layer": ("layer3", "layer4", "its layer whose output is the feature map"),
    "size": (112, 224, "pixels a side of the views"),
    "batch": (32, 1024, "images a step, over all ranks"),
    "epochs": (20.0, 100.0, "length of the run in passes over the images"),
    "warmup_epochs": (5.0, 5.0, "length of the linear warm-up; at most a quarter of the run"),
    "lr": (4.0, None, "peak learning rate; without one: batch / 256"),
    "loss_scale": (2.0, 2.0, "factor of the loss that is minimised: the authors' rates belong to 2 x Eq. 5"),
    "hidden_dim": (2048, 2048, "width of the heads"),
    "gamma": (2.0, 2.0, "exponent of the similarity in Eq. 4"),
    "num_layers": (1, 1, "layers of g in Eq. 3"),
    "threshold": (0.7, 0.7, "T of Eq. 1"),
    "instance_weight": (0.0, 0.0, "alpha of Eq. 6"),
    "objective": ("pixpro", "pixpro", "pixpro (Eq. 5) or pixcontrast (Eq. 2)"),
    "temperature": (0.3, 0.3, "tau of Eq. 2"),
}
DEMO, PAPER = ({name: value[recipe] for name, value in VALUES.items()} for recipe in (0, 1))
MODEL = ("hidden_dim", "gamma", "num_layers", "threshold", "instance_weight", "objective", "temperature")
FREE = ("recipe", "data", "out", "workers", "device", "compile", "epochs", "warmup_epochs")  # may change on resuming
CLASSES = ("sky", "cloud", "mountain", "meadow", "road", "water", "tree", "house")
SCENES, PROBE_SCENES = 512, 256  # drawn for pre-training; for training the probe, and as many for its test
RECORD_STEPS, PRINT_SECONDS, SAVE_SECONDS = 10, 5, 60  # between records, lines of the log, checkpoints (on records)


# ------------------------------------ Head networks, optimizer, schedule ------------------------------------
class Heads(models.detection.backbone_utils.BackboneWithFPN):
    """ResNet (`body`), FPN (`fpn`) and three convolutions of an FCOS head (`tower`, one for all levels) of Sec. 3.3:
    image [N, 3, h, w] -> maps [N, 256, H, W], P3 to P6. Recalled in part, not verified: no code of it was released."""
    def __init__(self, arch):
        check_name("arch", arch, models.list_models(module=models, include="*resne*"))
        network = models.get_model(arch, weights=None, zero_init_residual=True)
        channels = [network.inplanes // 4, network.inplanes // 2, network.inplanes]
        p6_p7 = ops.feature_pyramid_network.LastLevelP6P7(256, 256)
        super().__init__(network, {"layer2": "0", "layer3": "1", "layer4": "2"}, channels, 256, p6_p7)
        p6_p7.p7.requires_grad_(False)  # P7 is in no loss
        self.tower = models.detection.fcos.FCOSClassificationHead(256, 1, 1, num_convs=3).conv

    def forward(self, image):
        return {name: self.tower(level) for name, level in super().forward(image).items() if name != "p7"}


class LARS(torch.optim.SGD):
    """SGD with momentum on gradients that are first, but for vectors, decayed and scaled in place (arXiv 1708.03888):
    g <- g + weight_decay p;  g <- g trust_coefficient |p| / (|g| + eps), unscaled where a norm is 0."""
    def __init__(self, params, lr, momentum=0.9, weight_decay=1e-5, trust_coefficient=1e-3, eps=1e-8):
        super().__init__(params, lr=lr, momentum=momentum)
        self.decay, self.trust_coefficient, self.eps = weight_decay, trust_coefficient, eps

    @torch.no_grad()
    def step(self, closure=None):
        loss = torch.enable_grad()(closure)() if closure else None
        params = [p for group in self.param_groups for p in group["params"] if p.dim() > 1 and p.grad is not None]
        if params:
            grads = [p.grad for p in params]
            torch._foreach_add_(grads, params, alpha=self.decay)
            p_norm, g_norm = torch.stack(torch._foreach_norm(params)), torch.stack(torch._foreach_norm(grads))
            scale = self.trust_coefficient * p_norm / (g_norm + self.eps)  # [parameters]
            scale = torch.where((p_norm > 0) & (g_norm > 0), scale, 1.0)
            torch._foreach_mul_(grads, list(scale))
        return super().step() or loss  # without a closure of its own, it returns None


def lr_at(step, total_steps, warmup_steps, peak, floor=1e-6):
    """Learning rate: linear from peak / 100 to the peak in warmup_steps, then half a cosine down to the floor."""
    if step < warmup_steps:
        return peak * (0.01 + 0.99 * step / warmup_steps)
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return floor + (peak - floor) * (1 + math.cos(math.pi * progress)) / 2


# ------------------------------------ Data ------------------------------------
class Scenes:
    """Drawn landscapes from number `first` on, uint8, with their classes; each a function of (seed, number, size)."""
    def __init__(self, count, seed=0, first=0, size=144):
        images, masks = zip(*(draw_scene(seed, number, size) for number in range(first, first + count)))
        self.images = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2)  # [count, h, w, 3] -> [count, 3, h, w]
        self.masks = torch.from_numpy(np.stack(masks))  # [count, h, w], indices into CLASSES


def draw_scene(seed, number, size):
    """One landscape, painted from back to front: image uint8 [size, size, 3], mask [size, size]."""
    rng = np.random.default_rng([seed, number])
    y, x = np.mgrid[:size, :size].astype(np.float32) / size  # y runs downward
    smooth, rough, grain = (noise(rng, size, slope) for slope in (1.6, 1.1, 0.3))
    sky, horizon = rng.uniform((0.25, 0.4, 0.55), (0.65, 0.6, 0.85)), rng.uniform(0.35, 0.55)
    depth = (y - horizon) / (1 - horizon)  # 0 at the horizon, 1 at our feet
    ridge = horizon - rng.uniform(0.05, 0.15) + 0.06 * smooth[0]
    bank = np.abs(depth + 0.06 * smooth - rng.uniform(0.1, 0.8)) / rng.uniform(0.05, 0.2)
    across = np.abs(x - rng.uniform(-0.2, 1.2) - rng.uniform(-0.6, 0.6) * depth) / (0.02 + 0.2 * depth)
    layers = [  # class, where it is, its colour, its shade from pixel to pixel
        ("sky", y < 2, sky, 0.9 * y / horizon),
        ("cloud", smooth.T > rng.uniform(0, 1.2) + 2 * y, (0.85, 0.85, 0.85), 0.08 * rough),
        ("mountain", y > ridge, 0.5 * sky + 0.2, 0.2 * (np.roll(rough, 2, 1) - rough)),  # lit from one side
        ("meadow", depth > 0, (0.38, 0.48, 0.22), 0.1 * smooth + 0.3 * depth * grain),
        ("water", (depth > 0) & (bank < 1), 0.6 * sky + (0.1, 0.2, 0.25), 0.15 * rough.T),
        ("road", (depth > 0) & (across < 1), (0.45, 0.43, 0.43), 0.06 * grain + 0.4 * (across < 0.06))]
    for near in np.sort(rng.uniform(0.02, 0.8, rng.integers(5, 14))):  # the farthest first
        u = np.abs(x - rng.random()) * rng.uniform(0.8, 1.3) / (0.06 + 0.3 * near)
        v = (near - depth) * (1 - horizon) / (0.06 + 0.3 * near)  # of an object 1 high, upward from its foot
        crown, windows = np.hypot(u / 0.42, (v - 0.6) / 0.6), (np.abs(7 * u % 2 - 1) < 0.4) & (np.abs(v - 0.32) < 0.14)
        tree = ("tree", crown + 0.1 * grain < 1, (0.25, 0.37, 0.18), 0.2 * grain + 0.4 * (v - 0.8))
        house = ("house", (u < 0.55) & (v > 0) & (v < 1.1 - 0.9 * u), (0.7, 0.6, 0.5), 0.03 * grain - 0.5 * windows)
        layers.append(house if rng.random() < 0.4 else tree)
    image, mask = np.zeros((size, size, 3), np.float32), np.zeros((size, size), np.int64)
    for name, where, colour, shade in layers:
        colour = colour + rng.uniform(-0.12, 0.12, 3) + rng.uniform(-0.1, 0.1)  # another in each scene
        image[where] = (colour * (1 + shade[where])[:, None]).clip(0.02, 1.2)  # [pixels, 3]
        mask[where] = CLASSES.index(name)
    return (255 * (image * rng.uniform(0.7, 1.1, 3)).clip(0, 1)).astype(np.uint8), mask


def noise(rng, size, slope):
    """A random field [size, size] of deviation 1, the smoother the larger slope is."""
    frequency = size * np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size))
    spectrum = np.fft.rfft2(rng.standard_normal((size, size))) / np.maximum(frequency, 1) ** slope
    field = np.fft.irfft2(spectrum, (size, size)).astype(np.float32)
    return field / field.std()


def load_image(path):
    """The RGB image that a viewer shows: upright, its first frame, without transparency, of 16 bits the upper 8."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode.startswith("I"):  # 16 bits
        image = Image.fromarray((np.asarray(image) // 256).clip(0, 255).astype(np.uint8))
    return image.convert("RGB")


class Samples:
    """Sample n of a run, a function of (seed, n): two views and boxes of an image of epoch n // len(images). images:
    [count, 3, h, w] or paths; the next sample replaces one that cannot be read, and unreadable.txt in `out` names it.
    Raises OSError when these are all, or more than 10 and more than 1%."""
    def __init__(self, images, views, seed, out=Path()):
        self.images, self.views, self.seed, self.out, self.epoch = images, views, seed, out, None

    def __getitem__(self, n):
        epoch, place = divmod(n, len(self.images))
        if epoch != self.epoch:
            self.epoch, self.order = epoch, np.random.default_rng([self.seed, epoch]).permutation(len(self.images))
        image = self.images[self.order[place]]
        try:
            image = load_image(image) if isinstance(image, (str, Path)) else image
        except Exception:  # decoders raise many kinds
            with open(self.out / "unreadable.txt", "a+", encoding="utf-8") as file:
                file.seek(0)
                known, name = file.read().splitlines(), repr(str(image))
                if name not in known:
                    print(name, file=file)
                    print(f"warning: cannot read {name} ({len(known) + 1} by now), the next sample is used", flush=True)
            if len({*known, name}) > min(len(self.images) - 1, max(10, len(self.images) // 100)):
                raise OSError(f"expected images, found too many that cannot be read: {', '.join({*known, name})}")
            return self[n + 1]
        torch.default_generator.manual_seed(int(np.random.SeedSequence([self.seed, n]).generate_state(1)[0]))
        return self.views(image)


# ------------------------------------ Training ------------------------------------
class Run:
    """A pre-training run: data, model and optimizer, and how far it is (`step`: steps that are done)."""
    def __init__(self, args):
        self.args, self.out, self.device = args, args.out.absolute(), torch.device(args.device)
        self.rank, self.ranks = 0, 1
        if "LOCAL_RANK" in os.environ:  # under torchrun
            if self.device.type == "cuda":
                torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
            torch.distributed.init_process_group()  # NCCL for GPUs, gloo for CPUs
            self.rank, self.ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        files = Path(args.data).absolute().rglob("[!.]*") if args.data else []
        paths = [p for p in files if p.suffix.lower() in (*IMG_EXTENSIONS, ".gif") and self.out not in p.parents]
        if args.data and not paths:
            raise ValueError(f"expected images below {args.data}, found none")
        self.images = np.array(sorted(map(str, paths))) if paths else Scenes(SCENES, args.seed).images
        if not 1 <= args.batch <= len(self.images) or args.batch % self.ranks:
            raise ValueError(f"expected a batch <= {len(self.images)}, a multiple of {self.ranks}, found {args.batch}")
        epoch = len(self.images) / args.batch  # in steps
        args.images, args.steps = len(self.images), round(args.epochs * epoch) if args.steps is None else args.steps
        args.warmup_steps = min(round(args.warmup_epochs * epoch), args.steps // 4)
        args.lr = args.batch / 256 if args.lr is None else args.lr
        found = [args.steps, args.lr, args.loss_scale, args.hidden_dim, args.warmup_steps, args.seed, args.workers]
        if not all(0 < value < math.inf for value in found[:4]) or min(found[4:]) < 0:
            raise ValueError(f"expected steps, lr, loss scale, width > 0, warm-up, seed, workers >= 0; found {found}")
        args.amp = auto_amp(self.device) if args.amp == "auto" else args.amp
        self.settings = {name: value for name, value in vars(args).items() if name not in FREE}
        torch.manual_seed(args.seed)
        self.initial = Heads(args.arch) if args.heads else Backbone(args.arch, args.layer)  # kept for comparison
        net = PixPro(copy.deepcopy(self.initial), **{name: getattr(args, name) for name in MODEL})
        if min(frozen_features(self.initial, torch.zeros(1, 3, *2 * [max(1, args.size)])).shape[2:]) < 2:
            raise ValueError(f"expected a size that makes a map of at least 2 x 2, found {args.size}")
        net = torch.nn.SyncBatchNorm.convert_sync_batchnorm(net) if self.ranks > 1 and "cuda" in args.device else net
        self.out.mkdir(parents=True, exist_ok=True)
        (self.out / "unreadable.txt").unlink(missing_ok=True)  # begun anew; DDP, below, waits for all ranks
        self.core = net.to(self.device, memory_format=torch.channels_last)
        self.model = torch.nn.parallel.DistributedDataParallel(net) if self.ranks > 1 else net
        self.model = torch.compile(self.model) if args.compile else self.model
        self.optimizer = LARS([p for p in net.parameters() if p.requires_grad], args.lr)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=args.amp == "fp16")
        self.step, self.recorded = self.resume()

    def train(self):
        args, outputs = self.args, []
        share, pin = args.batch // self.ranks, self.device.type == "cuda"
        firsts = range(self.step * args.batch + self.rank * share, args.steps * args.batch, args.batch)
        batches = [range(first, first + share) for first in firsts]  # step k: samples k * batch to (k + 1) * batch - 1
        samples = Samples(self.images, TwoViews(args.size), args.seed, self.out)
        dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "off": None}[args.amp]
        if self.rank == 0:
            with open(self.out / "metrics.jsonl", "a") as file:
                file.truncate(min(file.tell(), self.recorded))
            print(f"{args.out}: {args.arch} on {args.images} images, {args.device}, {args.amp}, from step {self.step}")
        self.printed, self.printed_step, self.saved = time.monotonic(), self.step, time.monotonic()
        for batch in DataLoader(samples, batch_sampler=batches, num_workers=args.workers, pin_memory=pin):
            batch = [tensor.to(self.device, non_blocking=True) for tensor in batch]
            torch.manual_seed(args.seed + self.step)  # for networks with dropout
            self.optimizer.param_groups[0]["lr"] = lr_at(self.step, args.steps, args.warmup_steps, args.lr)
            self.core.update_momentum(momentum_at(self.step, args.steps))
            with torch.autocast(self.device.type, dtype, enabled=dtype is not None):
                output = self.model(*batch)
            self.scaler.scale(args.loss_scale * output.loss).backward()
            self.scaler.step(self.optimizer)
            self.scaler.update()
            self.optimizer.zero_grad()
            outputs.append(torch.stack(output).detach())  # [4]
            self.step += 1
            if self.step % RECORD_STEPS == 0 or self.step == args.steps:
                self.record(torch.stack(outputs))  # [steps since the last record, 4]
                outputs = []

    def record(self, outputs):
        """Stops at a loss that is not finite; rank 0 writes metrics.jsonl, now and then the log and the checkpoint."""
        if self.ranks > 1:
            torch.distributed.all_reduce(outputs)
        outputs = (outputs / self.ranks).cpu()  # the one place that waits for the GPU
        for step, loss in enumerate(outputs[:, 0], self.step - len(outputs) + 1):
            if not loss.isfinite():
                raise FloatingPointError(f"the loss of step {step} is {loss} (try a lower --lr, with another --out)")
        if self.rank > 0:
            return
        args, lr = self.args, self.optimizer.param_groups[0]["lr"]
        values = dict(zip(Output._fields, outputs.mean(0).tolist()), lr=lr, m=momentum_at(self.step - 1, args.steps))
        with open(self.out / "metrics.jsonl", "a") as file:
            file.write(json.dumps({"step": self.step} | values) + "\n")
        now, finished, live = time.monotonic(), self.step == args.steps, sys.stdout.isatty()
        if finished or now - self.printed > PRINT_SECONDS:
            speed = (self.step - self.printed_step) / (now - self.printed)  # steps a second
            line = f"step {self.step}/{args.steps}  " + "  ".join(f"{name} {x:.4g}" for name, x in values.items())
            line += f"  {speed * args.batch:.0f} images/s  {(args.steps - self.step) / speed / 60:.1f} min left"
            if values["spread"] < 0.4 and self.step > args.warmup_steps:  # healthy runs stay above
                line = f"warning: low spread, the features may have collapsed; {line}"
            line = f"\r\033[K{line[: os.get_terminal_size().columns - 1]}" if live else line  # redrawn in place
            print(line, end="" if live and not finished else "\n", flush=True)
            self.printed, self.printed_step = now, self.step
        if finished or now - self.saved > SAVE_SECONDS:
            if not all(tensor.isfinite().all() for tensor in self.core.state_dict().values()):
                raise FloatingPointError(f"weights are not finite at step {self.step}")
            states = {name: getattr(self, name).state_dict() for name in ("core", "optimizer", "scaler")}
            size = (self.out / "metrics.jsonl").stat().st_size
            self.save("last.pt", states | {"step": self.step, "metrics": size, "settings": self.settings})
            self.saved = now

    def resume(self):
        """Loads last.pt, if there is one; returns the number of steps done and the size of metrics.jsonl then."""
        path, checkpoint = self.out / "last.pt", {"step": 0, "metrics": 0}
        if path.exists():
            try:
                checkpoint = torch.load(path, map_location="cpu", weights_only=True)
                old, new = dict(checkpoint["settings"]), self.settings
            except Exception as error:  # of another program, damaged, or carrying code, which is not run
                raise ValueError(f"expected a checkpoint of train.py, found {path} ({type(error).__name__})") from error
            changes = [f"{name} was {old.get(name)}, is {new[name]}" for name in new if old.get(name) != new[name]]
            if changes:
                raise ValueError(f"{path} has other settings: {'; '.join(changes)}; keep them, or give another --out")
            for name in ("core", "optimizer", "scaler"):
                getattr(self, name).load_state_dict(checkpoint[name])
        return checkpoint["step"], checkpoint["metrics"]

    def finish(self):
        """Probe and picture, before and after training; backbone.pt comes last and marks the run as complete."""
        args, initial, trained = self.args, self.initial.to(self.device), self.core.backbone
        if args.data:
            samples = Samples(self.images, lambda image: ImageOps.fit(image, [2 * args.size] * 2), args.seed, self.out)
            images = torch.stack([v2.functional.pil_to_tensor(samples[n]) for n in range(min(8, args.images))])
        else:
            scenes, held_out = (Scenes(PROBE_SCENES, args.seed, SCENES + n * PROBE_SCENES) for n in (0, 1))
            before, after = (linear_probe(backbone, scenes, held_out) for backbone in (initial, trained))
            print(f"linear probe, mIoU: random initialisation {before:.1f}, pre-trained {after:.1f}")
            images = v2.functional.resize(held_out.images[:8], [2 * args.size])
        save_picture(self.out / "features.png", images, initial, trained)
        if args.heads:
            self.save("heads.pt", trained.state_dict())
        self.save("backbone.pt", trained.body.state_dict())

    def save(self, name, state):
        """torch.save, whole or not at all: written beside and renamed."""
        torch.save(state, buffer := io.BytesIO())  # into a file it would hide the OSError of a full disk
        (self.out / "writing.tmp").write_bytes(buffer.getbuffer())
        os.replace(self.out / "writing.tmp", self.out / name)


def auto_amp(device):
    """bf16 where the hardware computes in it, else fp16 on GPUs, else off."""
    if device.type == "cuda":
        return "bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"
    flags = Path("/proc/cpuinfo").read_text() if device.type == "cpu" and sys.platform == "linux" else ""
    return "bf16" if "avx512_bf16" in flags or "amx_bf16" in flags else "off"


# ------------------------------------ Probe and picture ------------------------------------
@torch.no_grad()
def frozen_features(backbone, images):
    """Maps [N, C, H, W] of images uint8 [N, 3, h, w], in eval mode; of several levels the finest."""
    views = v2.functional.normalize(images.to(next(backbone.parameters()).device) / 255, MEAN, STD)
    maps = [backbone.eval()(batch) for batch in views.split(32)]
    return torch.cat([next(iter(map.values())) if isinstance(map, dict) else map for map in maps])


def linear_probe(backbone, scenes, held_out):
    """Mean IoU in percent, on held_out at full resolution, of a 1x1 convolution fitted to scenes by least squares."""
    features, test = frozen_features(backbone, scenes.images), frozen_features(backbone, held_out.images)
    features, test = (F.pad(maps, (0, 0, 0, 0, 0, 1), value=1.0) for maps in (features, test))  # [N, C + 1, H, W]
    masks = F.one_hot(scenes.masks, len(CLASSES)).permute(0, 3, 1, 2).float()  # [N, h, w] -> [N, 8, h, w]
    shares = F.adaptive_avg_pool2d(masks, features.shape[2:]).to(features.device)  # [N, 8, h, w] -> [N, 8, H, W]
    x, shares = (maps.transpose(0, 1).flatten(1) for maps in (features, shares))  # [C + 1, NHW], [8, NHW]
    gram = x @ x.T  # [C + 1, C + 1]
    gram.diagonal().mul_(1.0001).add_(1e-6)  # a little ridge, for dead channels too
    weight = torch.linalg.solve(gram, x @ shares.T).T[:, :, None, None]  # [C + 1, 8] -> [8, C + 1, 1, 1]
    logits = F.interpolate(F.conv2d(test, weight), held_out.masks.shape[1:], mode="bilinear")  # [N, 8, h, w]
    pairs = len(CLASSES) * held_out.masks + logits.argmax(1).cpu()  # [N, h, w]: true class, predicted class
    confusion = pairs.flatten().bincount(minlength=len(CLASSES) ** 2).view(len(CLASSES), -1)  # [64] -> [8, 8]
    return 100 * (confusion.diag() / (confusion.sum(0) + confusion.sum(1) - confusion.diag())).mean().item()


def save_picture(path, images, *backbones):
    """Images uint8 [N, 3, h, w], and below them each backbone's maps, coloured by three principal components."""
    rows = [images / 255]
    for backbone in backbones:
        maps = frozen_features(backbone, images).cpu().permute(0, 2, 3, 1)  # [N, C, H, W] -> [N, H, W, C]
        left = torch.linalg.svd((maps - maps.mean((0, 1, 2))).flatten(0, 2), full_matrices=False)[0]  # [NHW, C]
        scores = left[:, :3].view(*maps.shape[:3], 3).permute(0, 3, 1, 2)  # [NHW, 3] -> [N, 3, H, W]
        colours = torch.sigmoid(1.3 * scores / scores.std((0, 2, 3), keepdim=True))
        rows.append(F.interpolate(colours, images.shape[2:]))  # [N, 3, H, W] -> [N, 3, h, w]
    save_image(torch.cat(rows), path, nrow=len(images), padding=4, pad_value=1.0)


# ------------------------------------ Command line ------------------------------------
def parse(argv):
    parser = argparse.ArgumentParser(usage="train.py [--data DIR] [flags]", allow_abbrev=False)
    parser.formatter_class = lambda prog: argparse.HelpFormatter(prog, max_help_position=29, width=120)
    add = parser.add_argument
    add("--data", metavar="DIR", help="train on every image below this folder (else on drawn scenes)")
    add("--recipe", choices=["demo", "paper"], help="values of the flags below that name both (paper with --data)")
    add("--out", metavar="DIR", type=Path, help="folder for everything that is written (runs/RECIPE)")
    add("--steps", type=int, metavar="X", help="length of the run, instead of --epochs")
    add("--seed", type=int, metavar="X", default=0, help="of scenes, weights, order, crops, colours (%(default)s)")
    add("--amp", choices=["auto", "bf16", "fp16", "off"], default="auto", help="bf16, fp16 or none (auto)")
    add("--workers", type=int, default=min(8, os.cpu_count() // 2 or 1), help="data processes per rank (%(default)s)")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda, ... (%(default)s)")
    add("--compile", action="store_true", help="run the model through torch.compile")
    add("--heads", action="store_true", help="pre-train also an FPN and a head on a ResNet (--layer is not used)")
    for name, (demo, paper, text) in VALUES.items():
        add(f"--{name.replace('_', '-')}", type=type(demo), metavar="X", help=f"{text} (demo {demo}, paper {paper})")
    args = parser.parse_args(argv)
    recipe = args.recipe or ("paper" if args.data else "demo")
    parser.set_defaults(recipe=recipe, out=Path("runs", recipe), **(DEMO if recipe == "demo" else PAPER))
    return parser, parser.parse_args(argv)


def main(argv=None):
    parser, args = parse(argv)
    try:
        try:
            run = Run(args)
        except (ValueError, RuntimeError, OSError, OverflowError, AssertionError) as error:
            parser.error(str(error).splitlines()[0])
        if run.step < args.steps or not (args.out / "backbone.pt").exists():
            run.train()
            if run.rank == 0:
                run.finish()
    except (KeyboardInterrupt, FloatingPointError, OSError) as error:  # OSError: a full disk, no image
        reason = (str(error) or "interrupted").splitlines()[-1].removeprefix("OSError: ")  # behind a loader's traceback
        sys.exit(f"\ntrain.py: {reason}; the same command continues from what is saved in {args.out}")
    if run.rank == 0:
        print(f"complete: {args.steps} steps; {args.out} has last.pt, backbone.pt, metrics.jsonl and features.png")
    if run.ranks > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
