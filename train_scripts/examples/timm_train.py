"""timm's own train.py with MFD: every recipe of timm, with one word before it.

python train_scripts/examples/timm_train.py PATH/TO/timm/train.py --data-dir images --model resnet50 ...

torchrun --nproc-per-node 4 train_scripts/examples/timm_train.py PATH/TO/timm/train.py ...

The environment variable MFD_WEIGHT sets the weight (1). Checkpoints are timm's, of the plain model.
"""

import os
import runpy
import sys

import timm.task

import timm_mfd


class MFDTask(timm_mfd.MFDClassificationTask):
    """What timm's script builds in place of its `ClassificationTask`."""

    def __init__(self, model, criterion=None, **kwargs):
        weight = float(os.environ.get("MFD_WEIGHT", "1"))
        super().__init__(model, criterion, timm_mfd.MFDLoss(weight), **kwargs)


if __name__ == "__main__":
    if len(sys.argv) < 2 or not os.path.isfile(sys.argv[1]):
        sys.exit(f"{os.path.basename(sys.argv[0])}: error: the first argument is the path of timm's train.py")
    timm.task.ClassificationTask = MFDTask
    sys.argv = sys.argv[1:]
    sys.path[0] = os.path.dirname(os.path.abspath(sys.argv[0]))
    runpy.run_path(sys.argv[0], run_name="__main__")
