"""Zero-pad, crop, flip: against slicing one image at a time, and independent of how an epoch is cut up."""

import numpy as np
import torch
from torchvision.transforms.functional import normalize, to_tensor

from timm_mfd.data.augmentation import crop_and_flip, normalise, plan_epoch, windows


def test_crop_and_flip_match_slicing_a_padded_array():
    pixels = torch.randint(0, 256, (50, 5, 7, 3), dtype=torch.uint8)
    plan = plan_epoch(50, seed=1, epoch=2, pad=4, flip=True)
    out = crop_and_flip(pixels, *windows(plan.top, plan.left, plan.flip, 5, 7), pad=4)
    for i, image in enumerate(pixels.numpy()):
        top, left = int(plan.top[i]), int(plan.left[i])
        window = np.pad(image, ((4, 4), (4, 4), (0, 0)))[top : top + 5, left : left + 7]
        np.testing.assert_array_equal(out[i].numpy(), window[:, ::-1] if plan.flip[i] else window)


def test_choices_are_uniform_and_cover_the_range():
    plan = plan_epoch(9000, seed=0, epoch=0, pad=4, flip=True)
    for offsets in (plan.top, plan.left):
        counts = torch.bincount(offsets, minlength=9)
        assert len(counts) == 9
        assert ((counts > 850) & (counts < 1150)).all()
    assert 0.47 < plan.flip.float().mean() < 0.53
    assert torch.equal(plan.order.sort().values, torch.arange(9000))
    assert not torch.equal(plan.top, plan.left)


def test_a_plan_is_a_function_of_seed_and_epoch():
    plans = {
        key: plan_epoch(100, seed=key[0], epoch=key[1], pad=4, flip=True) for key in ((0, 0), (0, 1), (1, 0), (1, 1))
    }
    again = plan_epoch(100, seed=0, epoch=1, pad=4, flip=True)
    assert all(torch.equal(a, b) for a, b in zip(again, plans[0, 1], strict=True))
    orders = [tuple(plan.order.tolist()) for plan in plans.values()]
    assert len(set(orders)) == 4


def test_without_padding_and_flip_images_are_untouched():
    pixels = torch.randint(0, 256, (6, 4, 4, 3), dtype=torch.uint8)
    plan = plan_epoch(6, seed=0, epoch=0, pad=0, flip=False)
    assert torch.equal(crop_and_flip(pixels, *windows(plan.top, plan.left, plan.flip, 4, 4), pad=0), pixels)


def test_normalise_equals_torchvision_and_is_channels_last():
    pixels = torch.randint(0, 256, (3, 6, 5, 3), dtype=torch.uint8)
    mean, std = (0.1, 0.2, 0.3), (0.4, 0.5, 0.6)
    out = normalise(pixels, torch.tensor(mean), torch.tensor(std))
    expected = torch.stack([normalize(to_tensor(image.numpy()), mean, std) for image in pixels])
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-6)
    assert out.is_contiguous(memory_format=torch.channels_last)
