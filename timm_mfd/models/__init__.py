"""Registered `*_mfd` architectures and the model factory.

Importing this package makes the `*_mfd` names known to `timm.create_model`, `timm.list_models` and the Hub sources.
"""

from . import densenet_mfd as densenet_mfd
from . import mobilenetv2_mfd as mobilenetv2_mfd
from . import resnet_mfd as resnet_mfd
from ._factory import arguments_for as arguments_for
from ._factory import create_model as create_model
from ._factory import list_models as list_models
from ._factory import preprocessing_of as preprocessing_of
from ._stem import Stem as Stem
from ._stem import paper_stem as paper_stem
