"""Networks whose int8 form collapses, made from trained ones that are the same function in float.

EDGEWISE_CORPUS=... python benchmarks/collapse.py [--spread 6] [--samples 32] [--images 200] [NAME ...]

Channels between consecutive layers are multiplied by factors spread over many binary orders, as they are
found in the depthwise layers of MobileNets once their norms are folded: what one layer writes times s, what
the next one reads over s. Prints top-1 and the signal-to-noise ratio of the scores, of int8 with one weight
scale for a layer and with one for each channel: as trained, collapsed, and collapsed but equalized.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator

import numpy as np
import onnx_ir as ir
from corpus import Array, Classifier, Labelled, classifiers
from rich.console import Console
from rich.table import Table

from edgewise.calibration.channel_ranges import collect_channels
from edgewise.calibration.collect import collect
from edgewise.calibration.plan import QuantOptions, observed_values, plan
from edgewise.calibration.target import target_of
from edgewise.optimizer import files
from edgewise.optimizer.pipeline import Reference, run_passes
from edgewise.optimizer.recipe import Recipe
from edgewise.passes import parse
from edgewise.passes.channel_ranges import ChannelRanges
from edgewise.passes.channel_scales import Exponents, ScaleGraph
from edgewise.passes.channels import ChannelGroup
from edgewise.passes.equalize_channels import EqualizeChannels
from edgewise.passes.graph import opset
from edgewise.passes.insert_qdq import InsertQdq
from edgewise.runtime.evaluate import Evaluator, input_specs

NAMES = ("cifar_resnet20", "mnv1_050_160_tf_fp32", "squeezenet_fp32", "mnv2_100_224_tfqat_fp32")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=NAMES)
    parser.add_argument("--spread", type=float, default=6.0, help="binary orders in both directions")
    parser.add_argument("--samples", type=int, default=32, help="images to calibrate with")
    parser.add_argument("--images", type=int, default=200, help="images to judge by, at most")
    parser.add_argument("--target", default="cpu")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    logging.getLogger().setLevel(logging.ERROR)
    table = Table("model", "form", "weight scales", "dB", "top-1 %", title="collapse cases")
    for classifier in classifiers():
        if classifier.name in options.names:
            for row in rows(classifier, options):
                table.add_row(classifier.name, *row)
            table.add_section()
    Console(width=120).print(table)


def collapsed(model: ir.Model, ranges: ChannelRanges, *, spread: float, seed: int) -> ir.Model:
    """`model` with factors of 2 ** (-spread .. spread), log-uniform, on every channel between two layers.

    One layer writes such a channel, others read it. Where a Clip lies between, channels that came near its
    bound in `ranges` stay as they are and none is lifted to it.
    """
    made = model.clone()
    scales = ScaleGraph.of(made.graph, opset(made), ranges.values)
    rng = np.random.default_rng(seed)

    def exponents(group: ChannelGroup) -> Exponents:
        least, most = scales.caps[group]
        between = len(scales.writers[group]) == 1 and len(scales.readers[group]) > 0
        drawn = rng.uniform(-spread, spread, group.size) if between else np.zeros(group.size)
        return np.rint(np.clip(drawn, least, most)).astype(np.int64)

    scales.scale({group: exponents(group) for group in scales.graph.groups})
    return made


def rows(classifier: Classifier, options: argparse.Namespace) -> Iterator[tuple[str, ...]]:
    """A row for each form of the model and kind of weight scale."""
    model, samples = trained(classifier, options.samples)
    test = classifier.test()
    test = test.every(-(-len(test) // options.images))
    images, reference = list(test), None
    broken = collapsed(model, ranges_of(model, samples), spread=options.spread, seed=options.seed)
    reference = scores(model, images)
    yield ("float", "", "", top1(reference, test, classifier))
    for form, source in (("as trained", model), ("collapsed", broken), ("equalized", broken)):
        for per_channel in (False, True):
            prepared = equalized(source, samples, per_channel) if form == "equalized" else source
            said = scores(int8(prepared, samples, per_channel, options.target), images)
            noise = f"{decibels(reference, said):.1f}"
            yield (form, "per channel" if per_channel else "one", noise, top1(said, test, classifier))


def trained(classifier: Classifier, count: int) -> tuple[ir.Model, list[Array]]:
    """The model after the exact passes, up to its scores, and samples to calibrate with."""
    data = classifier.calibration()
    samples = list(data.every(max(1, len(data) // count)))[:count]
    model = files.load(classifier.path)
    model, _ = run_passes(model, Recipe().chain, Reference(model, [{input_of(model): samples[0]}]))
    last = model.graph.outputs[0].producer()
    if last is not None and last.op_type == "Softmax":
        model.graph.outputs[0] = last.inputs[0]
        model.graph.remove(last, safe=True)
    parse("infer-shapes").apply(model)
    return model, samples


def ranges_of(model: ir.Model, samples: list[Array]) -> ChannelRanges:
    name = input_of(model)
    return collect_channels(model, ({name: sample} for sample in samples))


def equalized(model: ir.Model, samples: list[Array], per_channel: bool) -> ir.Model:
    made = model.clone()
    EqualizeChannels(per_channel=per_channel, ranges=ranges_of(model, samples)).apply(made)
    return made


def int8(model: ir.Model, samples: list[Array], per_channel: bool, target: str) -> ir.Model:
    choice, name = QuantOptions(per_channel=per_channel), input_of(model)
    values = observed_values(model, choice, target_of(target))
    table = collect(model, ({name: sample} for sample in samples), values)
    made = model.clone()
    InsertQdq(plan(model, table, choice, target_of(target))).apply(made)
    return made


def scores(model: ir.Model, images: list[Array]) -> Array:
    evaluator, name = Evaluator(model), input_of(model)
    return np.stack([next(iter(evaluator.run({name: x}).values())).reshape(-1) for x in images])


def decibels(reference: Array, said: Array) -> float:
    """Energy of the scores over the energy of their errors."""
    error = np.square(reference.astype(np.float64) - said).sum()
    return float(10 * np.log10(np.square(reference.astype(np.float64)).sum() / max(error, 1e-30)))


def top1(said: Array, test: Labelled, classifier: Classifier) -> str:
    return f"{(said.argmax(1) - classifier.first_class == test.labels).mean() * 100:.1f}"


def input_of(model: ir.Model) -> str:
    return input_specs(model)[0].name


if __name__ == "__main__":
    main()
