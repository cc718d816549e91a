#!/usr/bin/env bash
# Software: pydicom 3.0.2 (pydicom.pixels), numpy 2.4.6.
# Expected: apply_modality_lut gives physical values, and apply_voi_lut (or apply_windowing) maps the
#   window to one range of grey. Equal physical values and an equal window give equal grey.
# Found: the range of grey is that of the stored bits times RescaleSlope plus RescaleIntercept, of
#   each file by itself. Of two slices that hold the same physical values in the same window, with
#   the slopes 0.5 and 2, the second comes out four times as bright. White is 32767.5 in one and
#   131070 in the other. An intercept of -1000 makes black -1000. The documentation of both functions
#   does not say what range they return.
# Why it matters: in PET and some MR series each slice has a slope of its own. Windowed slices then
#   flicker within one volume, and so do those of several scanners within a data set, though the
#   window was meant to remove just that. A fixed division (by 255, by 65535) does not help.
# Way out: clip (value - lower) / (upper - lower) to 0..1 by hand, with the window's two edges.
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check "pydicom==3.0.2" "numpy==2.4.6"
cd "$dir"
"$dir/venv/bin/python" -W error - <<'PY'
import numpy as np
import pydicom
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.pixels import apply_modality_lut, apply_voi_lut
from pydicom.uid import ExplicitVRLittleEndian, PositronEmissionTomographyImageStorage, generate_uid

physical = np.array([[0.0, 100.0, 500.0, 1000.0, 4000.0, 5000.0]])
center, width = 500, 1000


def write(path, slope, intercept):
    """One slice of 16 bits with the physical values above."""
    slice_ = Dataset()
    slice_.file_meta = FileMetaDataset()
    slice_.file_meta.TransferSyntaxUID = ExplicitVRLittleEndian
    slice_.SOPClassUID = slice_.file_meta.MediaStorageSOPClassUID = PositronEmissionTomographyImageStorage
    slice_.SOPInstanceUID = slice_.file_meta.MediaStorageSOPInstanceUID = generate_uid()
    slice_.Modality, slice_.PhotometricInterpretation, slice_.SamplesPerPixel = "PT", "MONOCHROME2", 1
    slice_.Rows, slice_.Columns = physical.shape
    slice_.BitsAllocated, slice_.BitsStored, slice_.HighBit, slice_.PixelRepresentation = 16, 16, 15, 0
    slice_.RescaleSlope, slice_.RescaleIntercept = str(slope), str(intercept)
    slice_.WindowCenter, slice_.WindowWidth = str(center), str(width)
    slice_.PixelData = ((physical - intercept) / slope).astype("<u2").tobytes()
    slice_.save_as(path, enforce_file_format=True)


grey, by_hand = {}, {}
for slope, intercept in ((1, 0), (0.5, 0), (2, 0), (1, -1000)):
    write("slice.dcm", slope, intercept)
    data = pydicom.dcmread("slice.dcm")
    values = apply_modality_lut(data.pixel_array, data)
    assert np.array_equal(values, physical)
    grey[slope, intercept] = apply_voi_lut(values, data)[0]
    by_hand[slope, intercept] = np.clip((values - (center - width / 2)) / width, 0, 1)[0]
    print(f"slope {slope}, intercept {intercept}: physical {values[0].tolist()}, windowed {grey[slope, intercept].round(1).tolist()}")

one = grey[1, 0]
assert one[0] == 0 and one[-1] == 65535
assert np.allclose(grey[0.5, 0], one * 0.5) and np.allclose(grey[2, 0], one * 2)
assert np.allclose(grey[1, -1000], one - 1000)
assert all(np.array_equal(values, by_hand[1, 0]) for values in by_hand.values())
PY
