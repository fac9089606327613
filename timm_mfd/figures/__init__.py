"""Pictures. matplotlib is imported here and nowhere else."""

from . import _matplotlib as _matplotlib

# isort: split
from .accuracy import accuracy_against_weight as accuracy_against_weight
from .accuracy import ours_against_paper as ours_against_paper
from .analysis import analysis_pictures as analysis_pictures
from .correlations import correlation_by_stage as correlation_by_stage
from .correlations import correlation_distribution as correlation_distribution
from .correlations import correlation_heat_maps as correlation_heat_maps
from .curves import compared_curves as compared_curves
from .curves import training_curves as training_curves
from .feature_maps import feature_maps as feature_maps
