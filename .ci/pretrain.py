"""A run of train.py that keeps its backbone along the way.

    OMP_NUM_THREADS=1 python .ci/pretrain.py 400 --recipe demo --data DIR --steps 1600 --out runs/x

The first number is the distance in steps; the backbones go to runs/x/backbone-400.pt and so on. All
other words are flags of train.py, and the run is the one that they make, bit for bit.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import train


def main(every, flags):
    save_checkpoint = train.save_checkpoint

    def save_both(out, settings, step, parts):
        save_checkpoint(out, settings, step, parts)
        if step % every == 0:
            weights = parts["model"].backbone.body.state_dict()
            train.save(out / f"backbone-{step}.pt", weights)

    train.save_checkpoint = save_both
    train.SAVE_SECONDS = 0  # every tenth step, so that no multiple is missed
    train.main(flags)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
