"""FaceScrub as the paper may have used it: 100 identities at 64x64, cropped from images that were downloaded before.

FaceScrub is published as two lists, `facescrub_actors.txt` and `facescrub_actresses.txt`: addresses, face boxes and
checksums. Many addresses are dead, so nothing is downloaded here: an image counts wherever it lies and whatever its
name, if its sha256 is in the lists. The paper names neither its 100 identities nor its split; these are the rules here:

- Identities: the first 100 in alphabetical order over both lists.
- Split: a face is for testing if the published sha256 of its image, read as a number, is divisible by 5.

Both depend on the lists alone, so everybody who has the same images has the same data set.
"""

import hashlib
import json
import os
import shutil
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from PIL import Image
from tqdm import tqdm

from .images import ImageDecodeError, read_image

SIDE = 64
IDENTITIES = 100
LISTS = ("facescrub_actors.txt", "facescrub_actresses.txt")
_COLUMNS = ("name", "image_id", "face_id", "url", "bbox", "sha256")


class Face(NamedTuple):
    """One line of the lists.

    Attributes:
        name: The person.
        face_id: Number of the face, unique for the person.
        box: `(left, top, right, bottom)` in pixels of the image.
        sha256: Of the image file.
    """

    name: str
    face_id: str
    box: tuple[int, int, int, int]
    sha256: str

    @property
    def split(self) -> str:
        """`"test"` for about a fifth of the images, else `"train"`; faces of one image are on the same side."""
        return "test" if int(self.sha256, 16) % 5 == 0 else "train"


def read_lists(folder: Path) -> list[Face]:
    """Read the two published lists.

    Raises:
        ValueError: If one is missing or a line is not as published.
    """
    faces = []
    for path in (folder / name for name in LISTS):
        if not path.is_file():
            raise ValueError(f"{str(folder)!r} lacks {path.name}; expected the published lists {' and '.join(LISTS)}")
        try:
            header, *lines = path.read_text(encoding="utf-8-sig").splitlines() or [""]
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not UTF-8 at byte {error.start}; get the published list again") from None
        if tuple(header.split("\t")) != _COLUMNS:
            raise ValueError(f"{path}: expected the columns {', '.join(_COLUMNS)}, found {header[:80]!r}")
        for number, line in enumerate(lines, 2):
            try:
                name, _, face_id, _, box, sha256 = line.split("\t")
                left, top, right, bottom = map(int, box.split(","))
                int(face_id), int(sha256, 16)
                if len(sha256) != 64:
                    raise ValueError
            except ValueError:
                raise ValueError(f"{path}:{number} is not a line of the published list: {line[:80]!r}") from None
            faces.append(Face(name, face_id, (left, top, right, bottom), sha256.lower()))
    return faces


def prepare(lists: Path, images: Path, output: Path, identities: int = IDENTITIES) -> dict[str, int]:
    """Crop the faces and write them as `train/NAME/FACE.png` and `test/NAME/FACE.png`.

    Args:
        lists: Folder of the two published lists.
        images: Folder of downloaded images, searched at all depths.
        output: New or empty folder; complete or not there at all.
        identities: How many of them.

    Returns:
        Numbers of faces: `published` for these identities, `missing` (no image with the published sha256), `unreadable`
        (no image, or a box outside of it), `train` and `test`. They are in `facescrub.json` too, for each identity.

    Raises:
        ValueError: If the lists are not as published or have too few identities, there is no folder of images, or an
            identity has no face to train or to test on.
        FileExistsError: If `output` holds something.
    """
    if not images.is_dir():
        raise ValueError(f"image folder {str(images)!r} does not exist or is not a folder")
    if identities < 1:
        raise ValueError(f"--identities must be at least 1, not {identities}")
    faces = read_lists(lists)
    chosen = set(sorted({face.name for face in faces})[:identities])
    faces = [face for face in faces if face.name in chosen]
    if len(chosen) < identities:
        raise ValueError(f"the lists have {len(chosen)} identities, not {identities}; choose fewer --identities")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise FileExistsError(f"{str(output)!r} is not empty; choose a new folder")
    by_image = defaultdict(list)
    for face in faces:
        by_image[face.sha256].append(face)
    output = output.resolve()
    partial = output.with_name(f"{output.name}.partial")
    if partial.exists():
        raise FileExistsError(f"{str(partial)!r} is left from an earlier start; remove it, or choose a new folder")
    counts: dict[str, Counter[str]] = {name: Counter() for name in sorted(chosen)}
    for face in faces:
        counts[face.name]["published"] += 1
    try:
        for path in tqdm(list(_files(images)), desc="images", unit="img", disable=None):
            for face in by_image.pop(_sha256(path), ()):
                outcome = face.split if _crop(path, face, partial) else "unreadable"
                counts[face.name][outcome] += 1
        for face in (face for rest in by_image.values() for face in rest):
            counts[face.name]["missing"] += 1
        for name, count in counts.items():
            for split in ("train", "test"):
                if not count[split]:
                    raise ValueError(
                        f"no {split} image of {name!r} in {str(images)!r}: {count['missing']} of its "
                        f"{count['published']} images are missing or changed; find them, or take fewer --identities"
                    )
        rule = {"identities": "first in alphabetical order", "test": "sha256 of the image divisible by 5", "side": SIDE}
        record = {"rule": rule, "faces": counts}
        (partial / "facescrub.json").write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        if output.exists():
            output.rmdir()
        partial.rename(output)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    keys: Sequence[str] = ("published", "missing", "unreadable", "train", "test")
    return {key: sum(count[key] for count in counts.values()) for key in keys}


def _files(folder: Path) -> Iterator[Path]:
    for parent, folders, names in os.walk(folder):
        folders.sort()
        yield from (Path(parent, name) for name in sorted(names))


def _sha256(path: Path) -> str:
    try:
        if not path.is_file():
            return ""  # opening a pipe would wait for ever
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()
    except OSError:
        return ""  # counts as missing


def _crop(path: Path, face: Face, output: Path) -> bool:
    try:
        image = read_image(path)
    except ImageDecodeError:
        return False
    left, top = max(face.box[0], 0), max(face.box[1], 0)
    right, bottom = min(face.box[2], image.width), min(face.box[3], image.height)
    if right <= left or bottom <= top:
        return False
    target = output / face.split / face.name.replace("/", "_").replace(" ", "_") / f"{face.face_id}.png"
    target.parent.mkdir(parents=True, exist_ok=True)
    # Cropped first: with `box`, resize would mix in the pixels around it.
    image.crop((left, top, right, bottom)).resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(target)
    return True
