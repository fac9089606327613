"""A held-out part of images that come without one: stratified, fixed by a seed, and without copies on both sides."""

import hashlib
import os
import random
from collections import Counter, defaultdict
from collections.abc import Sequence


def split_held_out(
    paths: Sequence[str], labels: Sequence[str], fraction: float, seed: int
) -> tuple[list[int], list[int]]:
    """Choose images to be held out.

    Of every class about the fraction is held out, one image at least if it has two. Files of equal content stay
    together, under whatever labels, since a network would be tested on what it was trained on.

    Args:
        paths: One file per image.
        labels: Its class.
        fraction: Between 0 and 1.
        seed: Fixes the choice, together with the order of the paths.

    Returns:
        Positions of the training images and of the held-out ones, each in their order.

    Example:
        >>> train, held_out = split_held_out(["a/1.png", "a/2.png", "b/1.png", "b/2.png"], list("aabb"), 0.5, seed=0)
        >>> len(train), len(held_out)
        (2, 2)
    """
    wanted = {label: min(max(1, round(count * fraction)), count - 1) for label, count in Counter(labels).items()}
    held_out: list[int] = []
    groups = _equal_files(paths)
    random.Random(seed).shuffle(groups)
    for group in groups:
        needed = Counter(labels[index] for index in group)
        if all(wanted[label] >= count for label, count in needed.items()):
            held_out += group
            wanted = {label: count - needed[label] for label, count in wanted.items()}
    chosen = set(held_out)
    return [index for index in range(len(paths)) if index not in chosen], sorted(held_out)


def _equal_files(paths: Sequence[str]) -> list[list[int]]:
    """Return the positions of the files, those of equal content together; only files of equal size are read."""
    by_size = defaultdict(list)
    for index, path in enumerate(paths):
        by_size[os.path.getsize(path)].append(index)
    groups: list[list[int]] = []
    for same_size in by_size.values():
        by_content = defaultdict(list)
        for index in same_size:
            by_content[_content(paths[index]) if same_size[1:] else ""].append(index)
        groups += by_content.values()
    return sorted(groups)


def _content(path: str) -> str:
    with open(path, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()
