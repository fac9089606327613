"""Data sets, the paper's augmentation and the loaders."""

from .images import ArrayImages as ArrayImages
from .images import FileImages as FileImages
from .images import ImageData as ImageData
from .images import ImageDecodeError as ImageDecodeError
from .loader import EvalLoader as EvalLoader
from .loader import TrainLoader as TrainLoader
from .readers import DATASETS as DATASETS
from .readers import load_dataset as load_dataset
from .readers import single_image as single_image
from .resident import place as place
