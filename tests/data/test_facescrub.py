"""FaceScrub: faces are found by checksum, cropped where the list says, and chosen by rules that need the lists only."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from processes import run_python

from timm_mfd.data import load_dataset
from timm_mfd.data.facescrub import LISTS, Face, prepare, read_lists

SCRIPT = Path(__file__).parents[2] / "train_scripts" / "prepare_facescrub.py"
NAMES = ("Zoe Young", "Adam Old", "Bea Middle", "Carl Fourth")
COLUMNS = "name\timage_id\tface_id\turl\tbbox\tsha256"


@pytest.fixture
def published(tmp_path):
    """Lists of four persons with eight images each, and the images under names that say nothing.

    Each image is black with a face of the person's own brightness in a box of 40x40.
    """
    lists, images = tmp_path / "lists", tmp_path / "images"
    lists.mkdir()
    (images / "deep").mkdir(parents=True)
    (images / "notes.txt").write_text("no image of the lists")
    rows = {name: [COLUMNS] for name in LISTS}
    rng = np.random.default_rng(0)
    for person, name in enumerate(NAMES):
        for number in range(8):
            pixels = np.zeros((90, 120, 3), dtype=np.uint8)
            left, top = (int(value) for value in rng.integers(0, 50, 2))
            pixels[top : top + 40, left : left + 40] = 50 + 50 * person
            pixels[-1, -1] = number  # so that no two files are the same
            path = images / ("deep" if number % 2 else ".") / f"{person}{number}.bin"
            Image.fromarray(pixels).save(path, format="PNG")
            checksum = hashlib.sha256(path.read_bytes()).hexdigest()
            box = f"{left},{top},{left + 40},{top + 40}"
            rows[LISTS[person % 2]].append(f"{name}\t{number}\t{100 + number}\thttp://dead/{number}\t{box}\t{checksum}")
    for name, lines in rows.items():
        (lists / name).write_text("\n".join(lines) + "\n")
    return lists, images


def test_faces_are_cropped_where_the_list_says_and_read_as_a_data_set(tmp_path, published):
    counts = prepare(*published, tmp_path / "facescrub", identities=4)
    assert counts["train"] + counts["test"] == counts["published"] == 32
    assert counts["missing"] == counts["unreadable"] == 0
    for root in (tmp_path, tmp_path / "facescrub"):
        data = load_dataset("facescrub", root)
        assert data.class_names == ("Adam_Old", "Bea_Middle", "Carl_Fourth", "Zoe_Young")
        assert (data.name, data.image_size, data.mean, data.flip) == ("facescrub", (64, 64), (0.5, 0.5, 0.5), True)
        assert (len(data.train), len(data.test)) == (counts["train"], counts["test"])
        brightness = {"Zoe_Young": 50, "Adam_Old": 100, "Bea_Middle": 150, "Carl_Fourth": 200}
        for split in (data.train, data.test):
            for index, label in enumerate(split.labels.tolist()):
                # The box and nothing else: the whole face has the person's brightness.
                assert (split[index] == brightness[data.class_names[label]]).all()


def test_identities_are_the_first_in_the_alphabet_and_the_split_goes_by_the_checksum(tmp_path, published):
    prepare(*published, tmp_path / "out", identities=2)
    people = sorted(path.name for path in (tmp_path / "out" / "train").iterdir())
    assert people == ["Adam_Old", "Bea_Middle"]
    for face in read_lists(published[0]):
        if face.name in ("Adam Old", "Bea Middle"):
            split = "test" if int(face.sha256, 16) % 5 == 0 else "train"
            assert (tmp_path / "out" / split / face.name.replace(" ", "_") / f"{face.face_id}.png").is_file()


def test_about_a_fifth_of_all_images_is_for_testing():
    faces = [Face("x", "1", (0, 0, 1, 1), hashlib.sha256(str(i).encode()).hexdigest()) for i in range(5000)]
    assert sum(face.split == "test" for face in faces) == pytest.approx(1000, abs=100)


def test_images_that_are_missing_changed_or_broken_are_counted_and_the_others_stay_where_they_were(tmp_path, published):
    lists, images = published
    prepare(lists, images, tmp_path / "all", identities=4)
    lost = {face.sha256: face for face in read_lists(lists) if face.face_id in ("100", "101")}
    for path in list(images.rglob("*.bin")):
        if hashlib.sha256(path.read_bytes()).hexdigest() in lost:
            path.write_bytes(path.read_bytes() + b"changed")
    counts = prepare(lists, images, tmp_path / "some", identities=4)
    assert counts["missing"] == 8
    assert counts["train"] + counts["test"] == 24
    record = json.loads((tmp_path / "some" / "facescrub.json").read_text())
    assert record["faces"]["Adam Old"]["missing"] == 2
    before, after = (
        {path.relative_to(tmp_path / name) for path in (tmp_path / name).rglob("*.png")} for name in ("all", "some")
    )
    assert after < before
    assert {path.stem for path in before - after} == {"100", "101"}


def test_what_lies_beside_the_output_is_never_removed(tmp_path, published):
    mine = tmp_path / "out.partial" / "mine.txt"
    mine.parent.mkdir()
    mine.write_text("mine")
    with pytest.raises(FileExistsError, match="out.partial' is left from an earlier start; remove it"):
        prepare(*published, tmp_path / "out", identities=2)
    assert mine.read_text() == "mine"


def test_an_output_that_is_a_link_to_an_empty_folder_is_filled(tmp_path, published):
    (tmp_path / "disk").mkdir()
    (tmp_path / "out").symlink_to(tmp_path / "disk")
    prepare(*published, tmp_path / "out", identities=2)
    assert len(list((tmp_path / "disk" / "train").iterdir())) == 2


def test_a_file_that_is_no_image_counts_as_unreadable(tmp_path, published):
    lists, images = published
    (images / "page.html").write_text("404, but published so")
    checksum = hashlib.sha256(b"404, but published so").hexdigest()
    with (lists / LISTS[0]).open("a") as file:
        file.write(f"Adam Old\t9\t900\thttp://dead\t0,0,5,5\t{checksum}\n")
    assert prepare(lists, images, tmp_path / "out", identities=4)["unreadable"] == 1


def test_the_script_says_what_it_found(tmp_path, published):
    words = (SCRIPT, "--lists", published[0], "--images", published[1], "--output", tmp_path / "out", "--identities", 4)
    done = run_python(*words)
    assert done.returncode == 0, done.stderr
    assert "4 identities, " in done.stdout
    assert "of 32 published faces 0 have no image" in done.stdout
    assert f"--dataset facescrub --data-dir {tmp_path / 'out'}" in done.stdout
    again = run_python(*words)
    assert again.returncode == 1
    assert again.stderr.endswith("is not empty; choose a new folder\n")


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda lists, images: (lists / LISTS[1]).unlink(), f"lacks {LISTS[1]}; expected the published lists"),
        (lambda lists, images: (lists / LISTS[0]).write_text("a\tb\n"), "expected the columns name, image_id, face_id"),
        (
            lambda lists, images: (lists / LISTS[0]).write_text(f"{COLUMNS}\nA B\t1\t1\tu\t1,2,3\tff\n"),
            f"{LISTS[0]}:2 is not a line of the published list: 'A B",
        ),
        (lambda lists, images: [path.unlink() for path in images.rglob("*0.bin")], None),
        (
            lambda lists, images: [path.unlink() for path in images.rglob("1*.bin")],
            "image of 'Adam Old' in .*: 8 of its 8",
        ),
    ],
)
def test_what_cannot_be_prepared_is_named_and_leaves_nothing(tmp_path, published, spoil, message):
    spoil(*published)
    if message is None:  # some missing images are no error
        prepare(*published, tmp_path / "out", identities=2)
        return
    with pytest.raises(ValueError, match=message):
        prepare(*published, tmp_path / "out", identities=2)
    assert {path.name for path in tmp_path.iterdir()} == {"lists", "images"}
    with pytest.raises(ValueError, match="--identities must be at least 1, not 0"):
        prepare(*published, tmp_path / "out", identities=0)
    with pytest.raises(ValueError, match=r"the lists have 4 identities, not 100|lacks|columns|:2 is not"):
        prepare(*published, tmp_path / "out")


def test_images_of_another_size_are_no_facescrub(folder_dataset):
    with pytest.raises(ValueError, match="facescrub: images are 16x16, expected 64x64; .*prepare_facescrub.py"):
        load_dataset("facescrub", folder_dataset)
    with pytest.raises(ValueError, match="facescrub: expected .* to hold train/ and val/, .* or test/"):
        load_dataset("facescrub", folder_dataset / "train")
