"""The pretrained tags: one table, from which timm's configurations are made and weights are found."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from timm.models import generate_default_cfgs

from .download import download_weights
from .saved import WEIGHTS, check_sha256

_PACKAGE = Path(__file__).parents[1]
_DEFAULT = "cifar100"  # the tag that an architecture's name alone stands for


@dataclass(frozen=True)
class Pretrained:
    """What belongs to one `arch.tag`.

    Attributes:
        arguments: Arguments of the architecture that the weights were trained with. timm reads no configuration for a
            tag, so that they stand here.
        preprocessing: Entries of timm's configuration, such as `input_size`, `mean` and `std`.
        recipe: The run that makes such weights, for those that are not published.
        repo: Where they are published on the Hub; None: they are not.
        commit: Its 40 digits.
        file: Or where they lie inside this package.
        sha256: Of the weights.
    """

    arguments: dict[str, Any]
    preprocessing: dict[str, Any] = field(default_factory=dict)
    recipe: str | None = None
    repo: str | None = None
    commit: str | None = None
    file: str | None = None
    sha256: str | None = None

    @property
    def published(self) -> bool:
        """Whether there are weights."""
        return bool(self.file or self.repo)

    def weights(self, cache_dir: str | Path | None = None) -> Path:
        """Return the checked file of the weights.

        Args:
            cache_dir: Where the Hub's cache is. Default: the Hub's.

        Raises:
            ValueError: If the weights are not the ones that were published, or the package lacks them.
            ConnectionError: If they are not here and the Hub cannot be reached.
        """
        if self.file:
            path = _PACKAGE / self.file
            if not path.is_file():
                raise ValueError(f"the installed timm_mfd lacks {self.file}; install it again")
        else:
            assert self.repo is not None
            assert self.commit is not None
            path = download_weights(self.repo, self.commit, cache_dir)
        check_sha256(path, self.sha256)
        return path


def _planned(arch: str, dataset: str, stem: str, num_classes: int, side: int) -> Pretrained:
    short = arch.removesuffix("_mfd").replace("mobilenetv2_100", "mobilenetv2").replace("resnext50_32x4d", "resnext50")
    return Pretrained(
        arguments={"stem": stem, "num_classes": num_classes},
        preprocessing={"input_size": (3, side, side), "crop_pct": 1.0},
        recipe=f"{short}/{dataset}/softmax+mfd",
    )


_PLANNED = {
    f"{arch}.{dataset}": _planned(arch, dataset, "imagenet" if arch == "mobilenetv2_100_mfd" else stem, classes, side)
    for arch in ("resnet50_mfd", "resnext50_32x4d_mfd", "densenet121_mfd", "mobilenetv2_100_mfd")
    for dataset, stem, classes, side in (
        ("cifar10", "cifar", 10, 32),
        ("cifar100", "cifar", 100, 32),
        ("tiny_imagenet", "small", 200, 64),
        ("facescrub", "small", 100, 64),
    )
}
# Weights that are there, each as the row that `train_scripts/publish.py --push` or `train_scripts/embed.py` prints.
_AVAILABLE: dict[str, Pretrained] = {
    "mobilenetv2_100_mfd.cifar100": Pretrained(
        arguments={
            "stem": "imagenet",
            "num_classes": 100,
        },
        preprocessing={
            "input_size": (3, 32, 32),
            "mean": (0.5071, 0.4865, 0.4409),
            "std": (0.2673, 0.2564, 0.2762),
            "crop_pct": 1.0,
            "interpolation": "bicubic",
        },
        file="weights/mobilenetv2_100_mfd.cifar100.safetensors",
        sha256="f06a6d48fadd3099603e1d38498aac8e37c5f2a2f376aa3740ce0824e9501b60",
    ),
}
PRETRAINED = _PLANNED | _AVAILABLE


def default_tag(arch: str) -> str:
    """Return the tag that an architecture's name alone stands for: CIFAR-100's, whatever else is published.

    Raises:
        ValueError: If there are no such weights.
    """
    if not _has_default(arch):
        raise ValueError(unpublished(arch, PRETRAINED.get(f"{arch}.{_DEFAULT}")))
    return _DEFAULT


def _has_default(arch: str) -> bool:
    entry = PRETRAINED.get(f"{arch}.{_DEFAULT}")
    return entry is not None and entry.published


def unpublished(name: str, entry: Pretrained | None) -> str:
    """Say that there are no weights, which there are instead, and how to train them."""
    others = [other for other, row in PRETRAINED.items() if row.published]
    own = [other for other in others if other.partition(".")[0] == name.partition(".")[0]]
    instead = f"; there are those of {', '.join(own or others)}" if others else ""
    flags = f"--recipe {entry.recipe} --data-dir DIR" if entry and entry.recipe else f"--model {name}"
    return (
        f"{name!r} has no published weights yet{instead}; train its own with the training script of timm_mfd: {flags}"
    )


def default_cfgs(*names: str, first_conv: str, classifier: str) -> dict[str, Any]:
    """Return what timm's registry is to know about architectures and their tags.

    Args:
        *names: Architectures of one module.
        first_conv: Key of the convolution that reads the image; timm adapts it to other numbers of channels.
        classifier: Key of the classifier; timm adapts it to other numbers of classes.
    """
    layers = {"first_conv": first_conv, "classifier": classifier}
    cfgs = {name: imagenet_cfg() | layers for name in names}
    for tagged, entry in PRETRAINED.items():
        if tagged.partition(".")[0] not in names:
            continue
        cfgs[tagged] = imagenet_cfg() | layers | entry.preprocessing
        cfgs[tagged]["num_classes"] = entry.arguments["num_classes"]
        cfgs[tagged]["pool_size"] = None  # of other images than ImageNet's
        if entry.file:
            cfgs[tagged]["file"] = str(_PACKAGE / entry.file)
        elif entry.repo:
            cfgs[tagged] |= {"hf_hub_id": f"{entry.repo}@{entry.commit}", "hf_hub_filename": WEIGHTS}
    # What a name alone stands for is the last with timm's mark, a star; else it would be the first tag with weights.
    for name in names:
        default = f"{name}.{_DEFAULT}" if _has_default(name) else name
        cfgs[f"{default}*" if "." in default else f"{default}.*"] = cfgs.pop(default)
    return generate_default_cfgs(cfgs)


def imagenet_cfg() -> dict[str, Any]:
    """Return timm's preprocessing defaults for a model without weights."""
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, 224, 224),
        "pool_size": (7, 7),
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.485, 0.456, 0.406),
        "std": (0.229, 0.224, 0.225),
        "license": "apache-2.0",
    }
