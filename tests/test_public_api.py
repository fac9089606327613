"""What `import timm_mfd` offers, and what it must not drag in."""

import subprocess
import sys

import pytest

import timm_mfd

PROMISED = {
    "create_model", "forward_stages", "channel_correlation", "mfd_loss", "MFDLoss", "MFDOutput", "StageOutput",
    "MFDClassificationTask", "list_models", "save_pretrained", "push_to_hub",
}  # fmt: skip
HEAVY = ("accelerate", "tyro", "matplotlib", "sklearn", "scipy", "datasets")


def heavy_imports_of(statement: str) -> str:
    code = f"import sys\n{statement}\nprint(*[name for name in {HEAVY} if name in sys.modules])"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def test_import_drags_in_no_script_dependency():
    assert heavy_imports_of("import timm_mfd") == ""


@pytest.mark.parametrize("name", HEAVY)
def test_the_import_check_can_fail(name):
    assert name in heavy_imports_of(f"import timm_mfd, {name}").split()


def test_promised_names_exist():
    public = {name for name in dir(timm_mfd) if not name.startswith("_")}
    modules = {name for name in public if type(getattr(timm_mfd, name)).__name__ == "module"}
    assert public - modules == PROMISED


def test_public_objects_are_documented():
    for name in PROMISED:
        assert getattr(timm_mfd, name).__doc__, name
