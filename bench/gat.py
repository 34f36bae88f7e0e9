"""Speed of graph attention: `python bench/gat.py`
(PyTorch Geometric, same weights, same inputs, same run, beside it where installed)"""
import statistics
import time
from functools import partial

import torch
from torch.nn import functional as F

from cryptoml.gat import (GATConfig, GraphAttentionLayer, GraphAttentionNetwork, attend_dense, block_graph,
                          dense_bias, to_edges)

try: from torch_geometric.nn import GATConv
except ImportError: GATConv = None


def medians(columns, rounds=7):
    "Median CPU seconds of each function, interleaved, after two calls that do not count"
    took = {k: [] for k in columns}
    for _ in range(rounds + 2):
        for k, f in columns.items():
            t = time.process_time()
            f()
            took[k].append(time.process_time() - t)
    return {k: statistics.median(t[2:]) for k, t in took.items()}


def same_weights(theirs, ours):
    "Copy the weights of our layer into theirs"
    with torch.no_grad():
        theirs.lin.weight.copy_(ours.W.flatten(1).T)
        theirs.att_dst[0].copy_(ours.a[0])
        theirs.att_src[0].copy_(ours.a[1])
        theirs.bias.copy_(ours.bias)
    return theirs


def dense(N, share, dropout, B=256, n_in=64, D=16, H=4):
    "Forward and backward of one layer over B graphs of N nodes in which `share` of the pairs are edges"
    torch.manual_seed(0)
    x = torch.randn(B, N, n_in)
    ours = GraphAttentionLayer(n_in, D, H, dropout)
    graph = None if share == 1 else (torch.rand(B, N, N) < share) | torch.eye(N, dtype=torch.bool)

    def run():
        bias = dense_bias(x, graph, None, None)
        return ours(x, lambda *a: attend_dense(*a, bias=bias))[0]

    columns = {'cryptoml': lambda: run().sum().backward()}
    if GATConv:
        edges, _ = to_edges(torch.ones(B, N, N, dtype=torch.bool) if graph is None else graph)
        theirs = same_weights(GATConv(n_in, D, heads=H, dropout=dropout, add_self_loops=False), ours)
        flat = x.flatten(0, 1)
        if not dropout:
            apart = (theirs(flat, edges).view(B, N, -1) - run()).abs().max()
            assert apart < 1e-5, 'the two do not agree'

        def pyg():
            dropped = F.dropout(flat, dropout) if dropout else flat
            theirs(dropped, edges).sum().backward()
        columns['PyG'] = pyg
    return medians(columns)


def citations():
    "A training step on a graph of Cora's size with the paper's configuration"
    data = block_graph()
    x, y, train = data.features, data.labels, data.train
    edges = torch.cat([data.edges, data.edges.flip(0)], 1)
    sparse = x.to_sparse().coalesce()
    ours = GraphAttentionNetwork(GATConfig(x.shape[1], 7))

    def run(): F.cross_entropy(ours(sparse, edges).states[train], y[train]).backward()

    columns = {'cryptoml': run}
    if GATConv:
        a = GATConv(x.shape[1], 8, heads=8, dropout=.6, add_self_loops=False)
        b = GATConv(64, 7, concat=False, dropout=.6, add_self_loops=False)
        loops = torch.cat([edges, torch.arange(len(x)).expand(2, -1)], 1)

        def pyg():
            h = F.dropout(F.elu(a(F.dropout(x, .6), loops)), .6)
            F.cross_entropy(b(h, loops)[train], y[train]).backward()
        columns['PyG'] = pyg
    return medians(columns)


def named(N, share, dropout): return f'{N} nodes, {share:.0%} of the pairs, dropout {dropout}'


SIZES = [           # nodes, share of the pairs, dropout
    (20, 1, 0.),
    (50, 1, 0.),
    (50, .5, 0.),
    (50, 1, .1),
]


def main():
    torch.set_num_threads(1)
    if not GATConv:
        print('torch_geometric is not installed: our times alone '
              '(pip install torch-geometric, in an environment of its own)')
    cases = {named(*size): partial(dense, *size) for size in SIZES}
    cases["citations of Cora's size, paper's configuration"] = citations
    for name, case in cases.items():
        t = case()
        ours = t['cryptoml']
        beside = f'   PyG {1000 * t["PyG"]:8.1f} ms   {t["PyG"] / ours:5.1f} times' if GATConv else ''
        print(f'{name:55}{1000 * ours:8.1f} ms{beside}', flush=True)


if __name__ == '__main__': main()
