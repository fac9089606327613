"""Classification losses of Table VI, on the model's own classifier: Center Loss, AM-Softmax, ArcFace.

Softmax loss is `torch.nn.CrossEntropyLoss`. A criterion tells by `reads` what it needs:

- `"logits"` (any other callable too): `criterion(logits, target)`.
- `"cosines"`: `criterion(cosines, target)`, the cosines between embedding and rows of the classifier.
- `"embedding"`: `criterion(logits, target, embedding)`, with what the classifier reads.
"""

import math
from abc import ABC, abstractmethod
from copy import deepcopy
from typing import Literal, get_args

import torch
import torch.distributed as dist
from timm.utils import unwrap_model
from torch import Tensor, nn
from torch.nn import functional

CriterionName = Literal["softmax", "center", "am_softmax", "arcface"]
Reads = Literal["logits", "cosines", "embedding"]

# Where acos has a finite slope in float32, which is what angles are computed in.
_LARGEST_COSINE = 1 - 1e-7


class MarginSoftmax(nn.Module, ABC):
    """Cross-entropy of scaled cosines after the true class was made harder by a margin.

    Args:
        margin: How much harder, from 0.
        scale: `s`, by which all cosines are multiplied. The MFD paper gives none. The default is that of AM-Softmax
            (Wang et al. 2018), for both margins: enough for 100 classes, where CosFace's bound for a probability of
            0.9999 is s >= 13.7, while ArcFace's 64 was chosen for 85,000.

    Raises:
        ValueError: If margin or scale cannot be one.
    """

    reads: Reads = "cosines"

    def __init__(self, margin: float, scale: float = 30.0):
        super().__init__()
        if not (math.isfinite(margin) and margin >= 0):
            raise ValueError(f"margin must be a finite number from 0, not {margin}")
        if not (math.isfinite(scale) and scale > 0):
            raise ValueError(f"scale must be a finite number above 0, not {scale}")
        self.margin = margin
        self.scale = scale

    @abstractmethod
    def harder(self, cosine: Tensor) -> Tensor:
        """Return what stands for the cosine of the true class."""

    def forward(self, cosines: Tensor, target: Tensor) -> Tensor:
        """Compute the mean loss.

        Args:
            cosines: `[B, K]` between -1 and 1, see `cosines_of`.
            target: Class indices `[B]`.

        Returns:
            Scalar, at least 0.

        Raises:
            ValueError: If the targets are no class indices.
        """
        _check_indices(target, type(self).__name__)
        cosines = cosines.to(torch.promote_types(cosines.dtype, torch.float32))
        true = target[:, None]
        logits = self.scale * cosines.scatter(1, true, self.harder(cosines.gather(1, true)))
        return functional.cross_entropy(logits, target)

    def extra_repr(self) -> str:
        """Show both numbers."""
        return f"margin={self.margin}, scale={self.scale}"


class AMSoftmaxLoss(MarginSoftmax):
    """AM-Softmax: the cosine of the true class is lowered by a margin.

    `L = mean_i -ln( e^{s (cos t_y - m)} / (e^{s (cos t_y - m)} + sum_{j != y} e^{s cos t_j}) )`

    Args:
        margin: `m`; 0.35 in Table VI and in the AM-Softmax paper.
        scale: As for `MarginSoftmax`.

    Example:
        >>> task = MFDClassificationTask(model, AMSoftmaxLoss(), MFDLoss())

    Source: Wang et al., "Additive Margin Softmax for Face Verification", 2018, Eq. 6.
    """

    def __init__(self, margin: float = 0.35, scale: float = 30.0):
        super().__init__(margin, scale)

    def harder(self, cosine: Tensor) -> Tensor:
        """Return `cos t - m`."""
        return cosine - self.margin


class ArcFaceLoss(MarginSoftmax):
    """ArcFace: the angle to the true class is widened by a margin.

    `L = mean_i -ln( e^{s cos(t_y + m)} / (e^{s cos(t_y + m)} + sum_{j != y} e^{s cos t_j}) )`

    Where t_y + m would exceed pi, `cos t_y - m sin m` takes the place of cos(t_y + m), so that the loss still grows
    with the angle.

    Args:
        margin: `m` in radians, up to pi; 0.5 in Table VI and in the ArcFace paper.
        scale: As for `MarginSoftmax`.

    Example:
        >>> task = MFDClassificationTask(model, ArcFaceLoss(), MFDLoss())

    Source: Deng et al., "ArcFace: Additive Angular Margin Loss for Deep Face Recognition", 2019, Eq. 3.
    """

    def __init__(self, margin: float = 0.5, scale: float = 30.0):
        super().__init__(margin, scale)
        if margin > math.pi:
            raise ValueError(f"margin of ArcFace is an angle up to pi, not {margin}")

    def harder(self, cosine: Tensor) -> Tensor:
        """Return `cos(t + m)`, continued beyond pi."""
        angle = cosine.clamp(-_LARGEST_COSINE, _LARGEST_COSINE).acos()
        beyond = cosine - self.margin * math.sin(self.margin)
        return torch.where(angle + self.margin <= math.pi, (angle + self.margin).cos(), beyond)


class CenterLoss(nn.Module):
    """Softmax loss plus the squared distance of each embedding to the centre of its class.

    `L = CE(logits, y) + weight/2 mean_i |x_i - c_{y_i}|^2`

    The centres are not trained by the gradient. After each batch in training mode, with n_j images of class j in it,
    `c_j <- c_j + rate * sum_{i: y_i = j} (x_i - c_j) / (1 + n_j)`. Sums and counts go over all processes.

    Args:
        num_classes: Number of classes.
        embedding_dim: Size of the embedding.
        weight: `lambda` of the Center Loss paper; 0.003 is its choice. The MFD paper gives none.
        rate: `alpha`, 0 to 1; 0.5 is its choice.

    Attributes:
        centres: `[num_classes, embedding_dim]`, a buffer, 0 at the start.

    Raises:
        ValueError: If weight or rate cannot be one.

    Example:
        >>> criterion = CenterLoss(model.num_classes, model.get_classifier().in_features)
        >>> task = MFDClassificationTask(model, criterion, MFDLoss())

    Source: Wen et al., "A Discriminative Feature Learning Approach for Deep Face Recognition", 2016, Eq. 2-5, Alg. 1.
    """

    reads: Reads = "embedding"
    centres: Tensor

    def __init__(self, num_classes: int, embedding_dim: int, weight: float = 0.003, rate: float = 0.5):
        super().__init__()
        if not (math.isfinite(weight) and weight >= 0):
            raise ValueError(f"weight must be a finite number from 0, not {weight}")
        if not 0 <= rate <= 1:
            raise ValueError(f"rate must be in [0, 1], not {rate}")
        self.weight = weight
        self.rate = rate
        self.register_buffer("centres", torch.zeros(num_classes, embedding_dim))

    def forward(self, logits: Tensor, target: Tensor, embedding: Tensor) -> Tensor:
        """Compute the mean loss, and move the centres in training mode.

        Args:
            logits: `[B, K]`.
            target: Class indices `[B]`.
            embedding: `[B, D]`.

        Returns:
            Scalar, at least 0.

        Raises:
            ValueError: If the targets are no class indices.
        """
        _check_indices(target, type(self).__name__)
        with torch.autocast(embedding.device.type, enabled=False):
            embedding = embedding.to(torch.promote_types(embedding.dtype, torch.float32))
            offset = embedding - self.centres[target]
            if self.training:
                self._move_centres(offset.detach().to(self.centres.dtype), target)
            distance = offset.square().sum(1).mean()
            return functional.cross_entropy(logits.to(embedding.dtype), target) + self.weight / 2 * distance

    @torch.no_grad()
    def _move_centres(self, offset: Tensor, target: Tensor) -> None:
        # A product instead of index_add_, whose order of summation on a GPU is left to chance.
        members = functional.one_hot(target, len(self.centres)).to(offset.dtype)
        sums = torch.cat([members.T @ offset, members.sum(0)[:, None]], dim=1)
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(sums)
        self.centres += self.rate * sums[:, :-1] / (1 + sums[:, -1:])

    def extra_repr(self) -> str:
        """Show both numbers."""
        return f"weight={self.weight}, rate={self.rate}"


def create_criterion(
    name: CriterionName,
    model: nn.Module,
    *,
    label_smoothing: float = 0.0,
    margin: float | None = None,
    scale: float | None = None,
    center_weight: float | None = None,
) -> nn.Module:
    """Build a criterion for a model; an argument that is None has the criterion's default.

    Args:
        name: One of `CriterionName`.
        model: The model that it is for.
        label_smoothing: Probability that is shared among all classes, for `"softmax"`.
        margin: For `"am_softmax"` and `"arcface"`.
        scale: For `"am_softmax"` and `"arcface"`.
        center_weight: For `"center"`.

    Returns:
        The criterion.

    Raises:
        ValueError: If the name is unknown, an argument is out of range or not the criterion's, or the model has no
            embedding that the criterion could read.

    Example:
        >>> create_criterion("arcface", model, margin=0.3)
        ArcFaceLoss(margin=0.3, scale=30.0)
    """
    if name not in get_args(CriterionName):
        raise ValueError(f"unknown criterion {name!r}; choose one of {', '.join(get_args(CriterionName))}")
    allowed = {"softmax": {"label_smoothing"}, "center": {"center_weight"}}.get(name, {"margin", "scale"})
    arguments = {"label_smoothing": label_smoothing or None, "margin": margin, "scale": scale}
    given = {key: v for key, v in (arguments | {"center_weight": center_weight}).items() if v is not None}
    for argument, value in given.items():
        if argument not in allowed:
            raise ValueError(f"{argument.replace('_', ' ')} {value} does not apply to the criterion {name!r}")
    if name == "softmax":
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label smoothing must be in [0, 1), not {label_smoothing}")
        return nn.CrossEntropyLoss(label_smoothing=label_smoothing)
    if name == "center":
        classifier = linear_classifier(model)
        weight = {} if center_weight is None else {"weight": center_weight}
        return CenterLoss(classifier.out_features, classifier.in_features, **weight)
    return AMSoftmaxLoss(**given) if name == "am_softmax" else ArcFaceLoss(**given)


def linear_classifier(model: nn.Module) -> nn.Linear:
    """Return the classifier that reads the embedding.

    Raises:
        ValueError: If the model's last layer is not one `nn.Linear`.
    """
    classifier = unwrap_model(model).get_classifier()
    if not isinstance(classifier, nn.Linear):
        raise ValueError(
            f"the classifier of {type(model).__name__} is a {type(classifier).__name__}, not one nn.Linear"
        )
    return classifier


def cosines_of(embedding: Tensor, weight: Tensor) -> Tensor:
    """Compute the cosine between every embedding and every row of a classifier, in float32 or better.

    Args:
        embedding: `[B, D]`.
        weight: `[K, D]`.

    Returns:
        `[B, K]` in [-1, 1] up to rounding; 0 for an embedding that is 0.
    """
    with torch.autocast(embedding.device.type, enabled=False):
        dtype = torch.promote_types(embedding.dtype, torch.float32)
        return functional.linear(_unit(embedding.to(dtype)), _unit(weight.to(dtype)))


def fold_classifier(model: nn.Module) -> nn.Module:
    """Return a plain model that answers as the cosines do: unit rows in its classifier, and no bias.

    Its logits are `|x| cos t`, so the class with the largest one is the class with the largest cosine.

    Args:
        model: A timm model that was trained with a criterion that reads cosines.

    Returns:
        A model of the same class that shares every tensor with `model` but those of the classifier.

    Raises:
        ValueError: If the classifier is not one `nn.Linear`.

    Example:
        >>> save_pretrained(fold_classifier(model), "export")
    """
    plain = unwrap_model(model)
    classifier = linear_classifier(plain)
    own = {id(parameter) for parameter in classifier.parameters()}
    shared = {id(t): t for t in (*plain.parameters(), *plain.buffers()) if id(t) not in own}
    folded = deepcopy(plain, shared)
    with torch.no_grad():
        head = linear_classifier(folded)
        head.weight.copy_(_unit(classifier.weight))
        if head.bias is not None:
            head.bias.zero_()
    return folded


def _unit(rows: Tensor) -> Tensor:
    """Give every row the length 1; a row of zeros stays one and has no gradient."""
    length = rows.norm(dim=1, keepdim=True)
    return rows / length.masked_fill(length == 0, math.inf)


def _check_indices(target: Tensor, name: str) -> None:
    if target.ndim != 1 or target.is_floating_point():
        raise ValueError(f"{name} takes class indices [B], not targets of shape {list(target.shape)} ({target.dtype})")
