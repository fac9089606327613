"""What a look at some image files says of all of them, before a run trains on something else than its user sees."""

from collections.abc import Sequence

import numpy as np

from .images import open_image

_LOOKED_AT = 32
_ORIENTATION = 0x0112  # of EXIF
_NOTED_IN_FRONT = ("JPEG", "MPO", "WEBP")  # formats whose EXIF is read without decoding the picture


def remarks(paths: Sequence[str]) -> list[str]:
    """Look at some image files, evenly spaced, for what reading them will not show as a person sees it.

    Args:
        paths: Image files; those that cannot be read are left to the decoder to name.

    Returns:
        A sentence for each: an orientation that is not applied, and 16-bit images of which the upper bits are unused.
    """
    chosen = paths[:: max(1, len(paths) // _LOOKED_AT)]
    turned, largest = [], {}
    for path in chosen:
        try:
            with open_image(path) as image:
                if image.format in _NOTED_IN_FRONT and image.getexif().get(_ORIENTATION, 1) != 1:
                    turned.append(path)
                if image.mode.startswith("I;16"):
                    largest[path] = int(np.array(image).max())
        except Exception:  # decoding will name it
            continue
    found = []
    if turned:
        found.append(
            f"{len(turned)} of {len(chosen)} images that were looked at, such as {turned[0]}, are turned by a note in "
            "the file (EXIF), which is not applied here; if they are to be upright, turn the pixels first"
        )
    if largest and max(largest.values()) < 1 << 12:
        path = max(largest, key=largest.__getitem__)
        found.append(
            f"the 16-bit images, such as {path}, have no value above {largest[path]:,} of 65,535 and are nearly black: "
            "of 16 bits the upper 8 are read; scale them to the full range first"
        )
    return found
