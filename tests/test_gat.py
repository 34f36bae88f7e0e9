"Graph attention against the paper's equations written as plain loops, and what must hold for any graph"
import math
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch.nn import functional as F
from cryptoml.gat import (CitationData, DynamicGraph, EdgeHead, GATConfig, GraphAttentionLayer, GraphAttentionNetwork, attend_dense, block_graph,
                          citation_experiment, correlation, correlation_loss, drop, plot_attention_graph, to_edges)

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
    return (torch.randn(B, N, 4, generator=g, dtype=dtype), torch.rand(B, N, N, generator=g) < share,
            torch.rand(B, N, N, generator=g, dtype=dtype) + .1, torch.rand(B, N, generator=g) < .7)


# ---- the paper: one node, one neighbour, one head at a time ------------------------------------------------------------

def paper(net, x, graph, weight=None):
    "Eqs. 1-6 for one graph in float64 numpy, dict of neighbours to weights first"
    x, n = x.numpy(), len(x)
    for depth, layer in enumerate(net.layers):
        W, a, bias = (p.detach().double().numpy() for p in (layer.W, layer.a, layer.bias))
        H, D = W.shape[1:]
        new = []
        for i in range(n):
            heads = []
            for k in range(H):
                neighbours = [j for j in range(n) if graph[i, j] or i == j]
                e, z = {}, {j: W[:, k].T @ x[j] for j in neighbours}
                for j in neighbours:
                    s = np.concatenate([a[0, k], a[1, k]]) @ np.concatenate([z[i], z[j]])                # eq. 1 with eq. 3
                    e[j] = math.exp(s if s > 0 else .2 * s) * (1. if weight is None or not graph[i, j] else float(weight[i, j]))
                total = sum(e.values())
                heads.append(sum(e[j] / total * z[j] for j in neighbours))                                # eqs. 2 and 4
            y = (np.concatenate(heads) if depth < len(net.layers) - 1 else sum(heads) / H) + bias         # eq. 5, eq. 6
            new.append(np.where(y > 0, y, np.expm1(np.minimum(y, 0))) if depth < len(net.layers) - 1 else y)
        x = np.stack(new)
    return torch.from_numpy(x)


@pytest.mark.parametrize('weighted', [False, True])
def test_equals_the_paper(weighted):
    net, (x, graph, weight, _) = model(), case()
    weight = weight if weighted else None
    want = torch.stack([paper(net, x[b], graph[b], None if weight is None else weight[b]) for b in range(len(x))])
    torch.testing.assert_close(net(x, graph, weight).states, want, rtol=0, atol=1e-12)
    torch.testing.assert_close(net(x, *to_edges(graph, weight)).states, want, rtol=0, atol=1e-12)


def test_float32_agrees_with_float64():
    net, (x, graph, weight, present) = model(), case()
    want = net(x, graph, weight, present).states
    torch.testing.assert_close(net.float()(x.float(), graph, weight.float(), present).states, want.float(), rtol=1e-5, atol=1e-5)


# ---- table and list ----------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), B=st.integers(1, 3), N=st.integers(1, 9), share=st.sampled_from([0., .2, .8, 1.]), weighted=st.booleans(), holes=st.booleans())
def test_table_and_list_agree(seed, B, N, share, weighted, holes):
    net, (x, graph, weight, present) = model(seed=seed, dtype=torch.float32), case(B, N, seed, torch.float32, share)
    weight, present = weight if weighted else None, present if holes else None
    edges, w = to_edges(graph, weight)
    torch.testing.assert_close(net(x, graph, weight, present).states, net(x, edges, w, present).states, rtol=1e-6, atol=1e-6)


def test_gradients_of_table_and_list_agree():
    net, (x, graph, weight, present) = model(), case()
    def gradients(*graph_and_weight):
        net.zero_grad()
        net(x, *graph_and_weight, present=present).states.square().sum().backward()
        return [p.grad.clone() for p in net.parameters()]
    for a, b in zip(gradients(graph, weight), gradients(*to_edges(graph, weight))): torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_attention_of_table_and_list_agree():
    net, (x, graph, _, present) = model(), case()
    table, listed = net(x, graph, present=present, attention=True), net(x, to_edges(graph)[0], present=present, attention=True)
    j, i = listed.edges
    for a, b in zip(table.attention, listed.attention):
        torch.testing.assert_close(a.sum(-1), torch.ones_like(a.sum(-1)))
        back = torch.zeros(2, 6, 6, a.shape[1], dtype=a.dtype)
        back[i // 6, i % 6, j % 6] = b
        torch.testing.assert_close(back.permute(0, 3, 1, 2), a, rtol=0, atol=1e-12)
    assert net(x, graph).attention is None and net(x, graph).edges is None


def test_parts_of_a_batch_are_the_batch():
    net, (x, graph, weight, present) = model(), case(B=200, N=40)                    # 200 * 3 * 1600 scores: several parts
    whole = net(x, graph, weight, present, attention=True)
    for b in (0, 57, 199):
        alone = net(x[b:b + 1], graph[b:b + 1], weight[b:b + 1], present[b:b + 1], attention=True)
        torch.testing.assert_close(alone.states[0], whole.states[b], rtol=0, atol=1e-12)
        for a, w in zip(alone.attention, whole.attention): torch.testing.assert_close(a[0], w[b], rtol=0, atol=1e-12)


def test_one_graph_for_all():
    net, (x, graph, weight, _) = model(), case()
    torch.testing.assert_close(net(x, graph[0], weight[0]).states, net(x, graph[:1].expand(2, -1, -1), weight[:1].expand(2, -1, -1)).states)
    assert torch.equal(net(x).states, net(x, torch.ones(6, 6, dtype=torch.bool)).states)


def test_nothing_wide_is_stored_for_every_pair():
    c = GATConfig(4, 8, n_hidden=16, n_heads=4, dropout=0.)
    net, (x, graph, _, _) = model(c), case(B=3, N=20)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t): net(x, graph)
    assert max(kept) <= 3 * 20 * 20 * 4


# ---- order, missing, alone ---------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6))
def test_order_does_not_matter(seed):
    net, (x, graph, weight, present) = model(seed=seed), case(seed=seed)
    o = torch.randperm(6, generator=torch.Generator().manual_seed(seed))
    out, turned = net(x, graph, weight, present).states, net(x[:, o], graph[:, o][:, :, o], weight[:, o][:, :, o], present[:, o]).states
    torch.testing.assert_close(turned, out[:, o], rtol=0, atol=1e-12)
    torch.manual_seed(seed)
    learnt, head = DynamicGraph(4, 8, k=2).double(), EdgeHead(4, 3).double()
    torch.testing.assert_close(learnt(x[:, o], present[:, o]), learnt(x, present)[:, o][:, :, o], rtol=0, atol=1e-12)
    torch.testing.assert_close(head(x[:, o], present=present[:, o]), head(x, present=present)[:, o][:, :, o], rtol=0, atol=1e-12)


@pytest.mark.parametrize('filler', [float('nan'), float('inf'), 1e30])
@pytest.mark.parametrize('listed', [False, True])
def test_missing_nodes_change_nothing(filler, listed):
    net, (x, graph, weight, present) = model(), case(N=9)
    dirty = x.masked_fill(~present[..., None], filler).requires_grad_()
    weight = weight.masked_fill(~(present[:, :, None] & present[:, None]), .5)
    out = net(dirty, *(to_edges(graph, weight) if listed else (graph, weight)), present=present).states
    for b in range(2):
        p = present[b]
        torch.testing.assert_close(out[b, p], net(x[b:b + 1, p], graph[b:b + 1, p][:, :, p], weight[b:b + 1, p][:, :, p]).states[0], rtol=0, atol=1e-12)
    assert not out[~present].any()
    out.square().sum().backward()
    assert all(p.grad.isfinite().all() for p in net.parameters()) and dirty.grad.isfinite().all() and not dirty.grad[~present].any()


def test_nobody_present():
    net, (x, graph, _, _) = model(), case()
    none = torch.zeros(2, 6, dtype=torch.bool)
    for g in (None, graph, to_edges(graph)[0]): assert not net(x, g, present=none).states.any()
    assert torch.equal(DynamicGraph(4, 8, k=2).double()(x, none), torch.eye(6, dtype=torch.float64).expand(2, -1, -1))
    assert torch.equal(EdgeHead(4).double()(x, present=none), torch.eye(6, dtype=torch.float64).expand(2, -1, -1))


def test_alone_it_attends_to_itself():
    layer, (x, _, _, _) = model().layers[0], case()
    nobody = torch.zeros(2, 6, 6, dtype=torch.bool)
    seen = model()(x, nobody, attention=True)
    assert all(torch.equal(a, torch.eye(6, dtype=a.dtype).expand_as(a)) for a in seen.attention)
    for g in (nobody, to_edges(nobody)[0], torch.empty(2, 0, dtype=torch.int64)): torch.testing.assert_close(model()(x, g).states, seen.states, rtol=0, atol=1e-12)
    torch.testing.assert_close(layer(x[:, :1], attend_dense)[0], torch.einsum('bnf,fhd->bnhd', x[:, :1], layer.W).flatten(2) + layer.bias)


def test_own_edges_are_not_counted_twice():
    net, (x, graph, weight, _) = model(), case()
    own = torch.eye(6, dtype=torch.bool)
    torch.testing.assert_close(net(x, to_edges(graph | own)[0]).states, net(x, to_edges(graph & ~own)[0]).states, rtol=0, atol=1e-12)
    torch.testing.assert_close(net(x, *to_edges(graph | own, weight)).states, net(x, graph | own, weight).states, rtol=0, atol=1e-12)


def test_large_scores_stay_finite():
    net, (x, graph, _, _) = model(dtype=torch.float32), case(dtype=torch.float32)
    for g in (None, graph, to_edges(graph)[0]):
        x1 = (1e4 * x).requires_grad_()
        out = net(x1, g).states; out.sum().backward()
        assert out.isfinite().all() and x1.grad.isfinite().all()


# ---- gradients, training -----------------------------------------------------------------------------------------------

def test_gradients_by_finite_differences():
    c = GATConfig(3, 2, n_hidden=2, n_heads=2, dropout=0.)
    net = model(c)
    torch.manual_seed(0); learnt = DynamicGraph(3, 4, k=2).double()
    x = torch.randn(2, 5, 3, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x: net(x, weight=learnt(x)).states, x)
    torch.autograd.gradgradcheck(lambda x: net(x, weight=learnt(x)).states, x)
    w = torch.rand(2, 5, 5, dtype=torch.float64, requires_grad=True)
    mask = torch.rand(2, 5, 5) < .5
    torch.autograd.gradcheck(lambda x, w: net(x, mask, w).states, (x, w))
    edges, _ = to_edges(mask)
    v = torch.rand(edges.shape[1], dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda x, v: net(x, edges, v).states, (x, v))
    head, past = EdgeHead(3, 2, past=True).double(), correlation(torch.randn(2, 5, 20, dtype=torch.float64))
    torch.autograd.gradcheck(lambda x: correlation_loss(head(x, past), past), x)


def test_a_zero_weight_has_no_gradient_problem():
    net, (x, _, weight, _) = model(), case()
    weight = (weight * (weight > .5)).requires_grad_()
    net(x, weight=weight).states.sum().backward()
    assert weight.grad.isfinite().all() and not weight.grad[(weight == 0)].any()


def test_every_parameter_is_used():
    net, (x, graph, _, _) = model(), case()
    learnt, head = DynamicGraph(4, 8, k=2).double(), EdgeHead(4, past=True).double()
    states = net(x, weight=learnt(x)).states
    (states.square().sum() + head(x, torch.zeros(2, 6, 6).double()).square().sum()).backward()
    for m in (net, head): assert all(p.grad is not None and p.grad.any() for p in m.parameters())
    assert learnt.query.weight.grad.any() and learnt.key.weight.grad.any()


def test_functional_gradients():
    net, (x, graph, _, _) = model(), case()
    loss = lambda p: torch.func.functional_call(net, p, (x, graph)).states.square().sum()
    params = {k: v.detach() for k, v in net.named_parameters()}
    got = torch.func.grad(loss)(params)
    net.zero_grad(); net(x, graph).states.square().sum().backward()
    for k, p in net.named_parameters(): torch.testing.assert_close(got[k], p.grad)


def train(seed, listed=False, steps=30):
    torch.manual_seed(seed)
    c = GATConfig(4, 3, dropout=.2)
    net, (x, graph, _, present) = GraphAttentionNetwork(c), case(B=8, dtype=torch.float32)
    graph, y = to_edges(graph)[0] if listed else graph, torch.randint(3, (8, 6))
    opt = torch.optim.Adam(net.parameters(), lr=.01)
    for _ in range(steps):
        loss = F.cross_entropy(net(x, graph, present=present).states.flatten(0, 1), y.flatten())
        opt.zero_grad(); loss.backward(); opt.step()
    return torch.cat([p.detach().flatten() for p in net.parameters()])


@pytest.mark.parametrize('listed', [False, True])
def test_same_seed_same_bits(listed):
    assert torch.equal(train(1, listed), train(1, listed)) and not torch.equal(train(1, listed), train(2, listed))


@pytest.mark.parametrize('listed', [False, True])
def test_overfits_one_batch(listed):
    torch.manual_seed(0)
    net, (x, graph, _, _) = GraphAttentionNetwork(GATConfig(4, 3, n_hidden=16, dropout=0.)), case(B=4, dtype=torch.float32, share=.2)
    y, graph = torch.randint(3, (4, 6)), to_edges(graph)[0] if listed else graph
    opt = torch.optim.Adam(net.parameters(), lr=.01)
    for _ in range(300):
        loss = F.cross_entropy(net(x, graph).states.flatten(0, 1), y.flatten())
        opt.zero_grad(); loss.backward(); opt.step()
    assert loss.item() < .02, f'nats after 300 steps: {loss.item():.3f}'


def test_dropout_falls_on_inputs_and_weights():
    torch.manual_seed(0)
    layer, x = GraphAttentionLayer(8, 4, 2, dropout=.5), torch.randn(1, 30, 8)
    with torch.no_grad():
        want = layer.eval()(x, attend_dense)[0]
        layer.train()
        given_p = []
        layer(x, lambda h, left, right, p: given_p.append(p) or attend_dense(h, left, right, p))
        assert given_p == [.5] and not torch.equal(layer(x, attend_dense)[0], layer(x, attend_dense)[0])
        h, left, right = torch.randn(1, 30, 2, 4), torch.randn(1, 30, 2), torch.randn(1, 30, 2)
        mean = torch.stack([attend_dense(h, left, right, .5)[0] for _ in range(1500)]).mean(0)
        torch.testing.assert_close(mean, attend_dense(h, left, right, 0.)[0], rtol=0, atol=.05)
    assert layer.eval()(x, attend_dense)[0].equal(want)


def test_sparse_input_is_the_dense_input():
    net = model(dtype=torch.float32)
    x, edges = torch.randn(12, 4) * (torch.rand(12, 4) < .3), torch.randint(12, (2, 30)).unique(dim=1)
    sparse = x.to_sparse().coalesce()
    a, b = net(x, edges).states, net(sparse, edges).states
    torch.testing.assert_close(a, b)
    ga, gb = (torch.autograd.grad(o.square().sum(), net.layers[0].W)[0] for o in (a, b))
    torch.testing.assert_close(ga, gb)
    torch.manual_seed(0); left = drop(sparse, .5).to_dense()
    assert set((left[x != 0] / x[x != 0]).tolist()) == {0., 2.} and not left[x == 0].any()


def test_bfloat16_autocast():
    net, (x, graph, weight, present) = model(dtype=torch.float32), case(dtype=torch.float32)
    with torch.autocast('cpu', torch.bfloat16):
        for g in ((graph, weight), to_edges(graph, weight), (None, None)):
            torch.testing.assert_close(net(x, *g, present=present).states.float(), net.float()(x, *g, present=present).states.float(), rtol=.1, atol=.1)


# ---- dynamic graph -----------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), k=st.integers(0, 7), holes=st.booleans())
def test_keeps_exactly_the_best(seed, k, holes):
    x, _, _, present = case(seed=seed)
    present = present if holes else torch.ones(2, 6, dtype=torch.bool)
    torch.manual_seed(seed); learnt = DynamicGraph(4, 8, k=k).double()
    w = learnt(x, present).detach()
    for b in range(2):
        q, key = learnt.query(x[b]).detach().numpy(), learnt.key(x[b]).detach().numpy()
        for i in range(6):
            s = {j: q[i] @ key[j] / math.sqrt(8) for j in range(6)}
            others = [j for j in range(6) if j != i and present[b, j] and present[b, i]]
            keep = [i] + sorted(others, key=lambda j: -s[j])[:k]
            total = sum(math.exp(s[j]) for j in keep)
            assert np.allclose(w[b, i], [math.exp(s[j]) / total if j in keep else 0 for j in range(6)], rtol=0, atol=1e-12)


def test_k_may_change():
    x, _, _, _ = case()
    learnt = DynamicGraph(4, 8).double()
    assert (learnt(x) > 0).all()
    learnt.k = 1
    assert ((learnt(x) > 0).sum(-1) == 2).all()


# ---- edges -------------------------------------------------------------------------------------------------------------

@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10**6), scale=st.sampled_from([.01, 1., 30.]))
def test_forecast_is_a_correlation_matrix(seed, scale):
    x, _, _, present = case(seed=seed)
    torch.manual_seed(seed)
    past = correlation(torch.randn(2, 6, 12, dtype=torch.float64))
    for head, p in ((EdgeHead(4, 3).double(), None), (EdgeHead(4, 3, past=True).double(), past)):
        rho = head(scale * x, p, present).detach()
        off = rho.masked_fill(torch.eye(6, dtype=torch.bool), 0)
        assert torch.equal(rho, rho.mT) and (off.abs() < 1).all() and (rho.diagonal(dim1=1, dim2=2) == 1).all()
        assert torch.linalg.eigvalsh(rho).min() > -1e-9
        assert not off[~present].any()


def test_unknown_past_is_left_to_the_states():
    x, _, _, _ = case()
    head = EdgeHead(4, 3, past=True).double()
    past = torch.full((2, 6, 6), float('nan'), dtype=torch.float64)
    alone = EdgeHead(4, 3).double(); alone.loadings.load_state_dict(head.loadings.state_dict())
    torch.testing.assert_close(head(x, past), alone(x))
    head(x, past).sum().backward()
    assert all(p.grad.isfinite().all() for p in head.parameters())
    with pytest.raises(ValueError, match='built with past=False'): alone(x, past)


def test_correlation_is_that_of_pandas():
    r = np.random.default_rng(0).normal(size=(5, 60)) * 1e-3 + .5
    r[np.random.default_rng(1).random(r.shape) < .3] = np.nan
    want = pd.DataFrame(r.T).corr(min_periods=8)
    assert np.allclose(correlation(torch.from_numpy(r)), want, rtol=0, atol=1e-10)
    flat = torch.from_numpy(r).clone(); flat[2] = .1
    assert correlation(flat)[2].isnan().all() and correlation(flat)[0, 1].isfinite()
    flat[3, 4] = float('inf')
    assert correlation(flat)[3, 0].isfinite()


def test_loss_is_that_of_fishers_z():
    g = torch.Generator().manual_seed(0)
    a, b = (correlation(torch.randn(3, 5, 20, generator=g)) for _ in range(2))
    b[0, 1, 2] = b[0, 2, 1] = float('nan')
    mask = torch.rand(3, 5, 5, generator=g) < .6
    want = [(math.atanh(a[n, i, j]) - math.atanh(b[n, i, j])) ** 2 for n in range(3) for i in range(5) for j in range(i + 1, 5) if mask[n, i, j] and not b[n, i, j].isnan()]
    torch.testing.assert_close(correlation_loss(a, b, mask), torch.tensor(sum(want) / len(want), dtype=torch.float32))
    one = torch.ones(1, 2, 2)
    assert correlation_loss(one, one) == 0 and correlation_loss(one, -one).isfinite() and correlation_loss(one, one * float('nan')) == 0


# ---- citations ---------------------------------------------------------------------------------------------------------

SMALL = dict(n=400, n_features=200, n_classes=4, n_edges=1200, labelled=10, validation=100, test=200, words=10, topical=.3)


def test_citations_need_their_edges():
    data = block_graph(**SMALL)
    r = citation_experiment(*data, epochs=60)
    assert r.with_edges.accuracy > r.without_edges.accuracy + .15
    assert r.with_edges.epochs == len(r.with_edges.validation_loss) == len(r.with_edges.validation_accuracy)
    again = citation_experiment(*(t.numpy() for t in data), epochs=60)
    assert again == r
    turned = citation_experiment(data.features * 3, torch.cat([data.edges.flip(0), data.edges], 1), *data[2:], epochs=60)
    assert turned.with_edges.accuracy == pytest.approx(r.with_edges.accuracy, abs=.01)


def test_patience():
    data = block_graph(**SMALL)
    r = citation_experiment(*data, epochs=400, patience=5).with_edges
    best = [k for k in range(r.epochs) if r.validation_loss[k] <= min(r.validation_loss[:k + 1]) or r.validation_accuracy[k] >= max(r.validation_accuracy[:k + 1])]
    assert r.epochs < 400 and best[-1] == r.epochs - 1 - 5 and r.chosen in best


def test_block_graph():
    a, b = block_graph(**SMALL), block_graph(**SMALL)
    assert all(torch.equal(x, y) for x, y in zip(a, b)) and not torch.equal(a.features, block_graph(**SMALL, seed=1).features)
    assert isinstance(a, CitationData) and set(a.features.unique().tolist()) == {0., 1.} and a.edges.max() < 400
    alone = (block_graph(**SMALL | dict(inside=0.)))
    assert (alone.labels[alone.edges[0]] == alone.labels[alone.edges[1]]).float().mean() == pytest.approx(.25, abs=.06)
    with pytest.raises(ValueError, match='399 rows of features for 400 labels'): citation_experiment(a.features[1:], *a[1:])


# ---- refusals, picture -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize('change, message', [
    (dict(graph=torch.ones(2, 5, 5, dtype=torch.bool)), 'graph .2, 5, 5., wanted .2, 6, 6.'), (dict(weight=torch.ones(6)), 'weight .6,., wanted'),
    (dict(present=torch.ones(2, 5, dtype=torch.bool)), 'present'), (dict(present=torch.ones(2, 6)), 'wanted bool'),
    (dict(graph=torch.zeros(3, 4, dtype=torch.int64)), 'wanted .2, E.'), (dict(graph=torch.tensor([[-1], [0]])), 'name nodes -1 to 0'),
    (dict(graph=torch.tensor([[1], [0]]), weight=torch.ones(2)), 'weight .2,., wanted .1,.')])
def test_refusals(change, message):
    with pytest.raises(ValueError, match=message): model()(case()[0], **change)


@pytest.mark.parametrize('bad', [dict(n_in=0), dict(n_layers=0), dict(dropout=1.), dict(dropout=-.1)])
def test_config_refuses(bad):
    with pytest.raises(ValueError): GATConfig(**dict(n_in=4, n_out=2) | bad)


def test_picture_has_the_strongest_arrows():
    import matplotlib.pyplot as plt
    a = torch.tensor([[.5, .5, 0.], [.1, .9, 0.], [.3, .2, .5]], dtype=torch.float64)
    before = a.clone()
    ax = plot_attention_graph(a, list('abc'), strongest=2)
    assert [t.get_text() for t in ax.texts if t.get_text()] == list('abc') and sum(1 for t in ax.texts if not t.get_text()) == 2
    assert torch.equal(a, before), 'the caller keeps its diagonal'
    plot_attention_graph(torch.ones(1, 1)); plt.close('all')


def test_agrees_with_pytorch_geometric():
    pyg = pytest.importorskip('torch_geometric.nn', reason='torch_geometric is not installed')
    torch.manual_seed(0)
    layer, (x, graph, _, _) = GraphAttentionLayer(4, 5, 3, 0.).double(), case()
    theirs = pyg.GATConv(4, 5, heads=3, add_self_loops=False).double()
    with torch.no_grad(): theirs.lin.weight.copy_(layer.W.flatten(1).T); theirs.att_dst[0].copy_(layer.a[0]); theirs.att_src[0].copy_(layer.a[1])
    everyone, _ = to_edges(torch.ones(2, 6, 6, dtype=torch.bool))
    torch.testing.assert_close(theirs(x.flatten(0, 1), everyone).view(2, 6, -1), layer(x, attend_dense)[0], rtol=0, atol=1e-12)
