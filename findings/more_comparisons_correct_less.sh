#!/usr/bin/env bash
# Software: deepsig 1.2.8 (aso, multi_aso), numpy 2.4.6, scipy 1.17.1.
# Expected: the Bonferroni correction, on by default in multi_aso, divides the error by the number n
#   of comparisons: a confidence of 0.95 becomes 1 - 0.05 / n. One comparison needs none.
# Found: it becomes 0.95 + 0.05 / n, which goes the wrong way: 0.967 for 3 comparisons and 0.951 for
#   45, where 0.983 and 0.9989 are meant. For one comparison it is 1.0: of two models multi_aso says
#   1 ("no difference") or NaN, whatever the scores are. There is no warning.
# Why it matters: the package compares networks over seeds, and papers report its numbers. With two
#   models no difference is ever found. With ten models hardly anything is corrected, so chance can
#   pass for a better model.
# Way out: use_bonferroni=False with confidence_level=1 - 0.05 / n; aso without num_comparisons.
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check "deepsig==1.2.8" "numpy==2.4.6" "scipy==1.17.1"
cd "$dir"
"$dir/venv/bin/python" -W ignore - <<'PY'
import numpy as np
from deepsig import aso, multi_aso

rng = np.random.default_rng(0)
a, b = rng.normal(0.6, 1, 12), rng.normal(0, 1, 12)
common = dict(num_bootstrap_iterations=100, show_progress=False, seed=1)

pair = {on: multi_aso([list(a), list(b)], use_bonferroni=on, **common)[0, 1] for on in (False, True)}
single = aso(a, b, **common)
print(f"Two models: {single:.3f} from aso, {pair[False]:.3f} from multi_aso without the correction,")
print(f"{pair[True]:.3f} with it, though one comparison needs none.")
assert abs(single - pair[False]) < 1e-9 and single < 0.9 and pair[True] == 1
best = multi_aso([list(b + 20), list(b)], use_bonferroni=True, **common)
assert not (best[0, 1] < 0.5), best  # 1 or NaN, although one wins always

for n in (2, 3, 45, 1000):
    found = aso(a, b, num_comparisons=n, **common)
    right = aso(a, b, confidence_level=1 - 0.05 / n, **common)
    print(f"{n} comparisons: {found:.3f}, a confidence of {1 - 0.05 / n:.5f} gives {right:.3f}")
    assert abs(found - aso(a, b, confidence_level=0.95 + 0.05 / n, **common)) < 1e-9
    assert found <= right + 1e-9
assert found - single < 0.01 < right - single
PY
