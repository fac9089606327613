"""The data of a run, with the preprocessing of the weights that it starts from."""

from dataclasses import replace

from timm.data import DEFAULT_CROP_PCT

from ..arguments import Args
from ..data import ImageData, load_dataset
from ..models import preprocessing_of


def load_data(args: Args) -> tuple[Args, ImageData, str]:
    """Open the data set of a run.

    A run that starts from weights, or from a saved model, takes over how their images were prepared: mean and standard
    deviation of the pixels, and for images of several sizes the size, unless one is given.

    Args:
        args: Arguments of the run.

    Returns:
        The arguments, with the image size that was taken over, the data set, and in words what was taken from where.

    Raises:
        ValueError: As `load_dataset`.
        ImageDecodeError: As `load_dataset`.
    """
    is_saved = ":" in args.model
    own = preprocessing_of(args.model) if args.pretrained or is_saved else None
    if own and args.image_size is None and (args.dataset == "folder" or args.dataset.startswith("hfds/")):
        args = replace(args, image_size=max(own.input_size[1:]))
    data = load_dataset(
        args.dataset, args.data_dir, args.image_size,
        val_fraction=args.val_fraction, seed=args.seed, cache_dir=args.cache_dir, workers=args.workers,
    )  # fmt: skip
    if args.augment == "timm":
        data = data.cropped(own.crop_pct if own else DEFAULT_CROP_PCT)
    if own is None:
        return args, data, ""
    mean, std = ((*values,) * (3 // len(values)) for values in (own.mean, own.std))  # some have one for all channels
    data = replace(data, mean=mean, std=std)
    height, width = data.image_size
    shown_mean, shown_std = (" ".join(f"{value:.4g}" for value in values) for values in (mean, std))
    words = f"as {args.model} takes them: images of {width}x{height}, mean {shown_mean}, std {shown_std}"
    return args, data, words
