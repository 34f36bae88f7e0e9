"Graph attention against the paper's equations written as plain loops, and what must hold for any graph"
import math
from dataclasses import replace
from functools import partial
import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from cryptoml.gat import (BlockSizes, CitationData, DynamicGraph, EdgeHead, GATConfig, GraphAttentionLayer,
                          GraphAttentionNetwork, attend_dense, block_graph, citation_experiment,
                          correlation_loss, drop, plot_attention_graph, to_edges)

CONFIG = GATConfig(n_in=4, n_out=3, n_hidden=5, n_heads=3, n_layers=3, out_heads=2, dropout=0.)


def model(config=CONFIG, seed=0, dtype=torch.float64):
    torch.manual_seed(seed)
    net = GraphAttentionNetwork(config).to(dtype)
    with torch.no_grad():
        for name, p in net.named_parameters():
            if name.endswith('bias'): p.normal_()
    return net


def case(B=2, N=6, seed=0, dtype=torch.float64, share=.4):
    "Nodes, a graph, weights and who is present"
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(B, N, 4, generator=g, dtype=dtype)
    graph = torch.rand(B, N, N, generator=g) < share
    weight = torch.rand(B, N, N, generator=g, dtype=dtype) + .1
    present = torch.rand(B, N, generator=g) < .7
    return x, graph, weight, present


def own_edges(N): return torch.eye(N, dtype=torch.bool)

def take(table, who): return table[:, who][:, :, who]

same = partial(torch.testing.assert_close, rtol=0, atol=1e-12)


# ---- the paper: one node, one neighbour, one head at a time --------------------------------------

def paper_head(W, a, x, i, neighbours, weight):
    "One head of node i: eqs. 1-4, neighbour by neighbour"
    z = {j: W.T @ x[j] for j in neighbours}
    e = {}
    for j in neighbours:
        s = np.concatenate(a) @ np.concatenate([z[i], z[j]])                      # eq. 1 with eq. 3
        e[j] = math.exp(s if s > 0 else .2 * s) * weight[j]
    total = sum(e.values())
    return sum(e[j] / total * z[j] for j in neighbours)                           # eqs. 2 and 4


def paper(net, x, graph, weight=None):
    "Eqs. 1-6 for one graph in float64 numpy"
    x = x.numpy()
    n = len(x)
    for layer in net.layers:
        W, a, bias = (p.detach().double().numpy() for p in (layer.W, layer.a, layer.bias))
        _, H, D = W.shape
        new = []
        for i in range(n):
            neighbours = [j for j in range(n) if graph[i, j] or i == j]
            given = {j: 1. if weight is None or not graph[i, j] else float(weight[i, j]) for j in neighbours}
            heads = [paper_head(W[:, k], a[:, k], x, i, neighbours, given) for k in range(H)]
            if layer is net.layers[-1]:
                new.append(sum(heads) / H + bias)                                 # eq. 6
            else:
                y = np.concatenate(heads) + bias                                  # eq. 5
                new.append(np.where(y > 0, y, np.expm1(np.minimum(y, 0))))        # ELU
        x = np.stack(new)
    return torch.from_numpy(x)


@pytest.mark.parametrize('weighted', [False, True])
def test_equals_the_paper(weighted):
    net = model()
    x, graph, weight, _ = case()
    weights = weight if weighted else [None] * len(x)
    want = torch.stack([paper(net, *one) for one in zip(x, graph, weights)])
    weight = weight if weighted else None
    same(net(x, graph, weight).states, want)
    same(net(x, *to_edges(graph, weight)).states, want)


def test_float32_agrees_with_float64():
    net = model()
    x, graph, weight, present = case()
    want = net(x, graph, weight, present).states.float()
    got = net.float()(x.float(), graph, weight.float(), present).states
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


# ---- table and list ------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), B=st.integers(1, 3), N=st.integers(1, 9),
       share=st.sampled_from([0., .2, .8, 1.]), weighted=st.booleans(), holes=st.booleans())
def test_table_and_list_agree(seed, B, N, share, weighted, holes):
    net = model(seed=seed, dtype=torch.float32)
    x, graph, weight, present = case(B, N, seed, torch.float32, share)
    if not weighted: weight = None
    if not holes: present = None
    edges, w = to_edges(graph, weight)
    table = net(x, graph, weight, present).states
    torch.testing.assert_close(table, net(x, edges, w, present).states, rtol=1e-6, atol=1e-6)


def test_gradients_of_table_and_list_agree():
    net = model()
    x, graph, weight, present = case()
    def gradients(*graph_and_weight):
        net.zero_grad()
        net(x, *graph_and_weight, present=present).states.square().sum().backward()
        return [p.grad.clone() for p in net.parameters()]
    for a, b in zip(gradients(graph, weight), gradients(*to_edges(graph, weight))):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_attention_of_table_and_list_agree():
    net = model()
    x, graph, _, present = case()
    edges, _ = to_edges(graph)
    table = net(x, graph, present=present, attention=True)
    listed = net(x, edges, present=present, attention=True)
    j, i = listed.edges
    for a, b in zip(table.attention, listed.attention):
        torch.testing.assert_close(a.sum(-1), torch.ones_like(a.sum(-1)))
        back = torch.zeros(2, 6, 6, a.shape[1], dtype=a.dtype)
        back[i // 6, i % 6, j % 6] = b
        same(back.permute(0, 3, 1, 2), a)


def test_attention_is_given_on_request_alone():
    x, graph, _, _ = case()
    out = model()(x, graph)
    assert out.attention is None
    assert out.edges is None


def test_parts_of_a_batch_are_the_batch():
    net = model()
    x, graph, weight, present = case(B=200, N=40)                    # 200 * 3 * 1600 scores: several parts
    whole = net(x, graph, weight, present, attention=True)
    for b in (0, 57, 199):
        alone = net(*(t[b:b + 1] for t in (x, graph, weight, present)), attention=True)
        same(alone.states[0], whole.states[b])
        for a, w in zip(alone.attention, whole.attention): same(a[0], w[b])


def test_one_graph_for_all():
    net = model()
    x, graph, weight, _ = case()
    twice = lambda table: table[:1].expand(2, -1, -1)
    torch.testing.assert_close(net(x, graph[0], weight[0]).states, net(x, twice(graph), twice(weight)).states)
    assert torch.equal(net(x).states, net(x, torch.ones(6, 6, dtype=torch.bool)).states)


def test_nothing_wide_is_stored_for_every_pair():
    c = GATConfig(4, 8, n_hidden=16, n_heads=4, dropout=0.)
    net = model(c)
    x, graph, _, _ = case(B=3, N=20)
    kept = []
    def keep(t):
        kept.append(t.numel())
        return t
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda t: t): net(x, graph)
    assert max(kept) <= 3 * 20 * 20 * 4


# ---- order, missing, alone -----------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_order_does_not_matter(seed):
    net = model(seed=seed)
    x, graph, weight, present = case(seed=seed)
    o = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    turned = net(x[:, o], take(graph, o), take(weight, o), present[:, o]).states
    same(turned, net(x, graph, weight, present).states[:, o])
    torch.manual_seed(seed)
    learnt = DynamicGraph(4, 8, k=2).double()
    head, _, past, _ = edges(seed=seed)
    same(learnt(x[:, o], present[:, o]), take(learnt(x, present), o))
    same(head(x[:, o], take(past, o), present[:, o]), take(head(x, past, present), o))


@pytest.mark.parametrize('filler', [float('nan'), float('inf'), 1e30])
@pytest.mark.parametrize('listed', [False, True])
def test_missing_nodes_change_nothing(filler, listed):
    net = model()
    x, graph, weight, present = case(N=9)
    dirty = x.masked_fill(~present[..., None], filler).requires_grad_()
    weight = weight.masked_fill(~(present[:, :, None] & present[:, None]), .5)
    form = to_edges(graph, weight) if listed else (graph, weight)
    out = net(dirty, *form, present=present).states
    for b in range(2):
        p = present[b]
        without = net(x[b:b + 1, p], take(graph[b:b + 1], p), take(weight[b:b + 1], p)).states[0]
        same(out[b, p], without)
    assert not out[~present].any()
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters())
    assert dirty.grad.isfinite().all()
    assert not dirty.grad[~present].any()


def test_nobody_present():
    net = model()
    x, graph, _, _ = case()
    none = torch.zeros(2, 6, dtype=torch.bool)
    for g in (None, graph, to_edges(graph)[0]): assert not net(x, g, present=none).states.any()
    alone = torch.eye(6, dtype=torch.float64).expand(2, -1, -1)
    assert torch.equal(DynamicGraph(4, 8, k=2).double()(x, none), alone)
    head, _, past, _ = edges()
    assert torch.equal(head(x, past, none), head(0 * x, past))


def test_alone_it_attends_to_itself():
    x, _, _, _ = case()
    nobody = torch.zeros(2, 6, 6, dtype=torch.bool)
    seen = model()(x, nobody, attention=True)
    for a in seen.attention: assert torch.equal(a, torch.eye(6, dtype=a.dtype).expand_as(a))
    for edges in (to_edges(nobody)[0], torch.empty(2, 0, dtype=torch.int64)):
        same(model()(x, edges).states, seen.states)


def test_a_layer_over_one_node_is_its_linear_map():
    layer = model().layers[0]
    x = case()[0][:, :1]
    want = torch.einsum('bnf,fhd->bnhd', x, layer.W).flatten(2) + layer.bias
    torch.testing.assert_close(layer(x, attend_dense)[0], want)


def test_own_edges_are_not_counted_twice():
    net = model()
    x, graph, weight, _ = case()
    own = own_edges(6)
    same(net(x, to_edges(graph | own)[0]).states, net(x, to_edges(graph & ~own)[0]).states)
    same(net(x, *to_edges(graph | own, weight)).states, net(x, graph | own, weight).states)


def test_large_scores_stay_finite():
    net = model(dtype=torch.float32)
    x, graph, _, _ = case(dtype=torch.float32)
    for g in (None, graph, to_edges(graph)[0]):
        x1 = (1e4 * x).requires_grad_()
        out = net(x1, g).states
        out.sum().backward()
        assert out.isfinite().all()
        assert x1.grad.isfinite().all()


# ---- gradients, training -------------------------------------------------------------------------

SMALLEST = GATConfig(3, 2, n_hidden=2, n_heads=2, dropout=0.)

def number(*shape): return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

def test_gradients_through_the_learnt_graph_by_finite_differences():
    net = model(SMALLEST)
    torch.manual_seed(0)
    learnt = DynamicGraph(3, 4, k=2).double()
    states = lambda x: net(x, weight=learnt(x)).states
    x = number(2, 5, 3)
    torch.autograd.gradcheck(states, x)
    torch.autograd.gradgradcheck(states, x)


def test_gradients_of_table_and_list_by_finite_differences():
    net = model(SMALLEST)
    x = number(2, 5, 3)
    table = torch.rand(2, 5, 5) < .5
    edges, _ = to_edges(table)
    weights = lambda *shape: torch.rand(*shape, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, w: net(x, table, w).states, (x, weights(2, 5, 5)))
    torch.autograd.gradcheck(lambda x, w: net(x, edges, w).states, (x, weights(edges.shape[1])))


def test_gradients_of_the_edge_head_by_finite_differences():
    torch.manual_seed(0)
    head = EdgeHead(3, 2).double()
    with torch.no_grad(): head.signs += 1
    past = torch.randn(2, 5, 5, 2, dtype=torch.float64)
    torch.autograd.gradcheck(lambda x, past: correlation_loss(head(x, past), torch.zeros(2, 5, 5))[0],
                             (number(2, 5, 3), past.requires_grad_()))


def test_a_zero_weight_has_no_gradient_problem():
    net = model()
    x, _, weight, _ = case()
    weight = (weight * (weight > .5)).requires_grad_()
    net(x, weight=weight).states.sum().backward()
    assert weight.grad.isfinite().all()
    assert not weight.grad[weight == 0].any()


def test_every_parameter_is_used():
    net = model()
    x, graph, _, _ = case()
    learnt = DynamicGraph(4, 8, k=2).double()
    head, _, past, _ = edges()
    states = net(x, weight=learnt(x)).states
    rho = head(x, past)
    (states.square().sum() + rho.square().sum()).backward()
    for m in (net, head): assert all(p.grad is not None and p.grad.any() for p in m.parameters())
    for m in (learnt.query, learnt.key): assert m.weight.grad.any()


def test_functional_gradients():
    net = model()
    x, graph, _, _ = case()
    loss = lambda p: torch.func.functional_call(net, p, (x, graph)).states.square().sum()
    params = {k: v.detach() for k, v in net.named_parameters()}
    got = torch.func.grad(loss)(params)
    net.zero_grad()
    net(x, graph).states.square().sum().backward()
    for k, p in net.named_parameters(): torch.testing.assert_close(got[k], p.grad)


def descend(net, x, graph, y, present=None, steps=30):
    "Nats after some steps of training"
    opt = torch.optim.Adam(net.parameters(), lr=.01)
    for _ in range(steps):
        loss = F.cross_entropy(net(x, graph, present=present).states.flatten(0, 1), y.flatten())
        opt.zero_grad()
        loss.backward()
        opt.step()
    return loss.item()


def trained(seed, listed):
    "Weights after some steps of training"
    torch.manual_seed(seed)
    net = GraphAttentionNetwork(GATConfig(4, 3, dropout=.2))
    x, graph, _, present = case(B=8, dtype=torch.float32)
    y = torch.randint(3, (8, 6))
    descend(net, x, to_edges(graph)[0] if listed else graph, y, present)
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize('listed', [False, True])
def test_same_seed_same_bits(listed):
    assert torch.equal(trained(1, listed), trained(1, listed))
    assert not torch.equal(trained(1, listed), trained(2, listed))


@pytest.mark.parametrize('listed', [False, True])
def test_overfits_one_batch(listed):
    torch.manual_seed(0)
    net = GraphAttentionNetwork(GATConfig(4, 3, n_hidden=16, dropout=0.))
    x, graph, _, _ = case(B=4, dtype=torch.float32, share=.2)
    y = torch.randint(3, (4, 6))
    nats = descend(net, x, to_edges(graph)[0] if listed else graph, y, steps=300)
    assert nats < .02, f'nats after 300 steps: {nats:.3f}'


def test_dropout_falls_on_inputs_and_weights():
    torch.manual_seed(0)
    layer = GraphAttentionLayer(8, 4, 2, dropout=.5)
    x = torch.randn(1, 30, 8)
    given_p = []
    def attend(h, left, right, p):
        given_p.append(p)
        return attend_dense(h, left, right, p)
    with torch.no_grad():
        want = layer.eval()(x, attend_dense)[0]
        layer.train()
        layer(x, attend)
        assert given_p == [.5]
        assert not torch.equal(layer(x, attend_dense)[0], layer(x, attend_dense)[0])
        assert torch.equal(layer.eval()(x, attend_dense)[0], want)


def test_dropout_keeps_the_mean():
    torch.manual_seed(0)
    given = torch.randn(1, 30, 2, 4), torch.randn(1, 30, 2), torch.randn(1, 30, 2)
    mean = torch.stack([attend_dense(*given, .5)[0] for _ in range(1500)]).mean(0)
    torch.testing.assert_close(mean, attend_dense(*given, 0.)[0], rtol=0, atol=.05)


def test_sparse_input_is_the_dense_input():
    net = model(dtype=torch.float32)
    x = torch.randn(12, 4) * (torch.rand(12, 4) < .3)
    edges = torch.randint(12, (2, 30)).unique(dim=1)
    sparse = x.to_sparse().coalesce()
    a = net(x, edges).states
    b = net(sparse, edges).states
    torch.testing.assert_close(a, b)
    ga, gb = (torch.autograd.grad(out.square().sum(), net.layers[0].W)[0] for out in (a, b))
    torch.testing.assert_close(ga, gb)
    torch.manual_seed(0)
    left = drop(sparse, .5).to_dense()
    assert set((left[x != 0] / x[x != 0]).tolist()) == {0., 2.}
    assert not left[x == 0].any()


def test_bfloat16_autocast():
    net = model(dtype=torch.float32)
    x, graph, weight, present = case(dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        for g in ((graph, weight), to_edges(graph, weight), (None, None)):
            got = net(x, *g, present=present).states.float()
            want = net.float()(x, *g, present=present).states.float()
            torch.testing.assert_close(got, want, rtol=.1, atol=.1)


# ---- dynamic graph -------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(0, 7), holes=st.booleans())
def test_keeps_exactly_the_best(seed, k, holes):
    x, _, _, present = case(seed=seed)
    present = present if holes else torch.ones(2, 6, dtype=torch.bool)
    torch.manual_seed(seed)
    learnt = DynamicGraph(4, 8, k=k).double()
    w = learnt(x, present).detach()
    for b in range(2):
        q, key = (m(x[b]).detach().numpy() for m in (learnt.query, learnt.key))
        for i in range(6):
            s = {j: q[i] @ key[j] / math.sqrt(8) for j in range(6)}
            others = [j for j in range(6) if j != i and present[b, j] and present[b, i]]
            keep = [i] + sorted(others, key=lambda j: -s[j])[:k]
            total = sum(math.exp(s[j]) for j in keep)
            want = [math.exp(s[j]) / total if j in keep else 0 for j in range(6)]
            assert np.allclose(w[b, i], want, rtol=0, atol=1e-12)


def test_k_may_change():
    x, _, _, _ = case()
    learnt = DynamicGraph(4, 8).double()
    assert (learnt(x) > 0).all()
    learnt.k = 1
    assert ((learnt(x) > 0).sum(-1) == 2).all()


# ---- edges ---------------------------------------------------------------------------------------

def edges(spans=2, seed=0):
    "A head that has learnt something, and what it reads: states [2, 6, 4], past [2, 6, 6, E], present [2, 6]"
    torch.manual_seed(seed)
    head = EdgeHead(4, spans, 3).double()
    with torch.no_grad():
        for p in head.parameters(): p += .5 * torch.randn_like(p)
    x, _, _, present = case(seed=seed)
    past = torch.randn(2, 6, 6, spans, dtype=torch.float64)
    return head, x, past + past.transpose(1, 2), present


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([.01, 1., 30.]))
def test_the_edge_head_by_a_loop_over_pairs(seed, scale):
    head, x, past, present = edges(seed=seed)
    got = head(scale * x, past, present).detach()
    assert torch.allclose(got, got.mT, rtol=0, atol=1e-12)
    u = (head.loadings(torch.where(present[..., None], scale * x, 0))).tanh()
    for b in range(2):
        for i in range(6):
            for j in range(6):
                want = head.shift + (head.slopes * past[b, i, j]).sum() + (head.signs * u[b, i] * u[b, j]).sum()
                assert abs(got[b, i, j] - want) < 1e-9


@pytest.mark.parametrize('spans', [1, 3])
def test_an_untrained_edge_head_is_the_longest_span(spans):
    _, x, past, present = edges(spans)
    assert torch.equal(EdgeHead(4, spans).double()(x, past, present), past[..., -1])


def test_an_unknown_past_is_the_mean_of_what_is_known():
    head, x, past, _ = edges()
    everybody = torch.ones(2, 6, dtype=torch.bool)
    everybody[1, 5] = False
    past[:, range(6), range(6)] = float('nan')
    past[:, 0, 1] = past[:, 1, 0] = float('nan')
    filled = past.clone()
    for b, n in ((0, 6), (1, 5)):                                        # a missing node says nothing of the others
        filled[b][past[b].isnan()] = past[b, :n, :n].nanmean((0, 1)).repeat(int(past[b, ..., 0].isnan().sum()))
    torch.testing.assert_close(head(x, past, everybody), head(x, filled, everybody))
    nothing = torch.full_like(past, float('nan'))
    torch.testing.assert_close(head(x, nothing), head(x, 0 * filled))
    head(x, nothing).sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())
    with pytest.raises(ValueError, match='of 1 spans, the head was built for 2'): head(x, past[..., :1])


def test_loss_is_over_the_pairs_known_from_both_sides():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(3, 5, 5, generator=g) for _ in range(2))
    a, b = a + a.mT, b + b.mT
    b[0, 1, 2] = float('nan')                                            # from one side only
    b[1, 3] = float('nan')
    pairs = [(n, i, j) for n in range(3) for i in range(5) for j in range(i + 1, 5)]
    counted = [(n, i, j) for n, i, j in pairs if b[n, i, j].isfinite() and b[n, j, i].isfinite()]
    want = sum((a[k] - b[k]) ** 2 for k in counted) / len(counted)
    loss, share = correlation_loss(a, b)
    torch.testing.assert_close(loss, want)
    assert share == pytest.approx(len(counted) / len(pairs))


@pytest.mark.parametrize('N', [1, 2])
def test_loss_without_a_pair(N):
    none = torch.full((2, N, N), float('nan'))
    assert [v.item() for v in correlation_loss(torch.zeros(2, N, N), none)] == [0, 0]


# ---- citations -----------------------------------------------------------------------------------

SMALL = BlockSizes(n=400, n_features=200, n_classes=4, n_edges=1200, words=10, topical=.3,
                   labelled=10, validation=100, test=200)


def test_citations_need_their_edges():
    r = citation_experiment(block_graph(SMALL), epochs=60)
    assert r.with_edges.accuracy > r.without_edges.accuracy + .15
    assert r.with_edges.epochs == len(r.with_edges.validation_loss) == len(r.with_edges.validation_accuracy)


def test_citations_come_as_arrays_in_any_scale_and_direction():
    data = block_graph(SMALL)
    r = citation_experiment(data, epochs=60)
    assert citation_experiment(CitationData(*(t.numpy() for t in data)), epochs=60) == r
    both_ways = torch.cat([data.edges.flip(0), data.edges], 1)
    turned = citation_experiment(data._replace(features=data.features * 3, edges=both_ways), epochs=60)
    assert turned.with_edges.accuracy == pytest.approx(r.with_edges.accuracy, abs=.01)


def test_patience():
    r = citation_experiment(block_graph(SMALL), epochs=400, patience=5).with_edges
    surest = lambda k: r.validation_loss[k] <= min(r.validation_loss[:k + 1])
    most_right = lambda k: r.validation_accuracy[k] >= max(r.validation_accuracy[:k + 1])
    best = [k for k in range(r.epochs) if surest(k) or most_right(k)]
    assert r.epochs < 400
    assert best[-1] == r.epochs - 1 - 5
    assert r.chosen in best


def test_block_graph_is_drawn_from_its_seed():
    a = block_graph(SMALL)
    assert all(torch.equal(x, y) for x, y in zip(a, block_graph(SMALL)))
    assert not torch.equal(a.features, block_graph(SMALL, seed=1).features)


def test_block_graph_has_its_sizes():
    a = block_graph(SMALL)
    assert isinstance(a, CitationData)
    assert a.features.shape == (400, 200)
    assert set(a.features.unique().tolist()) == {0., 1.}
    assert a.edges.max() < 400


def test_without_classes_a_quarter_of_the_edges_stays_inside():
    a = block_graph(replace(SMALL, inside=0.))
    citing, cited = a.labels[a.edges]
    assert (citing == cited).float().mean() == pytest.approx(.25, abs=.06)


def test_features_and_labels_must_fit():
    a = block_graph(SMALL)
    with pytest.raises(ValueError, match='399 rows of features for 400 labels'):
        citation_experiment(a._replace(features=a.features[1:]))


# ---- refusals, picture ---------------------------------------------------------------------------

@pytest.mark.parametrize('change, message', [
    (dict(graph=torch.ones(2, 5, 5, dtype=torch.bool)), 'graph .2, 5, 5., wanted .2, 6, 6.'),
    (dict(weight=torch.ones(6)), 'weight .6,., wanted'),
    (dict(present=torch.ones(2, 5, dtype=torch.bool)), 'present'),
    (dict(present=torch.ones(2, 6)), 'wanted bool'),
    (dict(graph=torch.zeros(3, 4, dtype=torch.int64)), 'wanted .2, E.'),
    (dict(graph=torch.tensor([[-1], [0]])), 'name nodes -1 to 0'),
    (dict(graph=torch.tensor([[1], [0]]), weight=torch.ones(2)), 'weight .2,., wanted .1,.'),
    (dict(graph=torch.tensor([[1, 2, 1], [0, 0, 0]])), '1 of 3 edges are there twice'),
], ids=['fewer nodes in the table', 'a weight a node', 'fewer present', 'present as numbers', 'three rows of edges',
        'a node below 0', 'two weights for one edge', 'an edge twice'])
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message): model()(case()[0], **change)


@pytest.mark.parametrize('shape', [(2, 0, 4), (0, 6, 4), (0, 4)], ids=str)
def test_a_graph_of_no_nodes(shape):
    edges = dict(graph=torch.zeros(2, 0, dtype=torch.int64)) if len(shape) == 2 else {}
    with pytest.raises(ValueError, match='has no node'): model()(torch.zeros(shape), **edges)


@pytest.mark.parametrize('listed', [False, True], ids=['table', 'list'])
@pytest.mark.parametrize('infinite', [(1,), (1, 3)], ids=['one', 'two'])
def test_an_infinite_weight_is_the_limit_of_large_ones(listed, infinite):
    net, (x, _, weight, _) = model(), case(B=1)
    def states(largest):
        w = weight.clone()
        w[0, 0, list(infinite)] = largest
        if not listed: return net(x, weight=w).states[0]
        edges, w = to_edges(w > 0, w)
        return net(x[0], edges, w).states
    torch.testing.assert_close(states(math.inf), states(1e30), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize('bad, message', [
    (dict(n_in=0), "must be at least 1: {'n_in': 0}"),
    (dict(n_layers=0), "must be at least 1: {'n_layers': 0}"),
    (dict(dropout=1.), 'dropout must be in'),
    (dict(dropout=-.1), 'dropout must be in'),
])
def test_config_refuses(bad, message):
    with pytest.raises(ValueError, match=message): GATConfig(**dict(n_in=4, n_out=2) | bad)


def test_picture_has_the_strongest_arrows():
    import matplotlib.pyplot as plt
    a = torch.tensor([[.5, .5, 0.], [.1, .9, 0.], [.3, .2, .5]], dtype=torch.float64)
    before = a.clone()
    ax = plot_attention_graph(a, list('abc'), strongest=2)
    texts = [t.get_text() for t in ax.texts]
    assert [t for t in texts if t] == list('abc')
    assert texts.count('') == 2                                    # arrows
    assert torch.equal(a, before), 'the caller keeps its diagonal'
    plot_attention_graph(torch.ones(1, 1))
    plt.close('all')


def test_agrees_with_pytorch_geometric():
    pyg = pytest.importorskip('torch_geometric.nn', reason='torch_geometric is not installed')
    torch.manual_seed(0)
    layer = GraphAttentionLayer(4, 5, 3, 0.).double()
    x, _, _, _ = case()
    theirs = pyg.GATConv(4, 5, heads=3, add_self_loops=False).double()
    with torch.no_grad():
        theirs.lin.weight.copy_(layer.W.flatten(1).T)
        theirs.att_dst[0].copy_(layer.a[0])
        theirs.att_src[0].copy_(layer.a[1])
    everyone, _ = to_edges(torch.ones(2, 6, 6, dtype=torch.bool))
    same(theirs(x.flatten(0, 1), everyone).view(2, 6, -1), layer(x, attend_dense)[0])
