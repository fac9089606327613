"""MixUp and CutMix by timm, as a function of (seed, epoch, step)."""

import numpy as np
from timm.data import Mixup
from torch import Tensor


class Mixing:
    """Mix every image of a batch with another one of it, and their labels alike.

    Args:
        num_classes: Number of classes K.
        mixup: Alpha of MixUp; 0 is off.
        cutmix: Alpha of CutMix; 0 is off. With both, every batch takes one of them by chance.
        seed: The run's seed. All processes draw the same, each for its own images.

    Example:
        >>> mixing = Mixing(10, mixup=0.2, cutmix=1.0, seed=0)
        >>> images, targets = mixing(images, labels, epoch=0, step=7)  # targets: [B, K], rows sum to 1
    """

    def __init__(self, num_classes: int, *, mixup: float, cutmix: float, seed: int):
        self.is_on = mixup > 0 or cutmix > 0
        self.seed = seed
        # Labels are smoothed by the criterion.
        self._mix = Mixup(mixup, cutmix, label_smoothing=0.0, num_classes=num_classes) if self.is_on else None

    def __call__(self, images: Tensor, labels: Tensor, epoch: int, step: int) -> tuple[Tensor, Tensor]:
        """Return the mixed batch.

        Args:
            images: `[B, C, H, W]`, B even; changed in place.
            labels: Class indices `[B]`.
            epoch: Number of the epoch.
            step: Number of the step in it.

        Returns:
            The images, and `[B, K]`, or the labels as they are if nothing is to be mixed.
        """
        if self._mix is None:
            return images, labels
        before = np.random.get_state()  # timm draws from numpy's global generator
        np.random.seed(np.random.SeedSequence((self.seed, epoch, step)).generate_state(4))
        try:
            return self._mix(images, labels)
        finally:
            np.random.set_state(before)
