#!/usr/bin/env bash
# Software: scikit-learn 1.9.1 (decomposition.PCA), numpy 2.4.6, scipy 1.17.1.
# Expected: PCA centres its input, so a constant added to all columns changes nothing but mean_, and
#   ten times as many rows from one source give about the same variances.
# Found: with 10 or more rows per column (and at most 1000 columns) the default solver multiplies the
#   raw columns and subtracts the means afterwards, in the type of the input. For float32 with a mean
#   far above the spread little is left: here the first variance is twice too large, and whitening
#   makes one column a million times too large or more. With one row less all is right. The
#   documentation of this solver says "on centered data", and warns of small singular values only.
# Why it matters: raw counts of 16-bit cameras, depth, temperatures and nearly collapsed features look
#   like this, and float32 is what networks give. Explained variance, the number of components for
#   90 % and whitened features are wrong, without a warning. A small test with few rows is right.
# Way out: subtract the mean first, or convert to float64, or svd_solver="full".
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check \
    "scikit-learn==1.9.1" "numpy==2.4.6" "scipy==1.17.1"
"$dir/venv/bin/python" -W error - <<'PY'
import numpy as np
from sklearn.decomposition import PCA

# Patches of 8 x 8 pixels from a thermal camera: 16-bit counts of 0.01 kelvin, 295 K, spread 1 K.
rng = np.random.default_rng(0)
size = 64
y, x = np.meshgrid(np.fft.fftfreq(size), np.fft.fftfreq(size), indexing="ij")
patches = []
for _ in range(320):
    noise = np.fft.fft2(rng.standard_normal((size, size)))
    field = np.fft.ifft2(noise / np.sqrt(0.01 + x**2 + y**2)).real
    image = (29500 + 100 * field / field.std()).round().astype(np.uint16)
    patches.append(image.reshape(8, 8, 8, 8).transpose(0, 2, 1, 3).reshape(64, 64))
patches = np.concatenate(patches)
print(f"{patches.shape[0]} patches of {patches.shape[1]} values, mean {patches.mean():.0f}, spread {patches.std():.0f}")


def fit(data, name, **options):
    """The ratio of the first variance to the right one, and the largest spread after whitening."""
    right = PCA(svd_solver="full").fit(data.astype(np.float64)).explained_variance_
    pca = PCA(whiten=True, **options).fit(data)
    ratio = pca.explained_variance_[0] / right[0]
    spread = pca.transform(data).std(axis=0).max()
    print(f"{len(data)} rows, {name}: first variance {ratio:.4f} of the right one,", end=" ")
    print(f"largest spread of a whitened column {spread:.4g}")
    return ratio, spread


def fine(result):
    return abs(result[0] - 1) < 1e-3 and abs(result[1] - 1) < 1e-2


raw = patches.astype(np.float32)  # no rounding: float32 holds every 16-bit number
mean = patches.mean(axis=0)
assert np.array_equal(raw, patches)
assert fine(fit(raw[:639], "float32"))
few = fit(raw[:640], "float32")
many = fit(raw, "float32")
assert not fine(few)
assert abs(many[0] - 1) > 0.1 and many[1] > 1e3
assert fine(fit((patches - mean).astype(np.float32), "float32, mean subtracted"))
assert fine(fit(raw.astype(np.float64), "float64"))
assert fine(fit(raw, "float32, solver full", svd_solver="full"))
PY
