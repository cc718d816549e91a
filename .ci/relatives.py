"""Pre-trains DenseCL, VADeR or MCL, as they stand in chapter 8 of tutorial.ipynb, on photographs.

    OMP_NUM_THREADS=1 python .ci/relatives.py densecl adamw 1e-3 1600 DIR runs/densecl

The words: method, optimizer (lars, sgd or adamw), peak rate, steps, folder of photographs, new
folder for the results. The batch is 32, the rate rises and falls as in the demo recipe, and m is
0.99 (MCL: as in PixPro). Every 400 steps, and at the end, backbone-STEP.pt is written and the loss
is measured on eight batches of views that were not trained on. metrics.jsonl gets the mean loss of
every ten steps.
"""

import copy
import json
import math
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

from photographs import tutorial

import train
from pixpro import Backbone, TwoViews, momentum_at

BATCH, EVERY, SEED = 32, 400, 0


def new_model(method):
    chapter = tutorial("imports", "relatives")
    torch.manual_seed(SEED)
    if method == "densecl":
        return chapter["DenseCL"](Backbone("resnet18", "layer3"))
    return chapter["VADeR" if method == "vader" else "MCL"]()


def new_optimizer(name, model, rate):
    parameters = [p for p in model.parameters() if p.requires_grad]
    if name == "lars":
        return train.LARS(parameters, rate)
    if name == "sgd":
        return torch.optim.SGD(parameters, rate, momentum=0.9, weight_decay=1e-4)
    matrices = {"params": [p for p in parameters if p.dim() > 1], "factor": 1}
    vectors = {"params": [p for p in parameters if p.dim() == 1], "factor": 100}
    return torch.optim.AdamW([matrices, vectors], rate)


@torch.no_grad()
def unseen_loss(model, batches):
    model = copy.deepcopy(model)  # as forward changes the queues and BatchNorm's buffers
    losses = []
    for batch in batches:
        with torch.autocast("cpu", torch.bfloat16):
            losses.append(model(*batch).item())
    return sum(losses) / len(losses)


def weights_of(model, method):
    """Those of the ResNet up to layer3, by their names in Backbone.body."""
    network = model.backbone.body if method == "densecl" else model.fpn.body
    names = Backbone("resnet18", "layer3").body.state_dict()
    return {name: weight for name, weight in network.state_dict().items() if name in names}


def main(method, optimizer_name, rate, steps, folder, out):
    rate, steps, out = float(rate), int(steps), Path(out)
    out.mkdir(parents=True)
    model = new_model(method)
    optimizer = new_optimizer(optimizer_name, model, rate)
    images = train.find_images(folder, out)
    size = 128 if method == "mcl" else 112  # maps that can be cut in halves
    samples = train.Samples(images, TwoViews(size), SEED)
    starts = range(0, (steps + 8) * BATCH, BATCH)
    batches = [range(start, start + BATCH) for start in starts]
    loader = iter(torch.utils.data.DataLoader(samples, batch_sampler=batches[8:], num_workers=1))
    eight = torch.utils.data.DataLoader(samples, batch_sampler=batches[:8])
    unseen = list(eight)
    warmup = min(round(5 * len(images) / BATCH), steps // 4)
    guess = 4 * math.log(BATCH) if method == "mcl" else math.log(1025)
    print(f"{method}, {optimizer_name} {rate}: guessing is {guess:.2f}", flush=True)

    began, losses = time.monotonic(), []
    for step, batch in enumerate(loader):
        for group in optimizer.param_groups:
            peak = rate * group.get("factor", 1)
            group["lr"] = train.lr_at(step, steps, warmup, peak)
        model.update_momentum(momentum_at(step, steps) if method == "mcl" else 0.99)
        with torch.autocast("cpu", torch.bfloat16):
            loss = model(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        if (step + 1) % 10 == 0 or step + 1 == steps:
            row = {"step": step + 1, "loss": round(sum(losses) / len(losses), 4)}
            losses.clear()
            if (step + 1) % EVERY == 0 or step + 1 == steps:
                row["unseen"] = round(unseen_loss(model, unseen), 4)
                row["images_per_second"] = round((step + 1) * BATCH / (time.monotonic() - began), 1)
                train.save(out / f"backbone-{step + 1}.pt", weights_of(model, method))
                print(row, flush=True)
            with open(out / "metrics.jsonl", "a") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
