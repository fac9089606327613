"""A loop of your own, with bf16 autocast, torch.compile, gradient accumulation and checkpointing, and EMA.

python train_scripts/examples/plain_loop.py OUTPUT_FOLDER
"""

import sys

import timm
import torch
from digits import accuracy, digits
from timm.utils import ModelEmaV3
from torch.nn.functional import cross_entropy
from torch.utils.data import DataLoader

import timm_mfd  # MFD

EPOCHS, ACCUMULATE = 3, 2


def main(folder: str) -> None:
    """Train on handwritten digits and save the average of the weights."""
    torch.manual_seed(0)
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    model = timm.create_model("test_resnet", num_classes=10).to(device)
    model.set_grad_checkpointing()
    ema = ModelEmaV3(model, decay=0.9)
    net = timm_mfd.with_stages(model, mfd=timm_mfd.MFDLoss(weight=1.0))  # MFD: the same model, with another forward
    net = torch.compile(net)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    loader = DataLoader(digits(train=True), batch_size=64, shuffle=True, drop_last=True)
    for epoch in range(EPOCHS):
        net.train()
        for step, (images, labels) in enumerate(loader, 1):
            with torch.autocast(device.type, torch.bfloat16):
                out = net(images.to(device))
                loss = cross_entropy(out.logits, labels.to(device)) + out.mfd.loss  # MFD: + out.mfd.loss
            (loss / ACCUMULATE).backward()
            if step % ACCUMULATE == 0:
                optimizer.step()
                optimizer.zero_grad()
                ema.update(model)
        print(f"epoch {epoch + 1}: loss {loss.item():.3f}, of which MFD {out.mfd.loss.item():.3f}")
    averaged = ema.module.cpu()
    print(f"{100 * accuracy(averaged):.1f} % of the held-out digits")
    timm_mfd.save_pretrained(averaged, folder, label_names=[str(digit) for digit in range(10)], image_size=(32, 32))
    print(f'timm.create_model("local-dir:{folder}", pretrained=True)')


if __name__ == "__main__":
    main(sys.argv[1] if len(sys.argv) > 1 else "runs/plain_loop")
