"""Multi-stage feature decorrelation (MFD) for every image classifier in timm."""

from importlib.metadata import version as _version

from .decorrelation import MFDLoss, MFDOutput, channel_correlation, mfd_loss
from .hub import push_to_hub, save_pretrained
from .models import create_model, list_models
from .staged import LossOutput, with_stages
from .stages import StageOutput, forward_stages
from .task import MFDClassificationTask

__all__ = [
    "LossOutput",
    "MFDClassificationTask",
    "MFDLoss",
    "MFDOutput",
    "StageOutput",
    "channel_correlation",
    "create_model",
    "forward_stages",
    "list_models",
    "mfd_loss",
    "push_to_hub",
    "save_pretrained",
    "with_stages",
]
__version__ = _version("timm_mfd")
