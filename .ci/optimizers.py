"""Measures README's table of optimizers: 320 steps on the demo's scenes, then the linear probe.

    OMP_NUM_THREADS=1 python .ci/optimizers.py adamw 10        an optimizer below, a seed

README uses the seeds 10, 11 and 12, which no other table uses. LARS runs with the schedule of
train.py, the others with PyTorch's OneCycleLR, as in README's loop. All compute in bf16.
"""

import sys
from pathlib import Path

import torch
from torch.utils.data import DataLoader

sys.path.insert(0, str(Path(__file__).parents[1]))

import train
from pixpro import Backbone, PixPro, TwoViews, momentum_at

STEPS, BATCH = 320, 32
RATES = {  # of matrices and of vectors
    "lars": (4.0, 4.0),
    "lars-slow-vectors": (4.0, 0.05),
    "adamw": (1e-3, 1e-1),
    "adamw-one-rate": (1e-3, 1e-3),
    "sgd": (1.0, 1.0),
}


def main(name, seed):
    torch.manual_seed(seed)
    model = PixPro(Backbone("resnet18", "layer3")).to(memory_format=torch.channels_last)
    parameters = [p for p in model.parameters() if p.requires_grad]
    matrices = {"params": [p for p in parameters if p.dim() > 1]}
    vectors = {"params": [p for p in parameters if p.dim() == 1]}
    rates = RATES[name]
    if name.startswith("lars"):
        optimizer = train.LARS([matrices, vectors], lr=1.0)

        def factor(step):
            return train.lr_at(step, STEPS, STEPS // 4, peak=1.0, floor=0)

        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, [lambda step, rate=rate: rate * factor(step) for rate in rates]
        )
    else:
        kind = torch.optim.AdamW if name.startswith("adamw") else torch.optim.SGD
        options = (
            {} if name.startswith("adamw") else {"lr": 1.0, "momentum": 0.9, "weight_decay": 1e-4}
        )
        optimizer = kind([matrices, vectors], **options)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimizer, rates, STEPS, pct_start=0.25, cycle_momentum=False
        )

    images = train.Scenes(train.SCENES, seed).images
    samples = train.Samples(images, TwoViews(112), seed)
    batches = [range(BATCH * step, BATCH * (step + 1)) for step in range(STEPS)]
    loader = DataLoader(samples, batch_sampler=batches, num_workers=1)
    for step, batch in enumerate(loader):
        model.update_momentum(momentum_at(step, STEPS))
        with torch.autocast("cpu", torch.bfloat16):
            output = model(*batch)
        optimizer.zero_grad()
        (2 * output.loss).backward()  # the rates of LARS belong to twice Eq. 5
        optimizer.step()
        schedule.step()

    scenes = train.Scenes(train.PROBE_SCENES, seed, train.SCENES)
    held_out = train.Scenes(train.PROBE_SCENES, seed, train.SCENES + train.PROBE_SCENES)
    miou = train.linear_probe(model.backbone, scenes, held_out)
    print(
        f"{name}, seed {seed}: mIoU {miou:.1f}, spread {output.spread:.2f}, loss {output.loss:.2f}"
    )


main(sys.argv[1], int(sys.argv[2]))
