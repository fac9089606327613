"""What `import timm_mfd` offers, and what it must not drag in."""

import subprocess
import sys

import pytest

import timm_mfd

PROMISED = {
    "create_model", "forward_stages", "channel_correlation", "mfd_loss", "MFDLoss", "MFDOutput", "StageOutput",
    "MFDClassificationTask", "list_models", "save_pretrained", "push_to_hub", "with_stages", "LossOutput",
}  # fmt: skip
HEAVY = ("accelerate", "tyro", "matplotlib", "sklearn", "scipy", "datasets")


CHECK = """
import importlib, os, sys, timm_mfd
sys.path.insert(0, "stand_ins")
for more in (None, *sys.argv[1:]):
    if os.fork():
        os.wait()
    else:
        if more:
            importlib.import_module(more)
        print(more, *[name for name in sys.argv[1:] if name in sys.modules], flush=True)
        os._exit(0)
"""


@pytest.fixture(scope="module")
def heavy_imports(tmp_path_factory):
    """Which heavy packages are imported in a new interpreter by timm_mfd, and by timm_mfd and then one of them.

    The latter are empty modules of the same names, which are found once timm_mfd is there.
    """
    folder = tmp_path_factory.mktemp("imports")
    (folder / "stand_ins").mkdir()
    for name in HEAVY:
        (folder / "stand_ins" / f"{name}.py").touch()
    command = [sys.executable, "-c", CHECK, *HEAVY]
    lines = subprocess.run(command, capture_output=True, text=True, check=True, cwd=folder).stdout.splitlines()
    return {more: names for more, *names in map(str.split, lines)}


def test_import_drags_in_no_script_dependency(heavy_imports):
    assert heavy_imports["None"] == []


@pytest.mark.parametrize("name", HEAVY)
def test_the_import_check_can_fail(name, heavy_imports):
    assert name in heavy_imports[name]


def test_promised_names_exist():
    public = {name for name in dir(timm_mfd) if not name.startswith("_")}
    modules = {name for name in public if type(getattr(timm_mfd, name)).__name__ == "module"}
    assert public - modules == PROMISED == set(timm_mfd.__all__)


def test_public_objects_are_documented():
    for name in PROMISED:
        documented = getattr(timm_mfd, name).__doc__
        assert documented, name
        assert not documented.startswith(f"{name}("), f"{name} has no more than what Python gives a tuple"
