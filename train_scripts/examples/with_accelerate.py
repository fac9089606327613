"""Accelerate in bf16, on whatever it is launched with.

accelerate launch --mixed_precision bf16 train_scripts/examples/with_accelerate.py OUTPUT_FOLDER
"""

import sys

import timm
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from digits import accuracy, digits
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import timm_mfd  # MFD


def main(folder: str) -> None:
    """Train on handwritten digits and save the model."""
    accelerator = Accelerator()
    set_seed(0)
    model = timm.create_model("test_resnet", num_classes=10)
    # MFD: prepare this instead of the model. The loss is taken inside, so that Accelerate converts no feature map.
    net = timm_mfd.with_stages(model, mfd=timm_mfd.MFDLoss(weight=1.0))
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(digits(train=True), batch_size=64 // accelerator.num_processes, shuffle=True, drop_last=True)
    net, optimizer, loader = accelerator.prepare(net, optimizer, loader)
    for epoch in range(3):
        net.train()
        for images, labels in loader:
            out = net(images)
            loss = cross_entropy(out.logits, labels) + out.mfd.loss  # MFD: + out.mfd.loss
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
        accelerator.print(f"epoch {epoch + 1}: loss {loss.item():.3f}, of which MFD {out.mfd.loss.item():.3f}")
    if accelerator.is_main_process:
        print(f"{100 * accuracy(model.cpu()):.1f} % of the held-out digits")
        timm_mfd.save_pretrained(model, folder, image_size=(32, 32))
        print(f'timm.create_model("local-dir:{folder}", pretrained=True)')
    accelerator.end_training()


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/with_accelerate")
