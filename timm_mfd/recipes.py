"""The runs of Tables II, IV, V and VI as data, each with the paper's accuracy, and the protocols they are run under."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from types import MappingProxyType
from typing import Literal, NamedTuple

from .arguments import Args
from .criteria import CriterionName
from .models import Stem, paper_stem


@dataclass(frozen=True)
class Protocol:
    """How a run is trained: SGD with momentum 0.9, random crops after padding by 4, and flips.

    Attributes:
        summary: What it is for.
        epochs: Passes over the training images.
        milestones: Epochs after which the learning rate drops to a tenth; None: it falls along a cosine.
        warmup_epochs: Epochs in which it first rises.
        label_smoothing: Probability that is shared among all classes, with softmax.
        cutmix: Alpha of CutMix, with softmax.
        lr: Learning rate at the start.
        weight_decay: Weight decay of all parameters.
        batch_size: Images per step.
    """

    summary: str
    epochs: int
    milestones: tuple[int, ...] | None
    warmup_epochs: int = 0
    label_smoothing: float = 0.0
    cutmix: float = 0.0
    lr: float = 0.1
    weight_decay: float = 5e-4
    batch_size: int = 128

    @property
    def rates(self) -> str:
        """The learning rate in words."""
        if self.milestones is None:
            return f"lr {self.lr:g}, along a cosine after {self.warmup_epochs} epochs of warm-up"
        return f"lr {self.lr:g}, x 0.1 after {', '.join(map(str, self.milestones))}"


PROTOCOLS: Mapping[str, Protocol] = MappingProxyType(
    {
        "paper": Protocol("Section IV of the paper", epochs=100, milestones=(30, 60, 90)),
        # Does MFD still help on top of what regularizes small images today, within half the paper's epochs?
        "strong": Protocol(
            "a recipe of today for small images: cosine, warm-up, label smoothing, CutMix",
            epochs=50,
            milestones=None,
            warmup_epochs=5,
            label_smoothing=0.1,
            cutmix=1.0,
        ),
        "quick": Protocol("the paper's in a tenth of the epochs: a trial, no reproduction", 10, milestones=(3, 6, 9)),
    }
)


class DataSize(NamedTuple):
    """What a data set holds (Section IV-A).

    Attributes:
        side: Of its images, in pixels.
        classes: Number of classes.
        train: Number of training images.
        test: Number of test images.
    """

    side: int
    classes: int
    train: int
    test: int


DATA_SIZES: Mapping[str, DataSize] = MappingProxyType(
    {
        "cifar10": DataSize(32, 10, 50_000, 10_000),
        "cifar100": DataSize(32, 100, 50_000, 10_000),
        "tiny_imagenet": DataSize(64, 200, 100_000, 10_000),
        "facescrub": DataSize(64, 100, 15_896, 3_896),
        "digits": DataSize(8, 10, 1_437, 360),
    }
)
MODELS: Mapping[str, str] = MappingProxyType(
    {
        "resnet50": "resnet50_mfd",
        "resnext50": "resnext50_32x4d_mfd",
        "densenet121": "densenet121_mfd",
        "mobilenetv2": "mobilenetv2_100_mfd",
        "resnet18": "resnet18_mfd",
    }
)


@dataclass(frozen=True)
class Recipe:
    """One run: one cell of a table.

    Attributes:
        backbone: A key of `MODELS`.
        dataset: A key of `DATA_SIZES`.
        criterion: The classification loss.
        mfd_weight: Balance factor lambda of Eq. 7; 0 is the baseline.
        tables: Where it stands in the paper, or a key of `TABLES` that is ours.
        accuracy: The paper's top-1 in percent, a mean of three runs; None for what the paper has not.
        mfd_center: The mean in Eq. 6, see `MFDLoss`.
    """

    backbone: str
    dataset: str
    criterion: CriterionName
    mfd_weight: float
    tables: tuple[str, ...]
    accuracy: float | None
    mfd_center: Literal["channel", "position"] = "channel"

    @property
    def id(self) -> str:
        """What it is called, such as `resnet50/cifar100/softmax+mfd`; a weight other than 1 follows `mfd`."""
        if self.mfd_weight == 0:
            return self.baseline
        weight = "" if self.mfd_weight == 1 else f"{self.mfd_weight:g}"
        return f"{self.baseline}+mfd{weight}" + ("" if self.mfd_center == "channel" else f"_{self.mfd_center}")

    @property
    def variant(self) -> str:
        """What sets its MFD apart from the paper's usual one, to be appended to a name; mostly nothing."""
        weight = "" if self.mfd_weight in (0, 1) else f", MFD x {self.mfd_weight:g}"
        return weight + ("" if self.mfd_center == "channel" else ", mean per position")

    @property
    def baseline(self) -> str:
        """The id of the same run without MFD."""
        return f"{self.backbone}/{self.dataset}/{self.criterion}"

    def name(self, protocol: str) -> str:
        """Return the id with the protocol, which is left out if it is the paper's; `find` reads it."""
        return self.id if protocol == "paper" else f"{self.id}@{protocol}"

    @property
    def stem(self) -> Stem:
        """The stem of its model."""
        return paper_stem(MODELS[self.backbone], DATA_SIZES[self.dataset].side)

    def arguments(self, protocol: str = "paper", seed: int = 0) -> Args:
        """Return the arguments of the training script.

        Args:
            protocol: A key of `PROTOCOLS`.
            seed: The run's seed.

        Example:
            >>> find("resnet50/cifar100/softmax+mfd")[0].arguments().epochs
            100
        """
        how = PROTOCOLS[protocol]
        return Args(
            recipe=self.name(protocol),
            model=MODELS[self.backbone],
            stem=self.stem,
            dataset=self.dataset,
            criterion=self.criterion,
            mfd_weight=self.mfd_weight,
            mfd_center=self.mfd_center,
            epochs=how.epochs,
            batch_size=how.batch_size,
            lr=how.lr,
            schedule="step" if how.milestones else "cosine",
            milestones=how.milestones,
            warmup_epochs=how.warmup_epochs,
            label_smoothing=how.label_smoothing if self.criterion == "softmax" else 0.0,
            cutmix=how.cutmix if self.criterion == "softmax" else 0.0,
            weight_decay=how.weight_decay,
            seed=seed,
        )


_SOFTMAX_AND_MFD: dict[str, dict[str, tuple[float, float]]] = {  # Tables IV (ResNet50) and V
    "resnet50": {
        "cifar10": (93.25, 93.98), "cifar100": (76.42, 79.18), "tiny_imagenet": (62.10, 64.06),
        "facescrub": (90.56, 94.63),
    },
    "resnext50": {
        "cifar10": (94.05, 94.61), "cifar100": (78.57, 79.71), "tiny_imagenet": (64.23, 65.63),
        "facescrub": (93.36, 95.09),
    },
    "densenet121": {
        "cifar10": (95.01, 95.57), "cifar100": (79.91, 80.54), "tiny_imagenet": (64.73, 65.59),
        "facescrub": (95.61, 96.27),
    },
    "mobilenetv2": {
        "cifar10": (84.31, 86.63), "cifar100": (52.41, 54.99), "tiny_imagenet": (46.34, 49.14),
        "facescrub": (87.84, 90.32),
    },
}  # fmt: skip
_TABLE_2: dict[float, float] = {0.01: 76.91, 0.1: 78.27, 10.0: 76.86, 100.0: 72.20}  # the other two are in Table IV
_TABLE_6: dict[CriterionName, tuple[float, float]] = {
    "center": (92.82, 94.11),
    "am_softmax": (93.60, 94.47),
    "arcface": (93.93, 94.89),
}
# Tables I and III: mean |r| of stages 0 to 4 of ResNet50 on CIFAR-100.
CORRELATIONS: Mapping[str, tuple[float, ...]] = MappingProxyType(
    {
        "resnet50/cifar100/softmax": (0.189, 0.142, 0.120, 0.053, 0.094),
        "resnet50/cifar100/softmax+mfd": (0.007, 0.015, 0.034, 0.031, 0.013),
    }
)


def _all() -> list[Recipe]:
    recipes = []
    for backbone, rows in _SOFTMAX_AND_MFD.items():
        own = "4" if backbone == "resnet50" else "5"
        for dataset, (without, with_mfd) in rows.items():
            in_table_2 = (backbone, dataset) == ("resnet50", "cifar100")
            in_ours = (backbone, dataset) == ("mobilenetv2", "cifar100")
            accuracies = {0.0: without, 1.0: with_mfd} | (_TABLE_2 if in_table_2 else {})
            for weight, accuracy in sorted(accuracies.items()):
                tables = ("2",) * in_table_2 + (own,) * (weight in (0, 1)) + ("weights",) * in_ours
                recipes.append(Recipe(backbone, dataset, "softmax", weight, tables, accuracy))
    for criterion, pair in _TABLE_6.items():
        for weight, accuracy in zip((0.0, 1.0), pair, strict=True):
            recipes.append(Recipe("resnet50", "facescrub", criterion, weight, ("6",), accuracy))
    return recipes


PAPER_RECIPES: tuple[Recipe, ...] = tuple(_all())
_OWN = (
    Recipe("mobilenetv2", "cifar100", "softmax", 1.0, ("eq6",), 54.99, mfd_center="position"),
    Recipe("mobilenetv2", "cifar100", "softmax", 0.1, ("weights",), None),
    Recipe("mobilenetv2", "cifar100", "softmax", 10.0, ("weights",), None),
    Recipe("mobilenetv2", "tiny_imagenet", "softmax", 1.0, ("eq6",), 49.14, mfd_center="position"),
    Recipe("resnet18", "cifar100", "softmax", 0.0, ("resnet18",), None),
    Recipe("resnet18", "cifar100", "softmax", 1.0, ("resnet18",), None),
    Recipe("resnet18", "digits", "softmax", 0.0, ("digits",), None),
    Recipe("resnet18", "digits", "softmax", 1.0, ("digits",), None),
)
RECIPES: Mapping[str, Recipe] = MappingProxyType({recipe.id: recipe for recipe in (*PAPER_RECIPES, *_OWN)})

TABLES: Mapping[str, str] = MappingProxyType(
    {
        "2": "Table II: balance factor, ResNet50 on CIFAR-100",
        "4": "Table IV: ResNet50",
        "5": "Table V: other networks",
        "6": "Table VI: losses for faces, ResNet50 on FaceScrub",
        "eq6": "Table V with the other reading of Eq. 6: one mean per channel and position",
        "weights": "Balance factor as in Table II, MobileNetV2 on CIFAR-100 (not in the paper)",
        "resnet18": "ResNet-18 on CIFAR-100 (not in the paper)",
        "digits": "Trial on scikit-learn's digits (not in the paper)",
    }
)

OPEN_CHOICES: Mapping[str, str] = MappingProxyType(
    {
        "Mean in Eq. 6": "one number per channel, over batch, height and width (the other: --mfd-center position, "
        "table eq6)",
        "Stages": "0 to 4, each with weight lambda; they end where timm's feature_info says: DenseNet's before the "
        "transitions, MobileNetV2's after blocks 0, 1, 2, 4 and 6",
        "Normalisation": "mean and standard deviation of the training images; FaceScrub: 0.5 and 0.5",
        "Scale s of AM-Softmax and ArcFace": "30, the value of the AM-Softmax paper, for both",
        "Center Loss": "lambda 0.003 and alpha 0.5, the values of its paper; centres start at 0",
        "Reported accuracy": "of the last epoch; the best one would be chosen on the test images",
        "SGD": "no Nesterov, weight decay on all parameters, incomplete last batch of an epoch left out",
        "Initial weights": "timm's; a new 3x3 stem convolution is drawn as the other convolutions of its network, and "
        "MobileNetV2's classifier as torchvision's (standard deviation 0.01): timm's is wide for few classes, and its "
        "first loss is 5 in place of log(10)",
        "ResNeXt50": "32x4d",
        "Tables I and III": "mean |r| over the off-diagonal pairs, on 1,000 held-out images, evenly spaced",
        "FaceScrub": "the first 100 of its identities in alphabetical order; an image is for testing if its published "
        "sha256 is divisible by 5 (train_scripts/prepare_facescrub.py)",
    }
)


def check_data(dataset: str, classes: int, train: int, test: int) -> None:
    """Refuse a data set that is not the one of the recipes.

    Nobody can have exactly the paper's FaceScrub images, so of that one only the classes are counted.

    Args:
        dataset: A key of `DATA_SIZES`.
        classes: Its number of classes.
        train: Its number of training images.
        test: Its number of test images.

    Raises:
        ValueError: If it has another size.
    """
    wanted = DATA_SIZES[dataset]
    if dataset == "facescrub" and classes != wanted.classes:
        raise ValueError(
            f"facescrub has {classes} identities here, the recipes need {wanted.classes}; "
            "train_scripts/prepare_facescrub.py makes them"
        )
    if dataset != "facescrub" and (classes, train, test) != wanted[1:]:
        raise ValueError(
            f"{dataset} has {classes} classes, {train:,} training and {test:,} test images here, the recipes need "
            f"{wanted.classes}, {wanted.train:,} and {wanted.test:,}; the data set must be whole"
        )


def find(name: str) -> tuple[Recipe, str]:
    """Find a recipe by its id, with the protocol after `@`.

    Args:
        name: Such as `resnet50/cifar100/softmax+mfd` or `resnet50/cifar100/softmax+mfd@strong`.

    Returns:
        The recipe and the name of the protocol, `"paper"` if none is given.

    Raises:
        ValueError: If there is no such recipe or protocol.
    """
    recipe_id, _, protocol = name.partition("@")
    if recipe_id not in RECIPES:
        close = get_close_matches(recipe_id, RECIPES, n=2)
        hint = f"did you mean {' or '.join(close)}?" if close else "reproduce.py list names all"
        raise ValueError(f"unknown recipe {recipe_id!r}; {hint}")
    if (protocol or "paper") not in PROTOCOLS:
        raise ValueError(f"unknown protocol {protocol!r} of recipe {name!r}; choose one of {', '.join(PROTOCOLS)}")
    return RECIPES[recipe_id], protocol or "paper"


def select(table: str | None = None, rows: Sequence[str] = ()) -> list[Recipe]:
    """Select recipes by table and by the beginning of their ids.

    Args:
        table: A key of `TABLES`. Default: all tables of the paper.
        rows: Beginnings of ids, in whole words: `mobilenetv2/tiny_imagenet`. Without a table, recipes beside the
            paper's are found as well. Default: all.

    Returns:
        At least one recipe, in the order of the rows, or else of the tables.

    Raises:
        ValueError: If there is no such table, or none for one of the rows.

    Example:
        >>> [recipe.id for recipe in select("5", ["mobilenetv2/cifar10"])]
        ['mobilenetv2/cifar10/softmax', 'mobilenetv2/cifar10/softmax+mfd']
    """
    if table is not None and table not in TABLES:
        raise ValueError(
            f"unknown table {table!r}; choose one of {', '.join(TABLES)} (I and III are measured on runs of 2)"
        )
    everything = RECIPES.values() if rows else PAPER_RECIPES
    recipes = [r for r in RECIPES.values() if table in r.tables] if table else everything
    starts = [f"{row.rstrip('/')}/" for row in rows]
    for row, start in zip(rows, starts, strict=True):
        if not any(f"{recipe.id}/".startswith(start) for recipe in recipes):
            names = ", ".join(dict.fromkeys(f"{recipe.backbone}/{recipe.dataset}" for recipe in recipes))
            raise ValueError(f"no row {row!r} in {TABLES[table] if table else 'the tables'}; there are {names}")
    in_order = (recipe for start in starts or [""] for recipe in recipes if f"{recipe.id}/".startswith(start))
    return list(dict.fromkeys(in_order))
