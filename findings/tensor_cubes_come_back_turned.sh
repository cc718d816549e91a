#!/usr/bin/env bash
# Software: pyarrow 26.0.1 (FixedShapeTensorArray), numpy 2.4.6.
# Expected: from_numpy_ndarray and then to_numpy_ndarray give the array back, whatever its strides.
# Found: an array whose axes were moved in a cycle comes back with its axes in another order. If its
#   sides are equal, nothing is said: cubes [N, x, y, z] that are a view of [N, y, z, x] come back as
#   [N, z, x, y]. The writer stores the order of the axes one way round, the reader takes it the
#   other way. The two agree in C order and for two axes that changed places. Sides that differ
#   raise ArrowInvalid, so images [N, C, H, W] that are a view of [N, H, W, C] are noticed.
# Why it matters: volumes of 64 x 64 x 64 voxels are common as training patches, and moveaxis is
#   common before writing. Images and labels that were written in two layouts no longer fit each other,
#   and a model learns from turned labels. Parquet keeps the wrong order.
# Way out: from_numpy_ndarray(np.ascontiguousarray(array)).
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check "pyarrow==26.0.1" "numpy==2.4.6"
cd "$dir"
"$dir/venv/bin/python" -W error - <<'PY'
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


def there_and_back(array):
    column = pa.FixedShapeTensorArray.from_numpy_ndarray(array)
    pq.write_table(pa.table({"cubes": column}), "cubes.parquet")
    return pq.read_table("cubes.parquet")["cubes"].combine_chunks().to_numpy_ndarray()


cubes = np.random.default_rng(1).normal(size=(2, 8, 8, 8))
cases = {
    "as they are": (cubes, True),
    "two axes exchanged": (cubes.swapaxes(1, 2), True),
    "last axis moved to the front": (np.moveaxis(cubes, -1, 1), False),
    "first axis moved to the end": (np.moveaxis(cubes, 1, -1), False),
    "the same as a contiguous copy": (np.ascontiguousarray(np.moveaxis(cubes, -1, 1)), True),
}
for name, (array, wanted) in cases.items():
    back = there_and_back(array)
    same = np.array_equal(back, array)
    print(f"cubes, {name}: {'equal' if same else 'turned'}")
    assert back.shape == array.shape and same == wanted

moved = np.moveaxis(cubes, -1, 1)
assert np.array_equal(there_and_back(moved), moved.transpose(0, 3, 1, 2))
images = np.moveaxis(np.zeros((2, 4, 5, 3), np.uint8), -1, 1)
try:
    pa.FixedShapeTensorArray.from_numpy_ndarray(images).to_numpy_ndarray()
except pa.ArrowInvalid as error:
    print("images of 3 x 4 x 5:", error)
else:
    raise AssertionError("expected an error for sides that differ")
PY
