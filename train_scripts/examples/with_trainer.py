"""The Trainer of transformers, in bf16: MFD in `compute_loss`.

python train_scripts/examples/with_trainer.py OUTPUT_FOLDER   (needs transformers)
"""

import sys

import timm
import torch
from digits import accuracy, digits
from torch.nn.functional import cross_entropy
from torch.utils.data import default_collate
from transformers import Trainer, TrainingArguments

import timm_mfd  # MFD


class MFDTrainer(Trainer):
    """A Trainer of models that `timm_mfd.with_stages` returns."""

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Return the loss of one batch."""
        out = model(inputs["images"])
        loss = cross_entropy(out.logits, inputs["labels"]) + out.mfd.loss  # MFD: + out.mfd.loss
        return (loss, {"logits": out.logits}) if return_outputs else loss


def collate(samples):
    """Name the parts of a batch."""
    images, labels = default_collate(samples)
    return {"images": images, "labels": labels}


def main(folder: str) -> None:
    """Train on handwritten digits and save the model."""
    arguments = TrainingArguments(
        f"{folder}-trainer", num_train_epochs=3, per_device_train_batch_size=64, dataloader_drop_last=True,
        bf16=True, use_cpu=not torch.accelerator.is_available(), learning_rate=3e-3, save_strategy="no", report_to=[],
        remove_unused_columns=False, label_names=["labels"],
    )  # fmt: skip
    model = timm.create_model("test_resnet", num_classes=10)
    net = timm_mfd.with_stages(model, mfd=timm_mfd.MFDLoss(weight=1.0))  # MFD: give this to the Trainer
    MFDTrainer(net, arguments, data_collator=collate, train_dataset=digits(train=True)).train()
    model = model.cpu()
    print(f"{100 * accuracy(model):.1f} % of the held-out digits")
    timm_mfd.save_pretrained(model, folder, image_size=(32, 32))
    print(f'timm.create_model("local-dir:{folder}", pretrained=True)')


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/with_trainer")
