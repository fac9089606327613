"""Multi-stage feature decorrelation (MFD) for every image classifier in timm."""

from importlib.metadata import version as _version

from .decorrelation import MFDLoss as MFDLoss
from .decorrelation import MFDOutput as MFDOutput
from .decorrelation import channel_correlation as channel_correlation
from .decorrelation import mfd_loss as mfd_loss
from .hub import push_to_hub as push_to_hub
from .hub import save_pretrained as save_pretrained
from .models import create_model as create_model
from .models import list_models as list_models
from .stages import StageOutput as StageOutput
from .stages import forward_stages as forward_stages
from .task import MFDClassificationTask as MFDClassificationTask

__version__ = _version("timm_mfd")
