"""Tensors as pictures inside of a page."""

import base64
import io

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..figures.feature_maps import scaled

SIDE = 48  # larger maps are averaged down to this: a page of two models stays below some 10 MB


def sprite(maps: Tensor, columns: int) -> str:
    """Put maps side by side into one grey PNG, each scaled by itself.

    Args:
        maps: `[C, H, W]`.
        columns: Maps per row.

    Returns:
        A data URI. Maps of more than `SIDE` pixels are averaged down.
    """
    size = (min(maps.shape[1], SIDE), min(maps.shape[2], SIDE))
    small = torch.nn.functional.adaptive_avg_pool2d(maps.detach().cpu().float(), size)
    grey = (scaled(small) * 255).round().byte().numpy()
    rows = -(-len(grey) // columns)
    cells = np.zeros((rows * columns, *grey.shape[1:]), np.uint8)
    cells[: len(grey)] = grey
    sheet = cells.reshape(rows, columns, *size).transpose(0, 2, 1, 3).reshape(rows * size[0], columns * size[1])
    return _png(Image.fromarray(sheet))


def thumbnail(image: Tensor) -> str:
    """Return an image `[3, H, W]` in [0, 1] as a data URI, at most 128 pixels wide and high."""
    pixels = (image.detach().cpu().permute(1, 2, 0).clamp(0, 1) * 255).round().byte().numpy()
    picture = Image.fromarray(pixels)
    picture.thumbnail((128, 128))
    return _png(picture)


def thousandths(correlation: Tensor) -> str:
    """Return numbers in [-1, 1] as base64 of little-endian 16-bit integers, in thousandths."""
    return base64.b64encode((correlation * 1000).round().cpu().numpy().astype("<i2").tobytes()).decode()


def _png(picture: Image.Image) -> str:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()
