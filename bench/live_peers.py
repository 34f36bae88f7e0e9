"""What a forecast of the newest bar costs in other libraries: `PEERS_PYTHON bench/live_peers.py [COINS]`

Their Temporal Fusion Transformer through the call that a user makes (`predict`), a bar at a time: of one coin and of
all, in one model trained for some steps on returns of the simulated market. Width, window, heads, horizon and quantiles
are those of our `small`; inputs are the close and the calendar alone, no feature is computed, no interval, no reason
and no signal made. Beside it, `python bench/live.py COINS:small`.
"""
import logging, sys, time, warnings

import numpy as np
import pandas as pd
import torch

LOOKBACK, STEPS, WIDTH, HEADS, QUANTILES = 24, 18, 16, 4, [.05, .25, .5, .75, .95]    # a step is four hours of 72
HISTORY, BARS, WARM_UP = 1000, 40, 5


def frame(coins):
    "Returns of random walks [T, N]; their values do not matter to the clock"
    rng = np.random.default_rng(0)
    time = pd.date_range('2024-01-01', periods=HISTORY + WARM_UP + BARS + 1, freq='4h')
    return pd.DataFrame(rng.standard_normal((len(time), coins)), time, [f'C{i}' for i in range(coins)])


def darts(x):
    "Forecasts of a bar of some coins"
    from darts import TimeSeries
    from darts.models import TFTModel
    from darts.utils.likelihood_models import QuantileRegression
    encoders = dict(cyclic=dict(future=['hour', 'dayofweek']))
    quiet = dict(accelerator='cpu', enable_progress_bar=False, logger=False, enable_model_summary=False,
                 max_steps=2, enable_checkpointing=False)
    model = TFTModel(LOOKBACK, STEPS, hidden_size=WIDTH, num_attention_heads=HEADS, batch_size=64, n_epochs=1,
                     likelihood=QuantileRegression(QUANTILES), add_encoders=encoders, pl_trainer_kwargs=quiet)
    model.fit([TimeSeries.from_series(x[c].iloc[:HISTORY].astype(np.float32)) for c in x], verbose=False)
    def of(t, names):
        newest = [TimeSeries.from_series(x[c].iloc[t - LOOKBACK:t].astype(np.float32)) for c in names]
        return model.predict(STEPS, newest, verbose=False, predict_likelihood_parameters=True)
    return of


def neuralforecast(x):
    "Forecasts of a bar of some coins"
    from neuralforecast import NeuralForecast
    from neuralforecast.losses.pytorch import MQLoss
    from neuralforecast.models import TFT
    def long(t0, t1, names):
        some = x[names].iloc[t0:t1].rename_axis('ds').reset_index()
        return some.melt('ds', var_name='unique_id', value_name='y')
    net = TFT(h=STEPS, input_size=LOOKBACK, hidden_size=WIDTH, n_head=HEADS, loss=MQLoss(quantiles=QUANTILES),
              max_steps=2, logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator='cpu',
              enable_checkpointing=False)
    model = NeuralForecast([net], freq='4h')
    model.fit(long(0, HISTORY, list(x)))
    return lambda t, names: model.predict(long(t - 2 * LOOKBACK, t, names))


def milliseconds(forecast, names):
    "Wall and CPU time of each bar"
    wall, cpu = [], []
    for t in range(HISTORY, HISTORY + WARM_UP + BARS):
        began, spent = time.perf_counter(), time.process_time()
        forecast(t, names)
        wall.append(1e3 * (time.perf_counter() - began))
        cpu.append(1e3 * (time.process_time() - spent))
    return np.array(wall[WARM_UP:]), np.array(cpu[WARM_UP:])


def main():
    torch.set_num_threads(1)
    warnings.filterwarnings('ignore')
    for name in ('lightning', 'lightning.pytorch', 'pytorch_lightning', 'darts'):
        logging.getLogger(name).setLevel(logging.ERROR)
    x = frame(int(sys.argv[1]) if len(sys.argv) > 1 else 10)
    for make in (darts, neuralforecast):
        forecast = make(x)
        for names in (['C0'], list(x)):
            wall, cpu = milliseconds(forecast, names)
            print(f'{make.__name__}, {len(names)} of {len(x.columns)} coins: p50 {np.median(wall):.0f} ms, '
                  f'p99 {np.quantile(wall, .99):.0f} ms, CPU {np.median(cpu):.0f} ms', flush=True)


if __name__ == '__main__': main()
