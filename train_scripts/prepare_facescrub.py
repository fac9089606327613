"""Make the data set `facescrub` from the published lists and images that were downloaded before.

python train_scripts/prepare_facescrub.py --lists LISTS --images IMAGES --output data/facescrub
"""

import _extra  # noqa: F401, before what it looks for

# isort: split

from dataclasses import dataclass
from pathlib import Path

import tyro

from timm_mfd.data.facescrub import IDENTITIES, SIDE, prepare
from timm_mfd.launch import one_line_errors


@dataclass(frozen=True)
class Args:
    """What to read and where to write."""

    lists: Path
    """Folder of facescrub_actors.txt and facescrub_actresses.txt."""
    images: Path
    """Folder of downloaded images, in any layout; each is recognised by its sha256."""
    output: Path
    """New folder."""
    identities: int = IDENTITIES
    """How many identities, in alphabetical order."""


def main(args: Args) -> None:
    """Crop, and say how many faces there are."""
    with one_line_errors(ValueError, OSError):
        counts = prepare(args.lists, args.images, args.output, args.identities)
    sizes = f"{counts['train']:,} training and {counts['test']:,} test images of {SIDE}x{SIDE}"
    print(f"{args.identities} identities, {sizes}")
    print(
        f"of {counts['published']:,} published faces {counts['missing']:,} have no image with the published sha256 and "
        f"{counts['unreadable']:,} could not be cropped: {args.output / 'facescrub.json'}"
    )
    print(f"train with --dataset facescrub --data-dir {args.output}")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
