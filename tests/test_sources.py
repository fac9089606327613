"""Where a model that a script is given comes from."""

import json

import pytest

from timm_mfd.sources import source_of, split_seed


def test_a_folder_is_suggested_for_its_own_name_and_not_for_what_is_above_it(tmp_path):
    for name in ("venv", "digits_mfd"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"no run or saved model .*/digit_mfd'; did you mean .*/digits_mfd\?"):
        source_of(str(tmp_path / "digit_mfd"))
    with pytest.raises(ValueError, match="no run or saved model .*/nope'; for a model of the Hub write hf-hub"):
        source_of(str(tmp_path / "nope"))


def test_a_part_that_a_run_held_out_is_found_again_with_its_seed(tmp_path):
    """With another seed most of the images would be such as it was trained on."""
    run = {"dataset": "folder", "data_dir": "images", "image_size": 96, "val_fraction": 0.2, "seed": 7}
    (tmp_path / "args.json").write_text(json.dumps(run))
    assert split_seed(str(tmp_path), 0.2, None) == split_seed(str(tmp_path / "model"), 0.2, None) == 7
    assert split_seed(str(tmp_path), 0.2, 0) == 0
    assert split_seed("resnet18", 0.2, None) == split_seed(str(tmp_path), None, None) == 0
