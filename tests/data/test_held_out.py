"""A held-out part is stratified, fixed by the seed, and shares no content with the training images."""

import json
import shutil

import pytest

from timm_mfd.data import load_dataset
from timm_mfd.data.held_out import split_held_out


@pytest.fixture
def pictures(folder_dataset, tmp_path):
    """Class folders alone, 8 images each, and one picture under two labels."""
    flat = tmp_path / "pictures"
    shutil.copytree(folder_dataset / "train", flat)
    shutil.copy(flat / "ant" / "0.png", flat / "bee" / "same.png")
    return flat


def test_every_class_gives_its_part_and_copies_stay_on_one_side(pictures):
    for seed in range(20):
        data = load_dataset("folder", pictures, val_fraction=0.25, seed=seed)
        assert data.test.labels.bincount().tolist() == [2, 2, 2]
        assert len(data.train) + len(data.test) == 25
        sides = [{path.rsplit("/", 2)[-2:][1] if "same" in path else path.rsplit("/", 1)[-1] for path in images.paths}
                 for images in (data.train, data.test)]  # fmt: skip
        copies = [str(pictures / "ant" / "0.png"), str(pictures / "bee" / "same.png")]
        assert len({copy in data.test.paths for copy in copies}) == 1, sides


def test_the_seed_alone_decides(pictures):
    first, again, other = (load_dataset("folder", pictures, val_fraction=0.4, seed=seed) for seed in (3, 3, 4))
    assert first.test.paths == again.test.paths != other.test.paths
    assert first.identity() == again.identity() != other.identity()


def test_a_train_folder_alone_is_split_too_and_a_folder_with_a_held_out_part_is_not(folder_dataset):
    with pytest.raises(ValueError, match=r"has val/ already; leave val_fraction \(--val-fraction\) out"):
        load_dataset("folder", folder_dataset, val_fraction=0.2)
    shutil.rmtree(folder_dataset / "val")
    assert len(load_dataset("folder", folder_dataset, val_fraction=0.25).test) == 6
    with pytest.raises(ValueError, match="expected .* found train/"):
        load_dataset("folder", folder_dataset)


@pytest.mark.parametrize("name", ["validation", "valid"])
def test_other_names_of_the_held_out_split_are_known(folder_dataset, name):
    (folder_dataset / "val").rename(folder_dataset / name)
    assert load_dataset("folder", folder_dataset).test_split == name


def test_mistakes_name_the_flag_and_the_remedy(pictures, tmp_path):
    with pytest.raises(ValueError, match=r"found ant/, bee/, cat/; a val_fraction \(--val-fraction 0.2\) holds out"):
        load_dataset("folder", pictures)
    for fraction in (0.0, 1.0, float("nan")):
        with pytest.raises(ValueError, match=rf"\(--val-fraction\) must be between 0 and 1, not {fraction:g}"):
            load_dataset("folder", pictures, val_fraction=fraction)
    with pytest.raises(ValueError, match="val_fraction .--val-fraction. 0.2 is for 'folder'; 'digits' has its own"):
        load_dataset("digits", val_fraction=0.2)
    for path in list((pictures / "cat").iterdir())[1:]:
        path.unlink()
    with pytest.raises(ValueError, match="class 'cat' has one image, of which nothing can be held out"):
        load_dataset("folder", pictures, val_fraction=0.2)


def test_two_images_of_a_class_are_one_on_each_side(tmp_path):
    for index in range(4):
        (tmp_path / f"{index}").write_text(str(index))
    train, held_out = split_held_out([str(tmp_path / f"{index}") for index in range(4)], list("aabb"), 0.1, seed=0)
    assert len(train) == len(held_out) == 2
    assert {index // 2 for index in held_out} == {0, 1}


def test_evaluating_a_run_finds_the_images_that_it_held_out(pictures, tmp_path, runs_here):
    import evaluate
    import train

    train.main(
        train.Args(
            model="test_resnet", epochs=1, batch_size=8, lr=0.01, workers=0, dataset="folder", output_dir="run", seed=3,
            data_dir=str(pictures), val_fraction=0.3,
        )
    )  # fmt: skip
    evaluate.main(evaluate.Args(model="run", json=tmp_path / "top1.json"))
    measured = json.loads((tmp_path / "top1.json").read_text())
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert {key: measured[key] for key in ("top1", "count", "split", "data")} == {
        key: summary[key] for key in ("top1", "count", "split", "data")
    }
