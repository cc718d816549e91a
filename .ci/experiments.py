"""The experiments of README.md and tutorial.ipynb, and the memory and speed that README states.

python .ci/experiments.py optimizers adamw 10               a name from OPTIMIZERS, a seed
python .ci/experiments.py crops                             README and the tutorial name the others
"""

import argparse
import copy
import json
import pkgutil
import re
import resource
import sys
import time
from pathlib import Path
from timeit import timeit
from types import SimpleNamespace

import numpy as np
import torch
from PIL import Image
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR
from torch.utils.data import DataLoader
from torchvision.transforms import v2

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from pixpro import Backbone, PixPro, TwoViews, bin_centres, momentum_at, positive_pairs

ROOT = Path(__file__).parents[1]
BATCH = 32  # as in the demo
SGD = {"lr": 1.0, "momentum": 0.9, "weight_decay": 1e-4}
LARS = {"lr": 4.0, "momentum": 0.9, "weight_decay": 1e-5}
OPTIMIZERS = {  # name: class, options of the matrices, options of the vectors; lr is the peak
    "lars": ("train.LARS", LARS, LARS),
    "lars-slow-vectors": ("train.LARS", LARS, LARS | {"lr": 0.05}),
    "lars-timm": ("timm.optim.Lars", LARS, LARS),
    "lars-timm-vectors": ("timm.optim.Lars", LARS, LARS | {"weight_decay": 0}),
    "lars-lightly": ("lightly.utils.lars.LARS", LARS, LARS),
    "lars-lightly-vectors": ("lightly.utils.lars.LARS", LARS, LARS | {"weight_decay": 0}),
    "adamw": ("torch.optim.AdamW", {"lr": 1e-3}, {"lr": 0.1}),
    "adamw-one-rate": ("torch.optim.AdamW", {"lr": 1e-3}, {"lr": 1e-3}),
    "sgd": ("torch.optim.SGD", SGD, SGD),
}
COLOURS = {  # of LabelMeFacade's labels; all other pixels are "various" and do not count
    "building": (128, 0, 0),
    "car": (128, 0, 128),
    "door": (128, 128, 0),
    "pavement": (128, 128, 128),
    "road": (128, 64, 0),
    "sky": (0, 128, 128),
    "vegetation": (0, 128, 0),
    "window": (0, 0, 128),
}


def optimizer_of(model, name):
    """With a group of matrices and a group of vectors, told apart as in train.LARS."""
    kind, of_matrices, of_vectors = OPTIMIZERS[name]
    matrices = {"params": [p for p in model.parameters() if p.squeeze().dim() > 1]}
    vectors = {"params": [p for p in model.parameters() if p.squeeze().dim() <= 1]}
    groups = [matrices | of_matrices, vectors | of_vectors]
    return pkgutil.resolve_name(kind)(groups, lr=1.0)


def optimizers(name, seed, steps=320):
    """The demo with another optimizer, in bf16, then the linear probe."""
    seed, steps = int(seed), int(steps)
    torch.manual_seed(seed)
    model = PixPro(Backbone("resnet18", "layer3")).to(memory_format=torch.channels_last)
    optimizer = optimizer_of(model, name)
    if "lars" in name:  # the schedule of train.py
        schedule = LambdaLR(optimizer, lambda k: train.lr_at(k, steps, steps // 4, 1.0, floor=0))
    else:  # as in README's loop
        rates = [group["lr"] for group in optimizer.param_groups]
        schedule = OneCycleLR(optimizer, rates, steps, pct_start=0.25, cycle_momentum=False)
    samples = train.Samples(train.Scenes(train.SCENES, seed).images, TwoViews(112), seed)
    batches = [range(BATCH * k, BATCH * (k + 1)) for k in range(steps)]
    for k, batch in enumerate(DataLoader(samples, batch_sampler=batches, num_workers=1)):
        model.update_momentum(momentum_at(k, steps))
        with torch.autocast("cpu", torch.bfloat16):
            output = model(*batch)
        optimizer.zero_grad()
        (2 * output.loss).backward()  # the rates of LARS belong to twice Eq. 5
        optimizer.step()
        schedule.step()
    fit = train.Scenes(train.PROBE_SCENES, seed, train.SCENES)
    test = train.Scenes(train.PROBE_SCENES, seed, train.SCENES + train.PROBE_SCENES)
    miou = train.linear_probe(model.backbone, fit.images, fit.masks, test.images, test.masks)
    print(f"{name} {seed}: mIoU {miou:.1f}, spread {output.spread:.2f}, loss {output.loss:.2f}")


def tutorial(*tags):
    """What the cells of tutorial.ipynb with these tags define; needs matplotlib."""
    names = {}
    for cell in json.loads((ROOT / "tutorial.ipynb").read_text())["cells"]:
        if set(tags) & set(cell["metadata"].get("tags", [])):
            exec("".join(cell["source"]), names)
    return names


def append(path, row):
    print(row, flush=True)
    with open(path, "a") as file:
        file.write(json.dumps(row) + "\n")


def facade(folder, names, size=(192, 256)):
    """Photographs and labels of these names: images uint8 [N, 3, h, w], masks [N, h, w]."""
    images, masks = [], []
    for name in names:
        image = Image.open(folder / "images" / f"{name}.jpg").convert("RGB")
        image = image.resize(size[::-1], Image.BILINEAR)
        label = Image.open(folder / "labels" / f"{name}.png").convert("RGB")
        label = np.asarray(label.resize(size[::-1], Image.NEAREST))  # [h, w, 3]
        mask = np.full(size, 255)
        for number, colour in enumerate(COLOURS.values()):
            mask[(label == colour).all(2)] = number
        images.append(v2.functional.pil_to_tensor(image))
        masks.append(torch.from_numpy(mask))
    return SimpleNamespace(images=torch.stack(images), masks=torch.stack(masks))


def photographs(*words):
    """The linear probe on LabelMeFacade, or fine-tuning; a row each in results/photographs.jsonl.

    test: fit on train.txt, test on test.txt; search: fit on 60 of train.txt, test on its others.
    With --labels, all layers and an FCN head are trained for 300 steps on so many of those to fit.
    A backbone is a file, "random SEED" or "random, blocks on SEED".
    """
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("kind", choices=["search", "test"])
    parser.add_argument("backbones", nargs="+")
    parser.add_argument("--labels", type=int)
    parser.add_argument("--rate", type=float, default=3e-3, help="of fine-tuning")
    parser.add_argument("--seed", type=int, default=0, help="of the head, the choice and the order")
    args = parser.parse_args(words)
    chapter = tutorial("imports", "photographs")
    lists = [(args.folder / f"{name}.txt").read_text().split() for name in ("train", "test")]
    fit, test = [[Path(name).stem for name in names] for names in lists]
    if args.kind == "search":
        fit, test = fit[:60], fit[60:]
    if args.labels:
        fit = np.random.default_rng(args.seed).permutation(fit)[: args.labels]
    fit, test = facade(args.folder, fit), facade(args.folder, test)
    classes = len(COLOURS)
    for word in args.backbones:
        row = {"kind": args.kind, "backbone": word}
        backbone, began = backbone_of(word), time.monotonic()
        if args.labels:
            row |= {"labels": args.labels, "rate": args.rate, "seed": args.seed}
            weights = backbone.body.state_dict()
            network = chapter["fine_tuned"](weights, fit, classes, 300, args.rate, args.seed)
            miou = train.mean_iou(chapter["segmented"](network, test.images), test.masks, classes)
        else:
            miou = train.linear_probe(backbone, fit.images, fit.masks, test.images, test.masks)
        row |= {"miou": round(miou, 1), "seconds": round(time.monotonic() - began)}
        append(ROOT / ".ci/results/photographs.jsonl", row)


def backbone_of(word):
    kind, _, seed = word.rpartition(" ")
    torch.manual_seed(int(seed) if kind else 0)
    backbone = Backbone("resnet18", "layer3")
    if not kind:
        backbone.body.load_state_dict(torch.load(word, weights_only=True))
    return train.with_blocks_on(backbone) if kind == "random, blocks on" else backbone


def relatives(method, optimizer, rate, steps, folder, out):
    """Pre-trains densecl, vader or mcl, of chapter 9 of the tutorial, on photographs.

    The rate rises and falls as in the demo, and m is 0.99 (MCL: as in PixPro). metrics.jsonl has
    the mean loss of ten steps and, every 400 steps, of eight batches that are not trained on.
    """
    steps, out = int(steps), Path(out)
    out.mkdir(parents=True)
    name = {"densecl": "DenseCL", "vader": "VADeR", "mcl": "MCL"}[method]
    kind = tutorial("imports", "relatives")[name]
    torch.manual_seed(0)
    model = kind(Backbone("resnet18", "layer3")) if method == "densecl" else kind()
    network = model.online["backbone" if method == "densecl" else "fpn"].body
    optimizer = optimizer_of(model, optimizer)
    groups = optimizer.param_groups
    peaks = [float(rate) * group["lr"] / groups[0]["lr"] for group in groups]
    names, _ = train.find_images(folder)
    size = 128 if method == "mcl" else 112  # maps that can be cut in halves
    samples = train.Samples(names, TwoViews(size), 0, folder)
    batches = [range(BATCH * k, BATCH * (k + 1)) for k in range(8 + steps)]
    loader = enumerate(DataLoader(samples, batch_sampler=batches[8:], num_workers=1), 1)
    unseen = list(DataLoader(samples, batch_sampler=batches[:8]))  # seeds, so after the loader
    warmup = min(round(5 * len(names) / BATCH), steps // 4)
    losses = []
    for step, batch in loader:
        for group, peak in zip(groups, peaks):
            group["lr"] = train.lr_at(step - 1, steps, warmup, peak)
        model.update_momentum(momentum_at(step - 1, steps) if method == "mcl" else 0.99)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if step % 10 == 0 or step == steps:
            row = {"step": step, "loss": round(np.mean(losses[-10:]).item(), 4)}
            if step % 400 == 0 or step == steps:
                row["unseen"] = round(unseen_loss(model, unseen), 4)
                weights = {n: w for n, w in network.state_dict().items() if "layer4" not in n}
                train.save(out / f"backbone-{step}.pt", weights)
            append(out / "metrics.jsonl", row)


def unseen_loss(model, batches):
    model = copy.deepcopy(model)  # as forward changes the queues and BatchNorm's buffers
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        return np.mean([model(*batch).item() for batch in batches]).item()


def crops(count=20_000):
    """Which pixels of 7 x 7 have a positive, over pairs of crops of a 500 x 375 image."""
    torch.manual_seed(0)
    image = torch.empty(3, 375, 500)  # only its size is used
    draw = v2.RandomResizedCrop.get_params  # as in TwoViews.crop; mirroring changes no share
    drawn = [draw(image, (0.08, 1.0), (3 / 4, 4 / 3)) for _ in range(2 * count)]
    top, left, height, width = torch.tensor(drawn).float().T
    boxes = torch.stack([left, top, left + width, top + height], 1)  # [2 * count, 4]
    box_1, box_2 = boxes.split(count)
    centres, _ = bin_centres(box_1, (7, 7))  # [N, 49, 2]
    low, high = box_2[:, None].split(2, dim=2)  # corners, [N, 1, 2] each
    in_both = ((low <= centres) & (centres <= high)).all(2)  # [N, 49]
    A = positive_pairs(box_1, box_2, (7, 7))  # [N, 49, 49]
    for name, pixels in (("in both views", in_both), ("with a positive", A.any(2))):
        shares = 100 * pixels.float().mean(1)  # [N]
        print(f"{name}: {shares.mean():.2f} ± {shares.std() / count**0.5:.2f} % of the pixels")


def maps(side, images, kind="ImageByImage"):
    """Memory and time of Eq. 1 to 5, forward and backward, on large maps of 256 channels.

    Memory is how far its peak rises, without the maps. kind: README's ImageByImage, or plain.
    """
    side, images, names = int(side), int(images), {"plain": PixPro}
    snippets = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    exec(next(snippet for snippet in snippets if "class ImageByImage" in snippet), names)
    backbone = torch.nn.Identity()  # not called
    backbone.out_channels = 256
    model = names[kind](backbone)

    def run(side, images):
        x_1, x_2, x_prime_1, x_prime_2 = torch.randn(4, images, 256, side, side)
        inputs = (x_1.requires_grad_(), x_2.requires_grad_(), x_prime_1, x_prime_2)
        box = torch.tensor([[0.0, 0.0, 200.0, 200.0]] * images)
        model.pixel_level(*inputs, box, box + 20).loss.backward()

    run(7, 2)  # what the first call of a library takes
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss  # in KiB on Linux
    seconds = timeit(lambda: run(side, images), number=1)
    added = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    added -= 4 * images * 256 * side**2 * 4 / 2**10
    print(f"{kind}, {side} x {side}, {images} images: {added / 2**20:.2f} GiB, {seconds:.1f} s")


def views(folder):
    """Images a second on one core: two views of 224 x 224, decoding included."""
    paths = [str(path) for path in sorted(Path(folder).rglob("*.jpg"))[:200]]
    samples = train.Samples(paths, TwoViews(224), 0, folder="")
    seconds = [timeit(lambda n=n: samples[n], number=1) for n in range(5 * len(paths))]
    print(f"{len(paths) / np.median(np.reshape(seconds, (5, -1)).sum(1)):.0f} images/s")


def mosaics(views, *flags):
    """The demo on mosaics of chapter 11 of the tutorial, with its views and flags of train.py."""
    names = tutorial("imports", "mosaics")
    train.Scenes, train.TwoViews = names["Mosaics"], names[views]
    train.main(flags)


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
