"""The backward sweep of Sharing Ratio Decomposition: one modified backward pass, sharing ratios never materialised.

Each node carries a cotangent g with the meaning ``R_i = <u_i, g_i>`` (specification, section 6). At an activation the relevance is read,
``R^l = sum_ch x g``, and restarted on its input, ``g = v R^l / ||v||^2`` (eq. 6: <vh_{i->j}, v_j>/||v_j||^2 of R_j goes to pixel i);
between activations the layers' linear maps are transposed. All operations are native, so the sweep itself can be differentiated.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from explainer.baselines.kernels.srd_graph import Graph, Node
from explainer.baselines.kernels.srd_rules import (
    AvgPool,
    Conv,
    Gate,
    MaxPool,
    Norm,
    Rule,
    channel_dot,
    combine,
    inner,
    inverse_square_norm,
    join,
    restart,
)
from explainer.errors import ConfigError, UnsupportedLayerError

Start = Literal["paper", "code", "constant"]
Unit = Literal["vector", "scalar"]
_NO_SCALAR = 1e-9  # a neuron of at most this magnitude passes nothing on
_PLAINLY = 1e-3  # a difference this large beside what it was taken from is no rounding noise


def _neurons(v: Tensor, relevance: Tensor) -> Tensor:
    """``R / v`` with R ``[B,C,h,w]`` of single neurons; zeros pass nothing on."""
    live = v.abs() > _NO_SCALAR
    return torch.where(live, relevance / torch.where(live, v, torch.ones_like(v)), torch.zeros_like(v))


def sweep(
    graph: Graph,
    start: int,
    relevance: Tensor,
    stops: Sequence[int],
    *,
    one_step: bool = False,
    consume: bool = False,
    post: bool = False,
) -> dict[int, Tensor]:
    """Relevance at ``stops`` when node ``start`` has relevance ``[B,h,w]``, or ``[B,C,h,w]``: then every neuron shares by itself
    (appendix F's ablation, LRP-0 with the bias shared), and only the maps that are returned are summed over channels.

    Args:
        graph: the recorded pass.
        start: node.
        relevance: relevance of the start's pixels.
        stops: nodes.
        one_step: let nothing cross an activation: a one-hot relevance then gives the ratios mu_{i->j} themselves (eq. 6).
        post: shares are along the vectors behind the activations, not before them (appendix F's other ablation).
        consume: the graph is not needed afterwards: values are let go as soon as they have been used, which makes room for the next ones.

    Returns:
        ``{stop: [B,h_stop,w_stop]}``, signed. A stop that does not feed ``start`` gets zeros.
    """
    nodes = graph.nodes
    live = graph.between(list(stops), start)
    graph.require_rules(live, list(stops))
    members, wanted = set(live), set(stops)
    scalar = relevance.ndim == 4
    maps: dict[int, Tensor] = {}
    cotangents: dict[int, Tensor] = {}
    own: set[int] = set()  # nodes whose cotangent no one else holds: it may be written over
    known: dict[int, Tensor] = {}  # of activations: what has arrived as relevance <u, g> [B,1,h,w]; their cotangent itself is not needed
    rooms: dict[int, Tensor] = {}  # of activations: a map of the size of theirs that is needed no more

    def send(index: int, g: Tensor, fresh: bool) -> None:
        if index not in members:
            return
        if index not in cotangents:
            cotangents[index] = g
            own.update([index] if fresh else [])
        else:  # of a sum, what was fresh is filled
            room = g if fresh and not torch.is_grad_enabled() and g.dtype == cotangents[index].dtype else None
            cotangents[index] = torch.add(cotangents[index], g, out=room)
            own.add(index)

    def send_through(conv: Node, g: Tensor, beta: Tensor | None, scale: Tensor | None = None) -> None:
        assert isinstance(conv.rule, Conv)
        j = conv.inputs[0]
        u = nodes[j].out
        if j not in members:
            return
        back = conv.rule.transposed(g, u, scale)
        if graph.is_source(j) and not scalar:
            relevance = conv.rule.relevance(back, beta, u)
            known[j] = known[j] + relevance if j in known else relevance
            rooms[j] = back
        else:
            send(j, join(back, None if beta is None else conv.rule.shared_bias(beta, u), u), fresh=True)

    def start_again(node: Node, relevance: Tensor, room: Tensor | None = None) -> None:
        """From an activation, or the start, at what relevance is shared along there."""
        v = target(node)
        send(node.inputs[0], _neurons(v, relevance) if relevance.ndim == 4 else restart(v, relevance, room), fresh=True)

    def target(node: Node) -> Tensor:
        """What relevance is shared along at an activation."""
        return node.out if post else nodes[node.inputs[0]].out

    used: Node | None = None
    for i in reversed(live):
        if used is not None and consume:
            used.out = used.out.new_empty(0)
        node = nodes[i]
        used = None if i in wanted else node
        source = graph.is_source(i)
        g: Tensor | None
        if i == start:
            maps[i] = relevance.sum(1) if scalar else relevance
            if source and node.inputs:
                start_again(node, relevance)
                continue
            g = _neurons(node.out, relevance) if scalar else restart(node.out, relevance)
        elif i in cotangents or i in known:
            g = cotangents.pop(i, None)
            if g is not None and (source or i in wanted):
                found = inner(node.out, g)
                known[i] = known[i] + found if i in known else found
            if i in known:
                maps[i] = known.pop(i)[:, 0]
        else:
            continue  # a folded convolution: its BatchNorm has answered for both
        if (one_step and source) or (not members.intersection(node.inputs) and i not in graph.folds):
            continue
        if source:
            start_again(node, node.out * g if scalar and g is not None else maps[i], g if i in own else rooms.pop(i, None))
            continue
        assert g is not None  # only activations are given their relevance without it
        if i in graph.folds and graph.folds[i] in members:
            conv, norm = nodes[graph.folds[i]], node.rule
            assert isinstance(norm, Norm)
            send_through(conv, g, channel_dot(_folded_bias(norm, conv.rule).to(g.dtype), g), norm.scale)
        elif isinstance(node.rule, Conv):
            send_through(node, g, node.rule.bias_share(g))
        else:
            pulled = node.rule.pull(g, [nodes[j].out for j in node.inputs])
            for j, back in zip(node.inputs, pulled, strict=True):
                send(j, back, fresh=isinstance(node.rule, MaxPool | AvgPool | Norm | Gate))
    for i in wanted - maps.keys():
        maps[i] = torch.zeros_like(nodes[i].out[:, 0])
    return {i: maps[i] for i in stops}


def _folded_bias(norm: Norm, conv: Rule) -> Tensor:
    """Bias of a convolution and its BatchNorm as one convolution ``(s W, s b + t)`` (section 3.5)."""
    assert isinstance(conv, Conv)
    return norm.shift if conv.bias is None else norm.scale * conv.bias + norm.shift


def mu_sums(graph: Graph, start: int) -> dict[int, Tensor]:
    """``sum over sources and pixels of mu_{i->j}`` at every target pixel j: 1 except where a bias or a zero vector had no owner.

    Returns:
        ``{target node: [B,h,w]}`` for every activation that feeds ``start``, and ``start`` itself. Found forwards: what has no owner
        is pushed through the linear maps until the next activation, where ``1 - <w,v>/||v||^2`` is what was shared.
    """
    nodes = graph.nodes
    ownerless: dict[int, Tensor | None] = {}
    sums: dict[int, Tensor] = {}
    live = graph.between([0], start)
    graph.require_rules(live, [0])
    for i in live:
        node = nodes[i]
        target = node.inputs[0] if graph.is_source(i) and node.inputs else i
        if graph.is_source(i):
            ownerless[i] = None
        elif i in graph.folds and graph.folds[i] in ownerless:
            conv, norm = nodes[graph.folds[i]], node.rule
            assert isinstance(conv.rule, Conv) and isinstance(norm, Norm)
            weighted, fraction = conv.rule.push_parts(ownerless[conv.inputs[0]], nodes[conv.inputs[0]].out)
            ownerless[i] = combine(None if weighted is None else norm.scaled(weighted), _folded_bias(norm, conv.rule), fraction)
        else:
            ownerless[i] = node.rule.push([ownerless.get(j) for j in node.inputs], [nodes[j].out for j in node.inputs])
        if i and (graph.is_source(i) or i == start):
            v, lost = nodes[target].out, ownerless[target]
            scale = inverse_square_norm(v)
            total = (scale > 0).to(v.dtype)
            sums[i] = (total if lost is None else total - inner(lost, v) * scale)[:, 0]
    return sums


def class_maps(graph: Graph, encoder: int, cotangent: Tensor, create_graph: bool = False) -> Tensor:
    """Grad-CAM without ReLU, ``Phi_i = <mean_i dy/dA_i, A_i>`` (eq. 3) for the linear combination ``cotangent`` ``[B,K]`` of logits."""
    return _by_channel(graph, encoder, cotangent, create_graph).sum(1)


def _by_channel(graph: Graph, encoder: int, cotangent: Tensor, create_graph: bool = False) -> Tensor:
    """What each channel adds to :func:`class_maps`, ``[B,C,h,w]``."""
    live = graph.nodes[encoder].out
    try:
        with torch.autocast(live.device.type, enabled=False):  # autograd runs under the caller's autocast
            (gradient,) = torch.autograd.grad(graph.logits, live, cotangent.to(graph.logits), retain_graph=True, create_graph=create_graph)
    except RuntimeError as error:
        raise UnsupportedLayerError(
            f"srd cannot differentiate the head from the encoder output {graph.name(encoder)!r} to the logits ({error}). "
            "Name another layer with encoder_output=, or use extremal_perturbation or rise."
        ) from error
    precise = torch.promote_types(live.dtype, torch.float32)
    return gradient.to(precise).mean((2, 3), keepdim=True) * live.to(precise)


def _clear_difference(graph: Graph, encoder: int, own: Tensor) -> Tensor | None:
    """``Phi^c - mean_k Phi^k`` from one pass through the head, where it is plainly more than rounding noise; None where it may not be.

    Noise is what is left where classes cancel (alike weights in the last layer) or channels do, so both are looked at.
    """
    last = graph.last_weighted()
    difference = own - torch.full_like(own, 1 / own.shape[1])
    if last is None or not last.requires_grad:
        return None
    slopes = (torch.autograd.grad(graph.logits, last, c, retain_graph=True, allow_unused=True)[0] for c in (own, difference))
    sizes = [torch.zeros(len(own)).to(own) if s is None else s.detach().abs().flatten(1).amax(1) for s in slopes]
    if not bool((sizes[1] > _PLAINLY * sizes[0]).all()):
        return None
    parts = _by_channel(graph, encoder, difference)
    relevance = parts.sum(1)
    gross = parts.abs().sum(1).amax((1, 2))
    return relevance if bool((relevance.abs().amax((1, 2)) > _PLAINLY * gross).all()) else None


def initial_relevance(
    graph: Graph, encoder: int, class_index: Tensor, start: Start, *, create_graph: bool = False, mean: Tensor | None = None
) -> Tensor:
    """``R^L`` ``[B,h,w]`` of one class per image.

    ``paper``: ``max(Phi^c - mean_k Phi^k, 0)`` (eqs. 3, 4, 9), set to zero where it is rounding noise. ``code``: the published code's
    ReLU'd Grad-CAM minus its spatial mean, signed. ``constant``: 1 everywhere (eq. 10).

    Args:
        mean: ``mean_k Phi^k`` if known (it is the same for every class).
    """
    live = graph.nodes[encoder].out
    if start == "constant":
        return torch.ones_like(live[:, 0], dtype=torch.promote_types(live.dtype, torch.float32))
    own = torch.nn.functional.one_hot(class_index, graph.logits.shape[1]).to(graph.logits)
    if start == "paper" and mean is None and not create_graph and own.shape[1] > 1:
        difference = _clear_difference(graph, encoder, own)
        if difference is not None:
            return difference.relu()
    phi = class_maps(graph, encoder, own, create_graph)
    if start == "code":
        cam = phi.relu()
        return cam - cam.mean((1, 2), keepdim=True)
    mean = mean_class_map(graph, encoder, create_graph) if mean is None else mean
    relevance = (phi - mean).relu()
    noise = 100 * torch.finfo(relevance.dtype).eps * phi.abs().amax((1, 2), keepdim=True)
    return torch.where(relevance.amax((1, 2), keepdim=True) <= noise, torch.zeros_like(relevance), relevance)


def neuron_relevance(graph: Graph, encoder: int, class_index: Tensor, relevance: Tensor, create_graph: bool = False) -> Tensor:
    """``R^L`` ``[B,C,h,w]`` of single neurons: ``(alpha_a^c - mean_k alpha_a^k) A_a,i`` where pixel i has relevance ``[B,h,w]``, else 0."""
    own = torch.nn.functional.one_hot(class_index, graph.logits.shape[1]).to(graph.logits)
    parts = _by_channel(graph, encoder, own - torch.full_like(own, 1 / own.shape[1]), create_graph)
    return torch.where(relevance[:, None] > 0, parts, torch.zeros_like(parts))


def mean_class_map(graph: Graph, encoder: int, create_graph: bool = False) -> Tensor:
    """``(1/K) sum_k Phi^k``: one backward pass of the head, because Phi is linear in the logits."""
    classes = graph.logits.shape[1]
    if classes == 1:
        raise ConfigError(
            "srd compares a class with the mean over classes (eq. 4), which is itself for one logit: give the classifier "
            "two logits [y, -y], or use start='code' or start='constant'."
        )
    return class_maps(graph, encoder, torch.full_like(graph.logits, 1 / classes), create_graph)
