#!/usr/bin/env bash
# Software: opencv-python-headless 5.0.0.93, rasterio 1.4.4; astropy 8.0.2, nibabel 5.4.2, numpy 2.4.6.
# Expected: a function that takes a numpy array takes its numbers, or raises if it cannot.
# Found: OpenCV and rasterio.warp.reproject look at the kind and the size of the numbers in an array,
#   not at the order of their bytes. astropy gives big-endian arrays (dtype >i2, >f4) for FITS files,
#   as nibabel does for MGH files. numpy calculates with them as usual; for the other two 1 is 256.
#   What they return is of native order, so nothing after them notices; torch.from_numpy would raise.
# Why it matters: augmentation often resizes with OpenCV before anything reaches torch. A smooth
#   picture becomes noise of the right shape and type, one of floats mostly 1e-41. Not all are spoilt:
#   astropy gives native arrays for uint16 and for compressed files, and so does nibabel's get_fdata().
# Way out: array.astype(array.dtype.newbyteorder("=")) right after reading.
# Date: 2026-11-29.
set -euo pipefail
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --disable-pip-version-check "opencv-python-headless==5.0.0.93" \
    "rasterio==1.4.4" "astropy==8.0.2" "nibabel==5.4.2" "numpy==2.4.6"
cd "$dir"
"$dir/venv/bin/python" - <<'PY'
import cv2
import nibabel
import numpy as np
from astropy.io import fits
from rasterio.transform import Affine
from rasterio.warp import Resampling, reproject

pixels = np.array([[1, 2, 255], [256, 1000, 4095]])


def from_fits(kind, compressed=False):
    """Writes the pixels as FITS and reads them."""
    hdu = fits.CompImageHDU if compressed else fits.ImageHDU
    fits.HDUList([fits.PrimaryHDU(), hdu(pixels.astype(kind))]).writeto("image.fits", overwrite=True)
    return fits.getdata("image.fits", 1)


def from_mgh(kind):
    """Writes the pixels as MGH and reads them."""
    nibabel.save(nibabel.MGHImage(pixels.astype(kind)[..., None], np.eye(4)), "image.mgz")
    return np.asarray(nibabel.load("image.mgz").dataobj)[..., 0]


def resized(array):
    """OpenCV, to the size that the array has."""
    return cv2.resize(array, array.shape[::-1], interpolation=cv2.INTER_NEAREST)


def warped(array):
    """rasterio, to the place where the array is."""
    out, place = np.zeros(array.shape, array.dtype.newbyteorder("=")), Affine(1, 0, 0, 0, -1, 0)
    crs = {"src_crs": "EPSG:3857", "dst_crs": "EPSG:3857", "resampling": Resampling.nearest}
    reproject(np.ascontiguousarray(array), out, src_transform=place, dst_transform=place, **crs)
    return out


def check(name, array, spoilt):
    """Compares what comes back with what went in, before and after the way out."""
    assert np.array_equal(array, pixels) and array.max() == 4095
    assert array.dtype.isnative != spoilt
    for function in (resized, warped):
        result = function(array)
        native = function(array.astype(array.dtype.newbyteorder("=")))
        print(f"{name} ({array.dtype.str}) {array[1].tolist()}, {function.__name__}: {result.dtype.str} {result[1].tolist()}")
        assert result.dtype == native.dtype and result.dtype.isnative
        assert np.array_equal(native, pixels)
        assert np.array_equal(result, native.byteswap() if spoilt else pixels)


check("FITS int16", from_fits("i2"), spoilt=True)
check("FITS float32", from_fits("f4"), spoilt=True)
check("FITS uint16", from_fits("u2"), spoilt=False)
check("FITS int16, compressed", from_fits("i2", compressed=True), spoilt=False)
check("MGH int16", from_mgh("i2"), spoilt=True)
PY
