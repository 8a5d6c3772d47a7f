"""Operators that compute nothing new: what they give are elements of what they read."""

from __future__ import annotations

MOVERS = frozenset(
    {
        "DepthToSpace",
        "Expand",
        "Flatten",
        "Gather",
        "GatherElements",
        "Identity",
        "MaxPool",
        "Pad",
        "ReduceMax",
        "ReduceMin",
        "Reshape",
        "Resize",
        "Slice",
        "SpaceToDepth",
        "Split",
        "Squeeze",
        "Tile",
        "Transpose",
        "Unsqueeze",
    }
)
"""Operators whose output holds nothing but elements of their first input (and zeros)."""

CUTS = frozenset({"Relu", "Clip"})
"""Activations that only cut a range: a quantized value cannot leave its range, which does the cutting."""
