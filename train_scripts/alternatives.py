"""Other ways to write Eq. 5, to which the benchmark compares timm_mfd."""

import torch
from torch import Tensor


def straightforward(x: Tensor) -> Tensor:
    """Eq. 5 as one writes it down: centre, normalise, multiply, and let autograd do the rest."""
    z = x.float().transpose(0, 1).flatten(1)
    z = z - z.mean(1, keepdim=True)
    z = z / (z.norm(dim=1, keepdim=True) + 1e-8)
    return _mean_square_off_diagonal(z @ z.T)


def with_corrcoef(x: Tensor) -> Tensor:
    """Eq. 5 through torch.corrcoef."""
    return _mean_square_off_diagonal(torch.corrcoef(x.float().transpose(0, 1).flatten(1)))


def _mean_square_off_diagonal(r: Tensor) -> Tensor:
    return (r - torch.diag(r.diagonal())).square().sum() / (len(r) * (len(r) - 1))
