"""Temporal Fusion Transformers of other libraries behind one call: the network alone, no data set and no trainer

Columns of `past`: the known inputs first, in the order of `future`, then the observed ones, the target last."""
import logging, warnings

import torch
from torch import nn
from torch.nn import functional as F

QUANTILES = (.1, .5, .9)


class Wrapped(nn.Module):
    "Called as `(past [B, L, n_past], future [B, K, n_future], static [B, n_static] or None) -> quantiles [B, K, 3]`"
    def __init__(self, net, call):
        super().__init__()
        self.net, self.call = net, call

    def forward(self, past, future, static=None): return self.call(self.net, past, future, static)


def cryptoml(n_past, n_future, n_static, lookback, steps, d_model, n_heads=4, dropout=.1, **more):
    from cryptoml.tft import TFTConfig, TemporalFusionTransformer
    sizes = n_past, n_future, n_static, lookback, steps, d_model, n_heads, dropout
    net = TemporalFusionTransformer(TFTConfig(*sizes, quantiles=QUANTILES, **more))
    return Wrapped(net, lambda net, past, future, static: net(past, future, static).quantiles)


def names(n_past, n_future, n_static):
    "Names of known, observed and fixed inputs"
    sizes = dict(k=n_future, o=n_past - n_future, s=n_static)
    return [[f'{k}{i}' for i in range(n)] for k, n in sizes.items()]


def pf(n_past, n_future, n_static, lookback, steps, d_model, n_heads=4, dropout=.1):
    from pytorch_forecasting import TemporalFusionTransformer
    from pytorch_forecasting.metrics import QuantileLoss
    known, seen, fixed = names(n_past, n_future, n_static)
    net = TemporalFusionTransformer(
        hidden_size=d_model,
        hidden_continuous_size=d_model,
        attention_head_size=n_heads,
        dropout=dropout,
        output_size=len(QUANTILES),
        loss=QuantileLoss(list(QUANTILES)),
        max_encoder_length=lookback,
        static_reals=fixed,
        time_varying_reals_encoder=known + seen,
        time_varying_reals_decoder=known,
        x_reals=known + seen + fixed,
        output_transformer=lambda out: out['prediction'],
    )

    def call(net, past, future, static):
        B = len(past)
        none = past.new_zeros(B, lookback + steps, 0).long()
        after = F.pad(future, (0, n_past - n_future))                 # no column of an observed input is read
        if static is not None:
            past, after = (torch.cat([t, static[:, None].expand(-1, t.shape[1], -1)], -1) for t in (past, after))
        return net(dict(
            encoder_cat=none[:, :lookback],
            decoder_cat=none[:, lookback:],
            encoder_cont=past,
            decoder_cont=after,
            target_scale=None,
            encoder_lengths=torch.full((B,), lookback),
            decoder_lengths=torch.full((B,), steps),
        ))['prediction']
    return Wrapped(net, call)


def darts(n_past, n_future, n_static, lookback, steps, d_model, n_heads=4, dropout=.1):
    from darts.models.forecasting.tft_model import _TFTModule
    from darts.utils.data.torch_datasets.utils import PLModuleInput
    known, seen, fixed = names(n_past, n_future, n_static)
    meta = dict(
        reals_input=known + seen + fixed,
        categorical_input=[],
        time_varying_encoder_input=seen[-1:] + seen[:-1] + known,
        time_varying_decoder_input=known,
        static_input=fixed,
        static_input_numeric=fixed,
        static_input_categorical=[],
    )
    net = _TFTModule(
        output_dim=(1, len(QUANTILES)),
        variables_meta=dict(model_config=meta),
        num_static_components=int(n_static > 0),
        hidden_size=d_model,
        lstm_layers=1,
        num_attention_heads=n_heads,
        full_attention=False,
        feed_forward='GatedResidualNetwork',
        hidden_continuous_size=d_model,
        categorical_embedding_sizes={},
        dropout=dropout,
        add_relative_index=False,
        norm_type='LayerNorm',
        input_chunk_length=lookback,
        output_chunk_length=steps,
    )

    def call(net, past, future, static):
        target, seen, known = past[..., -1:], past[..., n_future:-1], past[..., :n_future]
        if static is not None: static = static[:, None]
        return net(PLModuleInput(target, seen, known, future, static)).prediction[:, :, 0]
    return Wrapped(net, call)


def nf(n_past, n_future, n_static, lookback, steps, d_model, n_heads=4, dropout=.1):
    from neuralforecast.losses.pytorch import MQLoss
    from neuralforecast.models import TFT
    known, seen, fixed = names(n_past, n_future, n_static)
    net = TFT(
        h=steps,
        input_size=lookback,
        futr_exog_list=known,
        hist_exog_list=seen[:-1],
        stat_exog_list=fixed or None,
        hidden_size=d_model,
        n_head=n_heads,
        n_rnn_layers=1,
        dropout=dropout,
        attn_dropout=0.,
        loss=MQLoss(quantiles=list(QUANTILES)),
        scaler_type='identity',
        logger=False,
    )

    def call(net, past, future, static):
        return net(dict(
            insample_y=past[..., -1:],
            hist_exog=past[..., n_future:-1],
            futr_exog=torch.cat([past[..., :n_future], future], 1),
            stat_exog=static,
        ))
    return Wrapped(net, call)


MAKERS = {f.__name__: f for f in (cryptoml, pf, darts, nf)}


def present():
    "Names of the peers whose libraries are installed here"
    from importlib.util import find_spec
    modules = dict(pf='pytorch_forecasting', darts='darts', nf='neuralforecast')
    return [k for k, m in modules.items() if find_spec(m)]


def make(name, *sizes, seed=0, **more):
    "The network `name`, initialised under `seed`"
    logging.disable(logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        torch.manual_seed(seed)
        made = MAKERS[name](*sizes, **more)
        torch.manual_seed(seed)                                       # a library may seed, or draw as many as it likes
    return made


def mean_pinball(forecast, y):
    "Mean quantile loss over outcomes and levels"
    from cryptoml.tft import quantile_losses                                  # not needed to say who is present
    return quantile_losses(forecast, y, QUANTILES).mean()
