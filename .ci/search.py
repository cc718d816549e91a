"""Looks for what PixPro and PixContrast lack: the demo recipe with one change, then the probe.

    OMP_NUM_THREADS=1 python .ci/search.py pixpro crop0.2 20      objective, change, seed

The seed is of scenes that no table in README uses. With a folder of photographs as a fourth
argument the run is only pre-trained; its backbone.pt is left in runs/search for the probe.
A row goes to .ci/results/search.jsonl. Those there are of an AMD EPYC that computes in bf16, one
thread, torch 2.15.0, 2026-11-21.
"""

import functools
import json
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))

import pixpro
import train

ROOT = Path(__file__).parents[1]
# Each change: flags of train.py, or a value of the program in place of its own.
CHANGES = {
    "none": [],
    "lr2": ["--lr", "2"],
    "lr8": ["--lr", "8"],
    "m0.97": [],
    "m0.95": [],
    "crop0.2": [],
    "map10": ["--size", "160"],
    "T0.35": ["--threshold", "0.35"],
    "T1": ["--threshold", "1"],
    "gamma1": ["--gamma", "1"],
    "gamma4": ["--gamma", "4"],
    "tau0.2": ["--temperature", "0.2"],
    "width512": ["--hidden-dim", "512"],
    "images2048": [],
}


def main(objective, change, seed, data=None):
    if change.startswith("m0"):
        train.momentum_at = functools.partial(pixpro.momentum_at, base=float(change[1:]))
    if change.startswith("crop"):
        train.TwoViews = functools.partial(pixpro.TwoViews, scale=(float(change[4:]), 1.0))
    if change.startswith("images"):
        train.SCENES = int(change[6:])

    out = ROOT / "runs/search" / f"{objective}-{change}-{seed}{'-photographs' if data else ''}"
    flags = ["--recipe", "demo", "--objective", objective, "--seed", seed, "--steps", "320"]
    flags += ["--workers", "1", "--out", str(out), *CHANGES[change]]
    flags += ["--data", data] if data else []
    train.main(flags)
    row = {"objective": objective, "change": change, "seed": int(seed)}
    record = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    row |= {name: round(record[name], 4) for name in ("loss", "similarity", "positives", "spread")}
    if data:
        row["images"] = "photographs"
    else:
        backbone = pixpro.Backbone("resnet18", "layer3")
        backbone.body.load_state_dict(torch.load(out / "backbone.pt", weights_only=True))
        scenes = train.Scenes(train.PROBE_SCENES, int(seed), train.SCENES)
        held_out = train.Scenes(train.PROBE_SCENES, int(seed), train.SCENES + train.PROBE_SCENES)
        row["miou"] = round(train.linear_probe(backbone, scenes, held_out), 1)
    results = ROOT / ".ci/results/search.jsonl"
    results.parent.mkdir(exist_ok=True)
    with open(results, "a") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
