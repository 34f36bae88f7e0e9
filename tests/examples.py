"What several test files speak of: the terms of a model, any policy, any form of a clock"
from dataclasses import asdict

from hypothesis import strategies as st

from cryptoml.backtest import ROUND_TRIP
from cryptoml.policy import Policy
from cryptoml.study import Terms

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
