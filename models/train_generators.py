"""Train the image generators and write the files that ship.

`python -m edgewise.models.train_generators` does all, with names as arguments those.

The GANs learn against a critic with spectral norm and the hinge loss (Miyato et al. 2018, arXiv
1802.05957), without batch norm in the critic. What is kept is the running mean of the generator's weights
over the last steps (Yazici et al. 2018, arXiv 1806.04498), with batch norm statistics taken anew for them.

Needs torch. Some minutes on one core each; the seed fixes the result up to the rounding of the machine and
its number of threads.
"""

from __future__ import annotations

import copy
import hashlib
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from edgewise.models import generator_nets
from edgewise.models.critics import Critic, Encoder, hinge
from edgewise.models.digits import FOLDER, IMAGES, load_digits
from edgewise.models.generators import GENERATORS, GeneratorFacts
from edgewise.models.train import write_checkpoint, write_manifest

SEED = 0
BATCH = 32
STEPS = {"dcgan": 2000, "mlp_gan": 2500, "vae_decoder": 2500, "conditional_vae": 2500}
GENERATOR_RATE = 4e-4
CRITIC_RATE = 4e-4
VAE_RATE = 2e-3
PRIOR_WEIGHTS = {"vae_decoder": 0.5, "conditional_vae": 0.15}
DECAY = 0.995
NORM_BATCHES = 50


def main() -> None:
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    for name in sys.argv[1:] or GENERATORS:
        torch.manual_seed(SEED)
        start = time.monotonic()
        net = train(name)
        print(f"{name}: trained in {time.monotonic() - start:.0f} s", flush=True)
        write_checkpoint(net, FOLDER / f"{name}.npz")
        write_manifest({f"{name}.npz": describe(name, net)})


def train(name: str, steps: int | None = None) -> nn.Module:
    """One of `GENERATORS`, from nothing, in eval mode."""
    facts, steps = GENERATORS[name], steps or STEPS[name]
    digits = load_digits()
    images = torch.from_numpy(facts.real(digits.train_images))
    net: nn.Module = getattr(generator_nets, facts.network)()
    if weight := PRIOR_WEIGHTS.get(name):
        return train_vae(net, images, torch.from_numpy(digits.train_labels), facts, steps, weight)
    return train_gan(net, images, facts, steps)


def train_gan(net: nn.Module, images: Tensor, facts: GeneratorFacts, steps: int) -> nn.Module:
    """Generator and critic in turns; rates fall to zero over the second half."""
    critic = Critic(facts.side)
    _to_fast_layout(net, critic)
    calm = copy.deepcopy(net)
    ours = torch.optim.Adam(net.parameters(), GENERATOR_RATE, betas=(0.5, 0.99))
    theirs = torch.optim.Adam(critic.parameters(), CRITIC_RATE, betas=(0.5, 0.99))
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(o, lambda i: min(1.0, 2 - 2 * i / steps)) for o in (ours, theirs)
    ]
    for step, chosen in enumerate(_batches(len(images), steps)):
        fake = net(torch.randn(BATCH, facts.latent))
        # One call for both: spectral norm takes one step a call.
        score = critic(torch.cat([images[chosen], fake.detach()]))
        loss = hinge(score[:BATCH], 1) + hinge(score[BATCH:], -1)
        _descend(theirs, loss)
        critic.requires_grad_(False)
        _descend(ours, -critic(fake).mean())
        critic.requires_grad_(True)
        _follow(calm, net)
        for schedule in schedules:
            schedule.step()
        if step % 200 == 0:
            print(f"step {step} of {steps}: critic {loss.item():.3f}", flush=True)
    return _with_norms_of_its_own(calm, facts)


def train_vae(
    net: nn.Module, images: Tensor, labels: Tensor, facts: GeneratorFacts, steps: int, prior_weight: float
) -> nn.Module:
    """Encoder and decoder on cross-entropy of the pixels plus the divergence from the prior; the decoder."""
    encoder = Encoder(facts.side, takes_label=facts.takes_label)
    _to_fast_layout(net, encoder)
    calm = copy.deepcopy(net)
    optimizer = torch.optim.Adam([*net.parameters(), *encoder.parameters()], VAE_RATE)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for step, chosen in enumerate(_batches(len(images), steps)):
        label = (labels[chosen],) if facts.takes_label else ()
        mean, log_variance = encoder(images[chosen], *label)
        latent = mean + torch.randn_like(mean) * (log_variance / 2).exp()
        misfit = functional.binary_cross_entropy(net(latent, *label), images[chosen], reduction="sum") / BATCH
        prior = (mean.square() + log_variance.exp() - log_variance - 1).sum() / (2 * BATCH)
        # Four by four pixels of an enlarged digit are one: they are one piece of evidence, not sixteen.
        loss = misfit * (8 / facts.side) ** 2 + prior_weight * prior
        _descend(optimizer, loss)
        schedule.step()
        _follow(calm, net)
        if step % 200 == 0:
            print(f"step {step} of {steps}: pixels {misfit.item():.1f}, prior {prior.item():.2f}", flush=True)
    return _with_norms_of_its_own(calm, facts)


def _batches(count: int, steps: int) -> Iterator[Tensor]:
    """Indices of shuffled samples, epoch after epoch, whole batches only."""
    done = 0
    while done < steps:
        for chosen in torch.randperm(count)[: count // BATCH * BATCH].view(-1, BATCH)[: steps - done]:
            yield chosen
            done += 1


def _to_fast_layout(*nets: nn.Module) -> None:
    for net in nets:
        for parameter in net.parameters():
            if parameter.ndim == 4:
                parameter.data = parameter.data.contiguous(memory_format=torch.channels_last)


def _descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    torch.autograd.backward(loss)
    optimizer.step()


def _follow(calm: nn.Module, net: nn.Module) -> None:
    """The weights of `calm` take a small step towards those of `net`."""
    with torch.no_grad():
        for slow, fast in zip(calm.parameters(), net.parameters(), strict=True):
            slow.lerp_(fast, 1 - DECAY)


def _with_norms_of_its_own(net: nn.Module, facts: GeneratorFacts) -> nn.Module:
    """Batch norm statistics over fresh latents: those of the training are of other weights."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm1d | nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the mean of all batches
    net.train()
    with torch.no_grad():
        for seed in range(NORM_BATCHES):
            net(*(torch.from_numpy(array) for array in facts.feed(4 * BATCH, seed).values()))
    return net.eval()


def describe(name: str, net: nn.Module) -> dict[str, Any]:
    """What the manifest says about a checkpoint."""
    facts, path = GENERATORS[name], FOLDER / f"{name}.npz"
    return {
        "what": f"state dict of edgewise.models.generator_nets.{facts.network}, floats as float16",
        "source": f"python -m edgewise.models.train_generators {name}",
        "trained_on": f"{IMAGES.name}, train, at {facts.side}x{facts.side} pixels in [{facts.low:.0f}, 1]",
        "seed": SEED,
        "parameters": sum(p.numel() for p in net.parameters()),
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }


if __name__ == "__main__":
    main()
