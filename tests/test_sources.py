"""Where a model that a script is given comes from."""

import pytest

from timm_mfd.sources import source_of


def test_a_folder_is_suggested_for_its_own_name_and_not_for_what_is_above_it(tmp_path):
    for name in ("venv", "digits_mfd"):
        (tmp_path / name).mkdir()
    with pytest.raises(ValueError, match=r"no run or saved model .*/digit_mfd'; did you mean .*/digits_mfd\?"):
        source_of(str(tmp_path / "digit_mfd"))
    with pytest.raises(ValueError, match="no run or saved model .*/nope'; for a model of the Hub write hf-hub"):
        source_of(str(tmp_path / "nope"))
