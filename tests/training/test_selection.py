"""What is said of the cost of a cut model is what the cut model costs, and what leaves is of least score."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping

import numpy as np
import onnx_ir as ir
import pytest
from channel_nets import nets
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrites import build, normal

from edgewise.passes.channels import ChannelGraph
from edgewise.passes.graph import opset
from edgewise.passes.infer_shapes import infer_shapes, shapes_on
from edgewise.passes.remove_channels import PrunePlan, RemoveChannels
from edgewise.passes.verify import Signature, check
from edgewise.runtime.errors import EdgewiseError
from edgewise.runtime.evaluate import Evaluator
from edgewise.training.costs import Cost, FileBytes, Macs, Parameters, Part, Shares, full_width
from edgewise.training.selection import Bill, Scores, achieved, select, uniform

INPUTS = {"x": (1, 3, 6, 6)}

CHAIN = """
net (float[1, 3, 6, 6] x) => (float[1, 5, 6, 6] y) {
    a = Conv<pads = [1, 1, 1, 1]>(x, w1)
    r = Relu(a)
    b = Conv(r, w2)
    y = Conv(b, w3)
}
"""
JOINED = """
net (float[1, 3, 6, 6] x) => (float[1, 5, 6, 6] y) {
    a = Conv(x, wa)
    b = Conv(x, wb)
    c = Concat<axis = 1>(a, b)
    y = Conv(c, w)
}
"""
GROUPED = """
net (float[1, 3, 6, 6] x) => (float[1, 5, 6, 6] y) {
    a = Conv(x, w1)
    b = Conv<group = 2>(a, w2, b2)
    y = Conv(b, w3)
}
"""
RECURRENT = """
net (float[4, 1, 8] x) => (float[4, 1, 5] y) {
    h = MatMul(x, w)
    s, last = LSTM<hidden_size = 16>(h, wx, wh, wb)
    f = Squeeze(s, one)
    y = MatMul(f, w2)
}
"""

RESIDUAL = """
net (float[1, 3, 6, 6] x) => (float[1, 5, 6, 6] y) {
    a = Conv(x, w0)
    b = Conv(a, w1)
    c = Conv(b, w2)
    h = Add(a, c)
    d = Conv(h, w3)
    e = Conv(d, w4)
    f = Conv(e, w5)
    k = Add(h, f)
    y = Conv(k, w6)
}
"""


def chain(first: int = 16, second: int = 8) -> ir.Model:
    return build(
        CHAIN, w1=normal(first, 3, 3, 3), w2=normal(second, first, 1, 1), w3=normal(5, second, 1, 1, seed=1)
    )


def joined() -> ir.Model:
    return build(JOINED, wa=normal(16, 3, 1, 1), wb=normal(8, 3, 1, 1), w=normal(5, 24, 1, 1))


def grouped() -> ir.Model:
    return build(
        GROUPED, w1=normal(16, 3, 1, 1), w2=normal(12, 8, 1, 1), b2=normal(12), w3=normal(5, 12, 1, 1)
    )


def recurrent() -> ir.Model:
    return build(
        RECURRENT,
        w=normal(8, 16),
        wx=normal(1, 64, 16),
        wh=normal(1, 64, 16),
        wb=normal(1, 128),
        one=np.array([1]),
        w2=normal(16, 5),
    )


def residual() -> ir.Model:
    """Two blocks on a stream, the second with two layers of its own."""
    return build(
        RESIDUAL,
        w0=normal(8, 3, 1, 1),
        w1=normal(16, 8, 1, 1),
        w2=normal(8, 16, 1, 1),
        w3=normal(12, 8, 1, 1),
        w4=normal(12, 12, 1, 1),
        w5=normal(8, 12, 1, 1),
        w6=normal(5, 8, 1, 1),
    )


def graph_of(model: ir.Model) -> ChannelGraph:
    return ChannelGraph.of(model.graph, opset(model))


def scored(model: ir.Model, seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {group.name: rng.random(group.size) for group in graph_of(model).groups}


def shapes(model: ir.Model, inputs: Mapping[str, tuple[int, ...]] = INPUTS) -> dict[str, tuple[int, ...]]:
    return shapes_on(model, inputs)


def whole(model: ir.Model, cost: Cost) -> float:
    return Bill.of(graph_of(model), cost).whole


def lost(scores: Scores, plan: PrunePlan) -> float:
    return sum(float(scores[name][list(channels)].sum()) for name, channels in plan.leaving.items())


def left(model: ir.Model, plan: PrunePlan, value: str) -> list[int]:
    """The channels of a value that stay."""
    (group,) = [g for g in graph_of(model).groups if g.name == f"{value}[1]"]
    return sorted(set(range(group.size)) - set(plan.leaving.get(group.name, ())))


class Priced:
    """What one value costs at each of its widths, as a table of latencies would have it."""

    unit = "milliseconds"

    def __init__(self, value: str, prices: Mapping[int, float]) -> None:
        self.value, self.prices = value, prices

    def parts(self, graph: ChannelGraph) -> Iterable[Part]:
        slots = (s for s in graph.home if s.value.name == self.value and s.use is None)
        return [Part((slot,), lambda widths: self.prices[widths[0]]) for slot in slots]


@pytest.mark.parametrize(
    ("model", "inputs"),
    [
        (chain(), INPUTS),
        (joined(), INPUTS),
        (grouped(), INPUTS),
        (recurrent(), {"x": (4, 1, 8)}),
    ],
    ids=["chain", "concat", "grouped", "recurrent"],
)
@pytest.mark.parametrize("budget", [0.8, 0.5])
def test_costs_of_a_cut_model_are_as_foretold(
    model: ir.Model, inputs: Mapping[str, tuple[int, ...]], budget: float
) -> None:
    scores = scored(model)
    for cost in (Macs(shapes(model, inputs)), Parameters()):
        plan = select(model, scores, cost, budget, multiple=2)
        cut = RemoveChannels(plan).on(model)
        known = Macs(shapes(cut, inputs)) if isinstance(cost, Macs) else cost
        assert achieved(model, plan, cost) == whole(cut, known) / whole(model, cost) <= budget


@settings(max_examples=30)
@given(nets(), st.sampled_from([1, 2, 4]), st.sampled_from([0.3, 0.6]))
def test_costs_of_any_net_are_as_foretold(model: ir.Model, multiple: int, ratio: float) -> None:
    infer_shapes(model)
    try:
        plan = uniform(model, scored(model), ratio, multiple=multiple)
    except EdgewiseError:
        return
    cut = RemoveChannels(plan).on(model)
    check(cut, Signature.of(model))
    infer_shapes(cut)
    foretold = [
        round(achieved(model, plan, cost) * whole(model, cost))
        for cost in (Macs(shapes(model)), Parameters())
    ]
    assert foretold == [whole(cut, Macs(shapes(cut))), whole(cut, Parameters())]


@pytest.mark.parametrize("budget", [0.9, 0.6])
def test_no_plan_within_the_budget_loses_less(budget: float) -> None:
    """Held against all plans: the search gives away a tenth at most."""
    model, scores = chain(12, 8), scored(chain(12, 8), seed=3)
    cost = Macs(shapes(model))
    plan = select(model, scores, cost, budget, multiple=2, floor=0.0)
    order = {name: np.argsort(values) for name, values in scores.items() if name in ("a[1]", "b[1]")}
    losses = []
    for a, b in itertools.product(range(0, 12, 2), range(0, 8, 2)):
        other = PrunePlan({"a[1]": tuple(order["a[1]"][:a]), "b[1]": tuple(order["b[1]"][:b])})
        if achieved(model, other, cost) <= budget:
            losses.append(lost(scores, other))
    assert min(losses) <= lost(scores, plan) <= 1.1 * min(losses)


def test_of_every_group_the_least_scores_leave() -> None:
    model = chain()
    scores = {"a[1]": np.arange(16.0), "b[1]": np.arange(8.0)[::-1]}
    plan = select(model, scores, Parameters(), 0.5)
    a, b = left(model, plan, "a"), left(model, plan, "b")
    assert (a, b) == (list(range(16 - len(a), 16)), list(range(len(b))))
    assert len(a) % 4 == len(b) % 4 == 0


BRANCHES = {"h": np.array([1.0]), "k": np.array([1.0])}


@pytest.mark.parametrize("branches", [("h",), ("k",), ("h", "k")])
@pytest.mark.parametrize("kind", [Macs, Parameters, FileBytes])
def test_costs_without_branches_are_as_foretold(branches: tuple[str, ...], kind: type[Cost]) -> None:
    model = residual()
    cost = Macs(shapes(model)) if kind is Macs else kind()
    plan = PrunePlan({"a[1]": (1, 2, 3), "d[1]": (0,) if "k" not in branches else ()}, branches)
    cut = RemoveChannels(plan).on(model)
    left = Macs(shapes(cut)) if kind is Macs else cost
    foretold = achieved(model, plan, cost) * whole(model, cost)
    if kind is FileBytes:  # of notes on nodes and values nothing is said to leave
        assert foretold == pytest.approx(whole(cut, left), abs=1000)
    else:
        assert foretold == whole(cut, left)


def test_a_branch_leaves_that_is_worth_less_than_its_channels() -> None:
    model = residual()
    scores: Scores = {**scored(model), **BRANCHES, "k": np.array([1e-3])}
    plan = select(model, scores, Macs(shapes(model)), 0.6, multiple=1)
    assert plan.branches == ("k",)
    assert not {"d[1]", "e[1]"} & set(plan.leaving)  # its own channels leave with it
    assert achieved(model, plan, Macs(shapes(model))) <= 0.6


def test_a_branch_stays_that_has_no_score_or_a_high_one() -> None:
    model = residual()
    cost = Macs(shapes(model))
    assert select(model, scored(model), cost, 0.6, multiple=1).branches == ()
    dear = {**scored(model), "h": np.array([1e6]), "k": np.array([np.inf])}
    assert select(model, dear, cost, 0.6, multiple=1).branches == ()


def test_the_more_a_branch_counts_the_fewer_leave() -> None:
    """Also one that nothing is lost with stays where all have to."""
    model = residual()
    scores: Scores = {**scored(model), "h": np.array([0.0]), "k": np.array([20.0])}
    by_weight = [
        select(model, scores, Macs(shapes(model)), 0.4, multiple=1, branch_weight=weight).branches
        for weight in (1e-3, 1e3, math.inf)
    ]
    assert by_weight == [("h", "k"), ("h",), ()]


@pytest.mark.parametrize("budget", [0.2, 0.4, 0.6, 0.8, 0.95])
@pytest.mark.parametrize("worth", [1e-3, 1.0, 4.0])
def test_budgets_are_kept_with_branches(budget: float, worth: float) -> None:
    model = residual()
    scores: Scores = {**scored(model), "h": np.array([worth]), "k": np.array([2 * worth])}
    plan = select(model, scores, Macs(shapes(model)), budget, multiple=1)
    cut = RemoveChannels(plan).on(model)
    assert whole(cut, Macs(shapes(cut))) <= budget * whole(model, Macs(shapes(model)))
    check(cut, Signature.of(model))


def test_a_group_without_scores_and_channels_of_infinite_score_stay() -> None:
    model = chain()
    scores = {"a[1]": np.where(np.arange(16) < 5, np.inf, 0.0)}
    plan = select(model, scores, Parameters(), 0.7)
    assert set(plan.leaving) == {"a[1]"}
    assert set(range(5)) <= set(left(model, plan, "a"))
    assert len(left(model, plan, "a")) == 8


def test_a_plateau_of_the_latency_is_left_at_once() -> None:
    """Nothing is saved between 16 and 9, and 12 is slower than 16: still 8 is found."""
    prices = {16: 1.0, 12: 1.2, 8: 0.4, 4: 0.39}
    model = chain()
    plan = select(model, scored(model), Priced("a", prices), 0.5)
    assert len(left(model, plan, "a")) == 8
    assert achieved(model, plan, Priced("a", prices)) == 0.4


def test_a_move_that_became_needless_is_taken_back() -> None:
    """First the cheap channels of one group leave, then dear ones of another do more than all of it."""
    model = chain()
    scores = {"a[1]": np.full(16, 1e-3), "b[1]": np.full(8, 10.0)}
    prices = {16: 10.0, 12: 9.0, 8: 8.5, 4: 8.0}

    class Both(Priced):
        def parts(self, graph: ChannelGraph) -> Iterable[Part]:
            yield from super().parts(graph)
            yield from Priced("b", {8: 90.0, 4: 10.0}).parts(graph)

    plan = select(model, scores, Both("a", prices), 0.5)
    assert set(plan.leaving) == {"b[1]"}


def test_costs_that_count_alike_are_shares_of_the_whole() -> None:
    model = joined()
    graph, macs, bytes_ = graph_of(model), Macs(shapes(model)), FileBytes()
    both = Shares((macs, bytes_))
    assert Bill.of(graph, both).whole == pytest.approx(2.0)
    plan = select(model, scored(model), both, 0.5)
    shares = [achieved(model, plan, cost) for cost in (macs, bytes_)]
    assert sum(shares) / 2 == pytest.approx(achieved(model, plan, both))
    assert sum(shares) / 2 <= 0.5


def test_parts_of_a_concat_have_widths_of_their_own() -> None:
    model = joined()
    (group,) = [g for g in graph_of(model).groups if g.size == 24]
    scores = {group.name: np.concatenate([np.zeros(16), np.ones(8)])}
    plan = select(model, scores, Parameters(), 0.6)
    assert len(plan.leaving[group.name]) in (12, 13, 14)
    assert max(plan.leaving[group.name]) < 16
    cut = RemoveChannels(uniform(model, scores, 0.5)).on(model)
    assert [
        v.shape.numpy()[0] for n in "ab" for v in cut.graph.initializers.values() if v.name == f"w{n}"
    ] == [
        8,
        4,
    ]


def test_grouped_convolutions_lose_as_much_in_each_group() -> None:
    model = grouped()
    scores = {"a[1]": np.arange(16.0), "b[1]": np.arange(12.0)}
    plan = uniform(model, scores, 0.5)
    assert left(model, plan, "a") == [4, 5, 6, 7, 12, 13, 14, 15]
    assert left(model, plan, "b") == [3, 4, 5, 9, 10, 11]
    feed = {"x": normal(1, 3, 6, 6)}
    assert Evaluator(RemoveChannels(plan).on(model)).run(feed)["y"].shape == (1, 5, 6, 6)


def test_a_share_of_every_group_stays() -> None:
    model = chain(32, 8)
    scores = {"a[1]": np.zeros(32), "b[1]": np.ones(8)}
    plan = select(model, scores, Parameters(), 0.3, multiple=1, floor=0.25)
    assert len(left(model, plan, "a")) == 8


def test_what_cannot_be_reached_says_what_can() -> None:
    model = chain()
    with pytest.raises(EdgewiseError, match=r"1.0% of the parameters .*: at least 24\.0% stay"):
        select(model, scored(model), Parameters(), 0.01)


def test_without_a_group_the_reasons_are_told() -> None:
    model = build("net (float[1, 4] x) => (float[1, 3] y) { y = MatMul(x, w) }", w=normal(4, 3))
    with pytest.raises(EdgewiseError, match=r"can leave this model: graph input \(1\), graph output"):
        select(model, scored(model), Parameters(), 0.5)
    with pytest.raises(EdgewiseError, match="no channel can leave"):
        uniform(model, {}, 0.5)


def test_scores_of_another_model_are_refused() -> None:
    model = chain()
    for wrong in (np.zeros(3), np.full(16, np.nan)):
        with pytest.raises(EdgewiseError, match=r"a\[1\] has 16 channels, and no score for each"):
            select(model, {"a[1]": wrong}, Parameters(), 0.5)


def test_the_same_twice_is_the_same() -> None:
    model = joined()
    plans = [select(model, scored(model), Parameters(), 0.5) for _ in range(2)]
    assert plans[0] == plans[1]


def test_file_bytes_are_those_of_the_weights_and_a_little() -> None:
    model = chain()
    numbers = whole(model, Parameters())
    assert numbers == 16 * 27 + 8 * 16 + 5 * 8
    assert 4 * numbers < whole(model, FileBytes()) < 4 * numbers + 300
    assert whole(model, FileBytes()) - whole(model, FileBytes(weight=1)) == 3 * numbers


def test_copies_of_a_shared_vector_are_counted() -> None:
    """Two readers of which other channels leave get a copy each."""
    text = """
    net (float[1, 3, 6, 6] x) => (float[1, 5, 6, 6] y) {
        a = Conv(x, wa)
        p = Mul(a, s)
        b = Conv(p, wb)
        q = Mul(b, s)
        y = Conv(q, w)
    }
    """
    model = build(
        text,
        wa=normal(8, 3, 1, 1),
        wb=normal(8, 8, 1, 1),
        s=normal(8, 1, 1),
        w=normal(5, 8, 1, 1),
    )
    scores = {"a[1]": np.arange(8.0), "b[1]": np.arange(8.0)[::-1]}
    for leaving in ({"a[1]": (0, 1)}, {"a[1]": (0, 1), "b[1]": (5, 6, 7)}):
        cut = RemoveChannels(PrunePlan(leaving)).on(model)
        share = achieved(model, PrunePlan(leaving), Parameters())
        assert share == whole(cut, Parameters()) / whole(model, Parameters())
    assert achieved(model, uniform(model, scores, 0.0), Parameters()) == 1.0


def test_the_full_width_of_a_slot_is_its_size() -> None:
    assert {full_width(slot) for slot in graph_of(chain()).home} == {3, 5, 8, 16}
