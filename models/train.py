"""Train the digits network and write the files that ship: `python -m edgewise.models.train`.

Sparse on purpose: a penalty on the batch-norm scales drives channels to zero while the network learns
(network slimming, Liu et al. 2017, arXiv 1708.06519); channels that end below a threshold get scale and
shift zero, and the rest is fine-tuned around them. Norms whose channels can only leave together share
one penalty, the length of their scales taken together (group lasso, Yuan and Lin 2006), which for a norm
on its own is the L1 of the paper.

Needs torch; scikit-learn only where the file of images is missing. The seed fixes the result up to the
rounding of the machine and its number of threads.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgewise.models.digits import CHECKPOINT, IMAGES, MANIFEST, Digits, load_digits, load_digits_net
from edgewise.models.digits_net import DigitsNet

SEED = 0
TEST_IMAGES = 500
BATCH = 64
SPARSE_EPOCHS = 16
TUNE_EPOCHS = 8
SPARSE_RATE = 0.05
TUNE_RATE = 0.01
PENALTY = 0.0065
THRESHOLD = 0.02
WEIGHT_DECAY = 1e-4


@dataclass(frozen=True)
class Channels:
    """One group of coupled norms and which of its channels live (True) or are held at zero."""

    norms: Sequence[nn.BatchNorm2d]
    alive: Tensor

    def hold(self) -> None:
        """Put scale and shift of the dead channels back to zero."""
        with torch.no_grad():
            for norm in self.norms:
                norm.weight.mul_(self.alive)
                norm.bias.mul_(self.alive)


def main() -> None:
    torch.manual_seed(SEED)
    torch.use_deterministic_algorithms(True)
    torch.set_flush_denormal(True)  # scales on their way to zero would slow every step down
    if not IMAGES.exists():
        write_images(IMAGES)
    digits = load_digits()
    start = time.monotonic()
    net = train(digits)
    print(f"trained in {time.monotonic() - start:.0f} s, test accuracy {accuracy(net, digits):.4f}")
    write_checkpoint(net, CHECKPOINT)
    found = describe(load_digits_net(), digits)
    write_manifest(found)
    print(json.dumps(found[CHECKPOINT.name], indent=2))


def write_images(path: Path) -> None:
    """The images of scikit-learn, shuffled once and split, as bytes."""
    from sklearn.datasets import load_digits as load_original

    original = load_original()
    order = np.random.default_rng(SEED).permutation(len(original.images))
    train, test = order[:-TEST_IMAGES], order[-TEST_IMAGES:]
    images, labels = original.images.astype(np.uint8), original.target.astype(np.uint8)
    np.savez_compressed(
        path,
        train_images=images[train],
        train_labels=labels[train],
        test_images=images[test],
        test_labels=labels[test],
    )


def train(digits: Digits) -> DigitsNet:
    """Learn with the penalty, zero what it made small, tune the rest."""
    net = DigitsNet()
    groups = net.coupled_norms()
    spread(groups)
    run(net, digits, SPARSE_EPOCHS, SPARSE_RATE, lambda: PENALTY * penalty(groups), lambda: None)
    channels = [Channels(norms, strength(norms) > THRESHOLD) for norms in groups]
    print(f"zeroed {sum(int((~c.alive).sum()) for c in channels)} of {sum(len(c.alive) for c in channels)}")

    def hold() -> None:
        for group in channels:
            group.hold()

    hold()
    run(net, digits, TUNE_EPOCHS, TUNE_RATE, lambda: torch.zeros(()), hold)
    return net.eval()


def spread(groups: Sequence[Sequence[nn.BatchNorm2d]]) -> None:
    """Start the scales between 0 and 1, coupled ones alike: from equal scales all would shrink in step."""
    for norms in groups:
        scales = torch.rand(norms[0].num_features)
        for norm in norms:
            norm.weight.data.copy_(scales)


def run(
    net: DigitsNet,
    digits: Digits,
    epochs: int,
    rate: float,
    extra: Callable[[], Tensor],
    after_step: Callable[[], None],
) -> None:
    """Gradient descent on cross-entropy plus `extra`; the rate falls from `rate` to 0 as a cosine."""
    images, labels = torch.from_numpy(digits.train_images), torch.from_numpy(digits.train_labels)
    optimizer = torch.optim.SGD(
        net.parameters(), rate, momentum=0.9, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    steps = len(images) // BATCH
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * steps)
    loss_of = nn.CrossEntropyLoss()
    net.train()
    for parameter in net.parameters():
        if parameter.ndim == 4:  # trains in half the time of the default layout
            parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)
    for epoch in range(epochs):
        total = 0.0
        for chosen in torch.randperm(len(images))[: steps * BATCH].view(steps, BATCH):
            loss = loss_of(net(images[chosen]), labels[chosen])
            optimizer.zero_grad()
            (loss + extra()).backward()
            optimizer.step()
            after_step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1:2d} of {epochs}: loss {total / steps:.4f}", flush=True)


def strength(norms: Sequence[nn.BatchNorm2d]) -> Tensor:
    """Root mean square of the scales of each channel over its norms, shape (channels,)."""
    return torch.stack([norm.weight for norm in norms]).square().mean(dim=0).sqrt()


def penalty(groups: Sequence[Sequence[nn.BatchNorm2d]]) -> Tensor:
    """Sum over all channels of the length of their scales, weighed by the square root of their number."""
    stacks = [torch.stack([norm.weight for norm in norms]) for norms in groups]
    lengths = [len(s) ** 0.5 * torch.linalg.vector_norm(s, dim=0).sum() for s in stacks]
    return torch.stack(lengths).sum()


def write_checkpoint(net: nn.Module, path: Path) -> None:
    """The state dict as arrays; floats as float16, which changes no decision of the network."""
    arrays = {name: tensor.contiguous().numpy() for name, tensor in net.state_dict().items()}
    halved = {name: a.astype(np.float16) if a.dtype == np.float32 else a for name, a in arrays.items()}
    np.savez_compressed(path, **halved)


def accuracy(net: DigitsNet, digits: Digits) -> float:
    """Share of the test images that the network names right."""
    with torch.no_grad():
        guesses = net.eval()(torch.from_numpy(digits.test_images)).argmax(dim=1).numpy()
    return float(np.mean(guesses == digits.test_labels))


def zeroed(net: DigitsNet) -> dict[str, str]:
    """For each batch norm, how many of its channels have scale and shift exactly zero."""
    norms = {name: m for name, m in net.named_modules() if isinstance(m, nn.BatchNorm2d)}
    dead = {name: int(((m.weight == 0) & (m.bias == 0)).sum()) for name, m in norms.items()}
    return {name: f"{dead[name]} of {m.num_features}" for name, m in norms.items()}


def write_manifest(found: Mapping[str, Any]) -> None:
    """Put what was found out about some files in place of what the manifest said about them."""
    known = json.loads(MANIFEST.read_text(encoding="utf-8")) if MANIFEST.exists() else {}
    MANIFEST.write_text(json.dumps({**known, **found}, indent=2) + "\n", encoding="utf-8")


def describe(net: DigitsNet, digits: Digits) -> dict[str, Any]:
    """What the manifest says about each file."""
    return {
        IMAGES.name: {
            "what": "1,797 grey 8x8 images of handwritten digits, pixels 0 to 16, shuffled and split once",
            "source": "UCI Optical Recognition of Handwritten Digits, test set, as in scikit-learn",
            "url": "https://archive.ics.uci.edu/dataset/80/optical+recognition+of+handwritten+digits",
            "authors": "E. Alpaydin, C. Kaynak",
            "license": "CC BY 4.0",
            "train": len(digits.train_labels),
            "test": len(digits.test_labels),
            "sha256": hashlib.sha256(IMAGES.read_bytes()).hexdigest(),
        },
        CHECKPOINT.name: {
            "what": "state dict of edgewise.models.digits_net.DigitsNet, floats as float16",
            "source": "python -m edgewise.models.train",
            "trained_on": f"{IMAGES.name}, train",
            "seed": SEED,
            "parameters": sum(p.numel() for p in net.parameters()),
            "test_accuracy": accuracy(net, digits),
            "zeroed_channels": zeroed(net),
            "sha256": hashlib.sha256(CHECKPOINT.read_bytes()).hexdigest(),
        },
    }


if __name__ == "__main__":
    main()
