"What several test files speak of: the terms of a model, any policy, any form of a clock, labels that know nothing"
from dataclasses import asdict

import numpy as np
from hypothesis import strategies as st

from cryptoml.backtest import ROUND_TRIP
from cryptoml.baselines import N_CLASSES, Seen
from cryptoml.forecaster import ForecasterConfig, begin
from cryptoml.gate import Declared
from cryptoml.policy import Policy
from cryptoml.study import Study
from cryptoml.terms import Terms

TERMS = Terms(
    symbols=['BTC/USDT', 'ETH/USDT'],
    timeframe='1h',
    trained_until='2024-03-01T00:00:00+00:00',
    data_until='2024-06-01T00:00:00+00:00',
    round_trip=ROUND_TRIP,
    threshold=.55,
    reach=dict(down=1.7, up=1.8),
    importance=dict(rsi_14=.01),
    verdict='INCONCLUSIVE',
    trials=dict(count=3, effective=2.4, place='ledger.jsonl', head=''),
    book=Declared.of('timing', 2, (4, 24), '1h').plain(),
    policy=asdict(Policy()),
)

def real(lo, hi): return st.floats(lo, hi, allow_nan=False)

policies = st.builds(
    Policy,
    target_annual=real(.01, 2),
    max_weight=real(.01, 1),
    max_gross=real(.01, 3),
    long_only=st.booleans(),
    correlation=real(0, .95),
)

CLOCKS = dict(                                         # forms in which a bot may say what time it is
    naive=lambda now: now.tz_localize(None),
    datetime=lambda now: now.to_pydatetime(),
    text=str,
    iso=lambda now: now.isoformat(),
    seconds=lambda now: now.timestamp(),
    milliseconds=lambda now: int(now.timestamp() * 1000),
)

def untrained(study: Study, seed=0):
    "A forecaster of a study's inputs whose network nobody has trained"
    rows = np.broadcast_to(study.parts['train'], study.panel.mask.shape)
    return begin(study.inputs, rows, ForecasterConfig(horizons=study.targets.horizons, seed=seed))

def unrelated(seed, S, H):
    "Training, validation and test of baselines: noise with labels that know nothing of it, a tenth of them missing"
    rng = np.random.default_rng(seed)
    def some():
        labels = {k: rng.integers(0, n, (S, H)) for k, n in N_CLASSES.items()}
        labels |= {k: rng.normal(size=(S, H)) for k in ('relative', 'volatility')}
        gone = rng.random((S, H)) < .1
        labels = {k: np.where(gone, -1 if k in N_CLASSES else np.nan, v) for k, v in labels.items()}
        har = np.concatenate([np.ones((S, 1)), rng.normal(size=(S, 3))], 1)
        har[:50] = np.nan
        return Seen(
            x=rng.normal(size=(S, 5)),
            past=rng.integers(-1, 3, (S, H)),
            regime=rng.integers(-1, 4, S),
            volatility=rng.normal(size=(S, H)),
            har=har,
            trend=rng.normal(size=(S, 2)),
            quiet=rng.normal(size=S),
            labels=labels,
        )
    return some(), some(), some()

def nats(said, new, target):
    "Log-loss of a forecast at the first horizon, by its definition"
    y = new.labels[target][:, 0]
    return -np.log(said[target][:, 0][np.arange(len(y)), y])[y >= 0].mean()

def near(a, b):
    "Whether two predictions say the same to 1e-5"
    if isinstance(a, dict): return a.keys() == b.keys() and all(near(a[k], b[k]) for k in a)
    if isinstance(a, list): return len(a) == len(b) and all(near(x, y) for x, y in zip(a, b))
    if isinstance(a, float) and isinstance(b, float): return abs(a - b) <= 1e-5 or a != a and b != b
    return a == b
