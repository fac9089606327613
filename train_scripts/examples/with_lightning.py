"""Lightning: MFD in `training_step`.

python train_scripts/examples/with_lightning.py OUTPUT_FOLDER   (needs lightning)
"""

import sys

import lightning
import timm
import torch
from digits import accuracy, digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import timm_mfd  # MFD


class Classifier(lightning.LightningModule):
    """A timm model, its optimizer, and its loss."""

    def __init__(self) -> None:
        super().__init__()
        self.model = timm.create_model("test_resnet", num_classes=10)
        mfd = timm_mfd.MFDLoss(weight=1.0)  # MFD
        # MFD: it shares its layers with self.model, so Lightning sees each parameter once.
        self.net = timm_mfd.with_stages(self.model, mfd=mfd)

    def training_step(self, batch, _):
        """Return the loss of one batch."""
        images, labels = batch
        out = self.net(images)
        self.log("mfd", out.mfd.loss, prog_bar=True)
        return cross_entropy(out.logits, labels) + out.mfd.loss  # MFD: + out.mfd.loss

    def configure_optimizers(self):
        """Return the optimizer."""
        return torch.optim.SGD(self.parameters(), lr=0.05, momentum=0.9)


def main(folder: str) -> None:
    """Train on handwritten digits and save the model."""
    lightning.seed_everything(0)
    module = Classifier()
    trainer = lightning.Trainer(max_epochs=3, logger=False, enable_checkpointing=False)
    trainer.fit(module, DataLoader(digits(train=True), batch_size=64, shuffle=True, drop_last=True))
    if trainer.is_global_zero:
        model = module.model.cpu()
        print(f"{100 * accuracy(model):.1f} % of the held-out digits")
        timm_mfd.save_pretrained(model, folder, image_size=(32, 32))
        print(f'timm.create_model("local-dir:{folder}", pretrained=True)')


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/with_lightning")
