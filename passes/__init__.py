"""Graph passes: each maps a model to a model that computes the same, or nearly the same, for less."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType

import yaml

from edgewise.passes.absorb_shuffles import AbsorbShuffles
from edgewise.passes.base import Pass
from edgewise.passes.clip_weights import ClipWeights
from edgewise.passes.convert_ends import ConvertEnds
from edgewise.passes.convert_floats import ConvertFloats
from edgewise.passes.dedupe_initializers import DedupeInitializers
from edgewise.passes.drop_dead_nodes import DropDeadNodes
from edgewise.passes.drop_default_attributes import DropDefaultAttributes
from edgewise.passes.drop_identity import DropIdentity
from edgewise.passes.drop_impossible_branches import DropImpossibleBranches
from edgewise.passes.drop_no_ops import DropNoOps
from edgewise.passes.drop_zero_states import DropZeroStates
from edgewise.passes.eliminate_common_subexpressions import EliminateCommonSubexpressions
from edgewise.passes.equalize_channels import EqualizeChannels
from edgewise.passes.fix_dimensions import FixDimensions
from edgewise.passes.fold_constant_channels import FoldConstantChannels
from edgewise.passes.fold_constants import FoldConstants
from edgewise.passes.fold_shapes import FoldShapes
from edgewise.passes.freeze_inputs import FreezeInputs
from edgewise.passes.fuse_activations import FuseActivations
from edgewise.passes.fuse_affine import FuseAffine
from edgewise.passes.fuse_attention import FuseAttention
from edgewise.passes.fuse_batch_norm import FuseBatchNorm
from edgewise.passes.fuse_matmul_add import FuseMatmulAdd
from edgewise.passes.fuse_norms import FuseNorms
from edgewise.passes.fuse_pad import FusePad
from edgewise.passes.fuse_rotary import FuseRotary
from edgewise.passes.infer_shapes import InferShapes
from edgewise.passes.inline_functions import InlineFunctions
from edgewise.passes.inline_if import InlineIf
from edgewise.passes.insert_qdq import InsertQdq
from edgewise.passes.keep_outputs import KeepOutputs
from edgewise.passes.keep_reduced_axes import KeepReducedAxes
from edgewise.passes.lift_constants import LiftConstants
from edgewise.passes.lower_opset import LowerOpset
from edgewise.passes.merge_branches import MergeBranches
from edgewise.passes.merge_channels import MergeChannels
from edgewise.passes.merge_linear import MergeLinear
from edgewise.passes.merge_parallel_convs import MergeParallelConvs
from edgewise.passes.merge_reshapes import MergeReshapes
from edgewise.passes.merge_slices import MergeSlices
from edgewise.passes.merge_transposes import MergeTransposes
from edgewise.passes.prune_channels import PruneChannels
from edgewise.passes.push_transposes import PushTransposes
from edgewise.passes.quantize_dynamic import QuantizeDynamic
from edgewise.passes.quantize_weights import QuantizeWeights
from edgewise.passes.shorten_names import ShortenNames
from edgewise.passes.smooth_inputs import SmoothInputs
from edgewise.passes.split_before_transpose import SplitBeforeTranspose
from edgewise.passes.split_conv_transpose import SplitConvTranspose
from edgewise.passes.store_weights import StoreWeights
from edgewise.passes.strip_debug import StripDebug
from edgewise.passes.to_qoperator import ToQOperator
from edgewise.passes.uint8_input import Uint8Input
from edgewise.passes.unroll_loop import UnrollLoop
from edgewise.passes.upgrade_opset import UpgradeOpset
from edgewise.passes.write_fills import WriteFills

_ALL: tuple[type[Pass], ...] = (
    FreezeInputs,
    InlineFunctions,
    LiftConstants,
    UpgradeOpset,
    DropDeadNodes,
    InferShapes,
    FoldShapes,
    FoldConstants,
    DropImpossibleBranches,
    InlineIf,
    UnrollLoop,
    DropIdentity,
    DropNoOps,
    DropZeroStates,
    SplitBeforeTranspose,
    MergeReshapes,
    MergeTransposes,
    MergeSlices,
    KeepReducedAxes,
    EliminateCommonSubexpressions,
    FuseActivations,
    FuseNorms,
    PushTransposes,
    FusePad,
    FuseBatchNorm,
    FuseAffine,
    FuseMatmulAdd,
    AbsorbShuffles,
    MergeBranches,
    MergeParallelConvs,
    MergeLinear,
    FoldConstantChannels,
    PruneChannels,
    MergeChannels,
    FuseRotary,
    FuseAttention,
    DedupeInitializers,
    DropDefaultAttributes,
    WriteFills,
    SplitConvTranspose,
    EqualizeChannels,
    SmoothInputs,
    InsertQdq,
    ToQOperator,
    QuantizeDynamic,
    QuantizeWeights,
    StoreWeights,
    ClipWeights,
    ConvertFloats,
    LowerOpset,
    StripDebug,
    ShortenNames,
    FixDimensions,
    KeepOutputs,
    Uint8Input,
    ConvertEnds,
)

PASSES: Mapping[str, type[Pass]] = MappingProxyType({kind.name: kind for kind in _ALL})
"""Every pass by its name."""

EXACT_CHAIN: tuple[str, ...] = (
    "freeze-inputs",  # first, because what is overridable is no constant
    "inline-functions",  # into which nothing else looks
    "lift-constants",  # one form of constants for all that follows
    "upgrade-opset",  # one form of every operator for all that follows
    "drop-dead-nodes",  # nothing is inferred or folded that nobody reads
    "infer-shapes",  # folding and removing channels need shapes
    "fold-shapes",  # arithmetic on known dimensions becomes constants
    "fold-constants",
    "drop-zero-states",  # which keep every unit of a recurrent layer
    "drop-impossible-branches",
    "inline-if",  # once conditions are constants
    "unroll-loop",  # and trip counts
    "drop-identity",
    "drop-no-ops",
    "split-before-transpose",  # which leaves two Reshapes in a row
    "merge-reshapes",
    "merge-transposes",
    "merge-slices",
    "keep-reduced-axes",
    "eliminate-common-subexpressions",  # before fusions, which look at single users
    "fuse-activations",  # before the affine fusion, which would take their scales first
    "fuse-norms",
    "push-transposes",  # once norms are one operator, which is then easy to pass
    "fuse-pad",
    "fuse-batch-norm",
    "fuse-affine",
    "fuse-matmul-add",  # after the affine fusion, which wants the bias where it is
    "absorb-shuffles",  # into weights that have taken their norms and scales
    "merge-branches",  # likewise
    "merge-parallel-convs",  # which may put two layers next to each other
    "merge-linear",
    "fold-constant-channels",  # what depends on no input unties the channels that do
    # After the norms are folded, which shows the zeros. Odd widths leave the kernels' fast paths: measured,
    # MobileNets that lost single channels ran at 0.8 of their speed, and at multiples of 4 as before.
    "prune-channels{multiple: 4}",
    "merge-channels{multiple: 4}",
    "fuse-rotary",  # after heads have left, of which the fused operators show nothing
    "fuse-attention",
    "dedupe-initializers",  # after all that rewrites weights, which wants one of its own for each layer
    "drop-dead-nodes",  # removed channels leave their old weights behind
    "drop-default-attributes",
    "write-fills",  # last, because the others make weights of them
)
"""The exact passes in the order in which a round runs them."""

PREPARATION: tuple[str, ...] = (
    # There is no int8 kernel of ConvTranspose. The shuffle that takes its place pays only in int8, where its
    # transposes cancel with those of the kernels: a DCGAN runs at 0.9 of its speed in float and 1.9 in int8.
    "split-conv-transpose{channels_last: true}",
    "infer-shapes",
    "merge-reshapes",
    "merge-transposes",
)
"""The exact passes that run before int8 alone."""


def parse(spec: str) -> Pass:
    """The pass that `spec` names: `fuse-pad`, or with options `freeze-inputs{always: true}`.

    Raises `ValueError` on an unknown name or option.
    """
    name, brace, options = spec.strip().partition("{")
    if name not in PASSES:
        raise ValueError(f"there is no pass {name!r}: edgewise passes lists them")
    try:
        values = yaml.safe_load(brace + options) if brace else {}
    except yaml.YAMLError as error:
        raise ValueError(f"{spec!r}: options are written as {{name: value}}") from error
    return PASSES[name].from_options(values)
