"""What a user can get wrong: it ends in one line that names the culprit, nothing is overwritten, or it simply works."""

import json
import os
import pickle
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import train
from accelerate.state import AcceleratorState
from conftest import write_image
from PIL import Image
from safetensors.torch import save_file
from timm.models import save_for_hf

from timm_mfd import checkpoint
from timm_mfd.arguments import Args
from timm_mfd.data import load_dataset, place

pytestmark = pytest.mark.usefixtures("runs_here")
BASE = Args(model="test_resnet", epochs=1, batch_size=479, lr=0.01, output_dir="run", workers=0)
FOLDER = {"dataset": "folder", "data_dir": "images", "batch_size": 8}
RESUME = {"resume": "auto"}

CHECKPOINT = "checkpoint/state.safetensors"


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("the-bomb-went-off",))


def repaint(path):
    """Other pixels under the same name, size and time."""
    before = os.stat(path)
    write_image(Path(path), colour=200)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert os.stat(path).st_size == before.st_size


def train_first(**change):
    train.main(replace(BASE, **change))
    AcceleratorState._reset_state(reset_partial_state=True)
    Path("run/summary.json").unlink()  # as if it had been cut off


def change_record(**change):
    tensors, record = checkpoint.read(Path("run") / CHECKPOINT)
    for key, value in change.items():
        record[key] = record[key] | value if isinstance(value, dict) else value
    checkpoint.write(Path("run") / CHECKPOINT, tensors, record)


# What is done to the folder of images (train/ and val/, with ant, bee and cat) or to the run before training.


def truncated_jpeg():
    Image.effect_noise((16, 16), 50).convert("RGB").save("images/train/bee/x.jpg")
    whole = Path("images/train/bee/x.jpg").read_bytes()
    Path("images/train/bee/x.jpg").write_bytes(whole[: len(whole) // 2])


def unreadable(patch):
    """Read permissions do not bind an administrator, so the refusal is played."""
    real = Image.open

    def refuse(path, *args, **kwargs):
        if str(path).endswith("bee/3.png"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *args, **kwargs)

    patch.setattr(Image, "open", refuse)


def pickled_model():
    Path("model").mkdir()
    save_for_hf(timm.create_model("test_resnet", num_classes=3), "model", safe_serialization=False)
    Path("model/pytorch_model.bin").write_bytes(pickle.dumps(Bomb()))


def images_of_two_sizes():
    write_image(Path("images/train/cat/big.png"), side=20)


def rename_split(old, new):
    return lambda: Path("images", old).rename(Path("images", new))


def link(name, target):
    return lambda: Path("images", name).symlink_to(target)


def remove_class(split, name):
    def act():
        for file in Path("images", split, name).iterdir():
            file.unlink()

    return act


def add_image(name, side=16):
    def act():
        Path("images", name).parent.mkdir(exist_ok=True)
        write_image(Path("images", name), side)

    return act


def write(name, content):
    def act():
        Path(name).parent.mkdir(parents=True, exist_ok=True)
        Path(name).write_bytes(content)

    return act


def pickle_in_place_of_the_checkpoint():
    train_first()
    torch.save({"state": Bomb()}, Path("run") / CHECKPOINT)


def half_a_checkpoint():
    train_first()
    whole = (Path("run") / CHECKPOINT).read_bytes()
    (Path("run") / CHECKPOINT).write_bytes(whole[: len(whole) // 2])


def foreign_safetensors():
    train_first()
    save_file({"a": torch.zeros(3)}, Path("run") / CHECKPOINT)


MISTAKES = {
    # arguments
    "unknown model": (None, {"model": "resnt18_mfd"}, "unknown model 'resnt18_mfd'; did you mean resnet18_mfd"),
    "stem for a model without": (None, {"model": "resnet18", "stem": "cifar"}, "'resnet18' takes no stem"),
    "unknown data set": (None, {"dataset": "digit"}, "unknown dataset 'digit'; did you mean digits?"),
    "no data folder": (None, {"dataset": "cifar10"}, "needs a data directory (--data-dir)"),
    "missing data folder": (None, {"dataset": "folder", "data_dir": "/no/such"}, "'/no/such' does not exist"),
    "data folder for digits": (None, {"data_dir": "images"}, "'digits' is built in and does not read 'images'"),
    "negative weight": (None, {"mfd_weight": -1.0}, "weight must be a finite number >= 0, not -1"),
    "weight that is no number": (None, {"mfd_weight": float("nan")}, "not nan"),
    "stage that is not there": (None, {"stages": (0, 9)}, "stage index 9 is out of range: the model has stages 0 to 4"),
    "epochs 0": (None, {"epochs": 0}, "--epochs must be at least 1, not 0"),
    "NaN learning rate": (None, {"lr": float("nan")}, "--lr must be a finite number above 0, not nan"),
    "learning rate 0": (None, {"lr": 0.0}, "--lr must be a finite number above 0, not 0"),
    "negative seed": (None, {"seed": -1}, "--seed must be in [0, 2^32), not -1"),
    "batch of one": (None, {"batch_size": 1}, "--batch-size must be at least 2, not 1"),
    "batch larger than the data": (None, {"batch_size": 5000}, "batch size 5000 is larger than the 1437 training"),
    "images too small": (None, {"model": "inception_v3"}, "InceptionV3 does not take images of 8x8"),
    "unpublished weights": (
        None, {"model": "resnet18_mfd", "pretrained": True}, "'resnet18_mfd' has no published weights",
    ),
    "negative weight decay": (None, {"weight_decay": -1.0}, "--weight-decay must be"),
    "moving average of decay 1": (None, {"ema_decay": 1.0}, "--ema-decay must be in [0, 1), not 1.0"),
    "milestones out of order": (None, {"milestones": (5, 3)}, "must be increasing epochs above 0, not 5 3"),
    "milestone 0": (None, {"milestones": (0, 3)}, "--milestones must be increasing epochs above 0, not 0 3"),
    "negative workers": (None, {"workers": -1}, "--workers must be at least 0"),
    "image size 0": (None, {**FOLDER, "image_size": 0}, "--image-size must be at least 1"),
    "tracker that is not installed": (None, {"tracker": "wandb"}, "--tracker wandb is not installed"),
    "fp16 on a CPU": (None, {"mixed_precision": "fp16"}, "fp16 needs a GPU; on a CPU choose bf16 or no"),
    "criterion of other arguments": (
        None, {"criterion": "center", "margin": 0.3}, "margin 0.3 does not apply to the criterion 'center'",
    ),
    "negative interval": (None, {"checkpoint_minutes": -1.0}, "--checkpoint-minutes must be at least 0, not -1"),
    "NaN interval": (None, {"checkpoint_minutes": float("nan")}, "--checkpoint-minutes must be at least 0, not nan"),
    "output folder is a file": (write("run", b"mine"), {}, "--output-dir run is not an empty folder"),
    "output folder holds something": (write("run/note.txt", b"mine"), {}, "--output-dir run is not an empty folder"),
    # images
    "truncated JPEG": (truncated_jpeg, FOLDER, "cannot decode images/train/bee/x.jpg: "),
    "no image": (write("images/train/bee/5.png", b"no image"), FOLDER, "images/train/bee/5.png: not an image"),
    "empty file": (write("images/val/bee/5.png", b""), FOLDER, "images/val/bee/5.png: not an image, it is empty"),
    "dangling link": (link("train/bee/x.png", "nowhere"), FOLDER, "images/train/bee/x.png: No such file"),
    "link to itself": (link("train/bee/x.png", "x.png"), FOLDER, "train/bee/x.png: Too many levels"),
    "named pipe": (lambda: os.mkfifo("images/train/bee/x.png"), FOLDER, "decode images/train/bee/x.png: not a file"),
    "other content of the same size on resume": (
        lambda: (add_image("train/bee/x.bmp")(), train_first(**FOLDER), repaint("images/train/bee/x.bmp")),
        {**RESUME, **FOLDER}, "cannot resume: the data set is not the one that the run began with",
    ),
    "unreadable file": (unreadable, FOLDER, "images/train/bee/3.png: Permission denied"),
    "empty class": (remove_class("train", "bee"), FOLDER, "class 'bee' has images in val/ but none in train/"),
    "class only in val": (add_image("val/dog/1.png"), FOLDER, "class 'dog' is in val/ but not in train/"),
    "no train folder": (rename_split("train", "training"), FOLDER, "to hold train/ and val/, validation/, "),
    "no val folder": (rename_split("val", "later"), FOLDER, "found later/, train/"),
    "two sizes": (images_of_two_sizes, FOLDER, "images/train/cat/big.png is 20x20, the other images are 16x16"),
    # weights and checkpoints
    "pickled model that would run code": (
        pickled_model, {**FOLDER, "model": "local-dir:model", "pretrained": True}, "model",
    ),
    "missing model folder": (None, {"model": "local-dir:nowhere", "pretrained": True}, "nowhere"),
    "missing checkpoint": (None, {"resume": "nowhere"}, "--resume nowhere: no checkpoint there, expected a run folder"),
    "pickle as checkpoint": (
        pickle_in_place_of_the_checkpoint, RESUME, "run/checkpoint/state.safetensors: ",
    ),
    "half a checkpoint": (half_a_checkpoint, RESUME, "state.safetensors: "),
    "foreign checkpoint": (foreign_safetensors, RESUME, "is not a checkpoint of a training run"),
    "checkpoint of another model": (
        lambda: train_first(model="test_efficientnet"),
        RESUME, "--model test_resnet (was test_efficientnet) would change the result",
    ),
    "weights of another model in the checkpoint": (
        lambda: (train_first(model="test_efficientnet"), change_record(args={"model": "test_resnet"})),
        RESUME, "the checkpoint is of another model: state_dict/blocks.0.0.bn1.bias is (16,) there and missing here",
    ),
    "other arguments on resume": (train_first, {**RESUME, "lr": 0.5}, "--lr 0.5 (was 0.01) would change the result"),
    "other world size on resume": (
        lambda: (train_first(), change_record(environment={"processes": 2})),
        RESUME, "cannot resume on another number of processes: 1 now, 2 when the run began; start it as it was",
    ),
    "other device on resume": (
        lambda: (train_first(), change_record(environment={"device_type": "cuda"})),
        RESUME, "cannot resume on another kind of device: cpu now, cuda when the run began",
    ),
    "other data on resume": (
        lambda: (train_first(**FOLDER), add_image("train/bee/new.png")()),
        {**RESUME, **FOLDER}, "cannot resume: the data set is not the one that the run began with",
    ),
    "other classes on resume": (
        lambda: (train_first(**FOLDER), add_image("train/dog/new.png")()),
        {**RESUME, **FOLDER}, "cannot resume: the data set is not the one that the run began with",
    ),
}  # fmt: skip


def contents():
    """All files but the cache of decoded images."""
    return {path: path.read_bytes() for path in Path().rglob("*") if path.is_file() and path.parts[0] != "cache"}


@pytest.mark.filterwarnings("ignore:folder. no class folder")
@pytest.mark.parametrize(("prepare", "change", "words"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_ends_in_one_line_that_names_it_and_nothing_is_overwritten(
    prepare, change, words, folder_dataset, monkeypatch, capsys
):
    if change.get("tracker"):
        monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    if prepare is unreadable:
        prepare(monkeypatch)
    elif prepare:
        prepare()
    before = contents()
    with pytest.raises(SystemExit) as exit_:
        train.main(replace(BASE, **change))
    message = str(exit_.value.code)
    assert ": error: " in message
    assert words in message
    assert "\n" not in message
    assert "Traceback" not in message + capsys.readouterr().err
    after = contents()
    assert {path: after.get(path) for path in before} == before
    assert {path for path in after.keys() - before.keys() if path.name not in ("lock", "lease")} == set()
    assert not Path("the-bomb-went-off").exists()


def test_the_bomb_of_these_tests_is_live():
    pickle.loads(pickle.dumps(Bomb()))
    assert Path("the-bomb-went-off").exists()


GRADIENT = np.arange(256, dtype=np.uint8).reshape(16, 16)
RGB = np.stack([GRADIENT, GRADIENT[::-1], GRADIENT.T], 2)
GREY = np.repeat(GRADIENT[..., None], 3, 2)


def alpha(path):
    Image.fromarray(np.concatenate([RGB, np.full((16, 16, 1), 128, np.uint8)], 2)).save(path)


def grey_with_alpha(path):
    Image.fromarray(GRADIENT).convert("LA").save(path)


def grey(path):
    Image.fromarray(GRADIENT).save(path)


def sixteen_bit(path):
    Image.fromarray(GRADIENT.astype(np.uint16) * 256 + 77).save(path)  # the lower bits are other ones


def palette(path):
    image = Image.fromarray(GRADIENT).convert("P")
    image.save(path, transparency=bytes(range(256)))


def bilevel(path):
    Image.fromarray((GRADIENT > 127).astype(np.uint8) * 255).convert("1").save(path)


def rgb(path):
    Image.fromarray(RGB).save(path)


def cmyk(path):
    Image.fromarray(np.full((16, 16, 3), (200, 100, 50), np.uint8)).convert("CMYK").save(path, quality=100)


WORKS = {
    "alpha": (alpha, "x.png", RGB),
    "grey with alpha": (grey_with_alpha, "x.png", GREY),
    "grey": (grey, "x.png", GREY),
    "16 bits": (sixteen_bit, "x.png", GREY),
    "16 bits TIFF": (sixteen_bit, "x.tiff", GREY),
    "palette with transparency": (palette, "x.png", GREY),
    "two colours": (bilevel, "x.png", np.where(GREY > 127, 255, 0)),
    "CMYK": (cmyk, "x.jpg", np.full((16, 16, 3), (200, 100, 50))),
    "non-ASCII name": (rgb, "ångström 图 🐜.png", RGB),
    "name that is no UTF-8": (rgb, os.fsdecode(b"na\xefve.png"), RGB),
    "upper-case ending": (rgb, "X.PNG", RGB),
}


@pytest.mark.parametrize(("make", "name", "pixels"), WORKS.values(), ids=WORKS.keys())
def test_unusual_images_have_the_pixels_a_viewer_shows(make, name, pixels, folder_dataset):
    make(folder_dataset / "train" / "bee" / name)
    data = load_dataset("folder", folder_dataset)
    index = [os.path.basename(path) for path in data.train.paths].index(name)
    assert np.abs(data.train[index].numpy().astype(int) - pixels.astype(int)).max() <= 2


@pytest.mark.parametrize("loader", ["resident", "workers"])
def test_unusual_images_train_with_the_pixels_a_viewer_shows(loader, folder_dataset, monkeypatch):
    """All kinds in one run; the pixels are those that reach the batches."""
    for number, (make, name, _) in enumerate(WORKS.values()):
        make(folder_dataset / "train" / "bee" / f"{number} {name}")
    trained_on = []
    monkeypatch.setattr(
        train, "place", lambda *args, **kwargs: trained_on.append(place(*args, **kwargs)) or trained_on[0]
    )
    train.main(replace(BASE, **FOLDER, loader=loader))
    assert json.loads(Path("run/summary.json").read_text())["count"] == 12
    files = [os.path.basename(path) for path in load_dataset("folder", folder_dataset).train.paths]
    for number, (_, name, pixels) in enumerate(WORKS.values()):
        seen = trained_on[0].train[files.index(f"{number} {name}")]
        assert np.abs(seen.numpy().astype(int) - pixels.astype(int)).max() <= 2, name


def test_names_of_classes_may_be_any_text(folder_dataset):
    for split in ("train", "val"):
        (folder_dataset / split / "bee").rename(folder_dataset / split / "blåbär 图")
    train.main(replace(BASE, **FOLDER))
    assert json.loads(Path("run/model/config.json").read_text())["label_names"] == ["ant", "blåbär 图", "cat"]


def test_links_to_images_and_folders_elsewhere_work(folder_dataset, tmp_path):
    (folder_dataset / "train" / "bee").rename(tmp_path / "elsewhere")
    (folder_dataset / "train" / "bee").symlink_to(tmp_path / "elsewhere")
    (folder_dataset / "train" / "ant" / "x.png").symlink_to(tmp_path / "elsewhere" / "0.png")
    data = load_dataset("folder", folder_dataset)
    assert len(data.train) == 25


def test_another_number_of_classes_takes_a_new_classifier_on_saved_weights(folder_dataset):
    train.main(replace(BASE, output_dir="digits"))
    AcceleratorState._reset_state(reset_partial_state=True)
    train.main(replace(BASE, **FOLDER, model="local-dir:digits/model", pretrained=True, lr=1e-9))
    first, second = (timm.create_model(f"local-dir:{run}/model", pretrained=True) for run in ("digits", "run"))
    assert (first.num_classes, second.num_classes) == (10, 3)
    torch.testing.assert_close(*(next(model.parameters()) for model in (first, second)))
