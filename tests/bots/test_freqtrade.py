"""A real freqtrade on a replay exchange, with our strategy and our FreqAI model

A small model is trained on the first bars of a simulated market; the exchange serves all of them.
"""
import json, os, re, subprocess, sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest

pytest.importorskip('freqtrade', reason='freqtrade is not installed here: make bots makes it an environment')
pytestmark = pytest.mark.bots

from cryptoml.bots import UNKNOWN, decimal, forecast_history, to_market

here = Path(__file__).parent
H = pd.Timedelta('1h')
TRAINED = 2900            # Bars that the model is trained on
BARS = 3600               # Bars that the exchange serves
PAIRS = ['BTC/USDT', 'ETH/USDT', 'SHIB/USDT']
# Not a malformed answer: freqtrade itself ends where an order is open and the book comes back empty.
FAULTS = dict(http500=.03, http429=.02, timeout=.003, missing=.002, duplicate=.003, ooo=.02, hole=.001)

def market():
    "Bars as an exchange gives them"
    from cryptoml.simulate import simulate
    bars = simulate(len(PAIRS), BARS, seed=7).bars
    return bars[['time', 'symbol', 'open', 'high', 'low', 'close', 'volume']]

class World(NamedTuple):
    bars: pd.DataFrame
    model: Path             # Folder of the trained model
    user: Path              # freqtrade's user directory, with the bars downloaded
    trained: pd.Timestamp   # What closes earlier was seen in training

def config_of(exchange, folder, **more):
    "A freqtrade config for this exchange: its path"
    config = dict(
        max_open_trades=3, stake_currency='USDT', stake_amount=500, dry_run=True, dry_run_wallet=10_000,
        timeframe='1h', trading_mode='spot', cancel_open_orders_on_exit=True, initial_state='running',
        unfilledtimeout=dict(entry=600, exit=600, unit='minutes'), pairlists=[dict(method='StaticPairList')],
        entry_pricing=dict(price_side='other', use_order_book=True, order_book_top=1),
        exit_pricing=dict(price_side='other', use_order_book=True, order_book_top=1),
        internals=dict(process_throttle_secs=1), dataformat_ohlcv='json',
        exchange=dict(name='binance', key='', secret='', only_from_ccxt=True, enable_ws=False,
                      ccxt_config=exchange.ccxt_config(), pair_whitelist=PAIRS, pair_blacklist=[]))
    del config['exchange']['ccxt_config']['apiKey'], config['exchange']['ccxt_config']['secret']
    config['exchange']['ccxt_config']['options']['fetchMarkets'] = dict(types=['spot'])
    path = folder/'config.json'
    path.write_text(json.dumps(config | more))
    return path

STOPPED = 130     # freqtrade after Ctrl-C

def run(program, *args, world=None, ends=0, **env):
    "Run it and return what it printed"
    root = str(here.parents[1])
    env = os.environ | dict(PYTHONPATH=root, OMP_NUM_THREADS='1', BOT_MODEL=str(world.model) if world else '') | env
    done = subprocess.run([sys.executable, *program, *map(str, args)], env=env, capture_output=True, text=True,
                          timeout=900, errors='replace')
    said = done.stderr + done.stdout
    assert done.returncode == ends and 'Configuration error' not in said, f'{done.returncode}: {said[-5000:]}'
    return said

def freqtrade(*args, **more): return run(['-m', 'freqtrade'], *args, **more)

def where(world, config):
    return ('-c', config, '--userdir', world.user, '--strategy-path', here/'strategies')

def days(first, last): return f'{first:%Y%m%d}-{last:%Y%m%d}'

def user_of(folder):
    "An empty user directory of freqtrade"
    for name in ('data', 'strategies', 'backtest_results', 'models', 'freqaimodels', 'logs', 'plot', 'hyperopts',
                 'hyperopt_results', 'notebooks'): (folder/'user'/name).mkdir(parents=True)
    return folder/'user'

@pytest.fixture(scope='module')
def world(tmp_path_factory):
    "A model of two epochs, and a user directory with the bars of the exchange"
    from cryptoml.integration import UltimateTradingAI
    from replay_exchange import replaying
    folder, bars = tmp_path_factory.mktemp('bots'), market()
    time = bars['time'].drop_duplicates().sort_values()
    ai = UltimateTradingAI(dict(horizons=[4, 12], size='small', state_dir=str(folder/'state')), device='cpu')
    ai.train_sync(bars[bars['time'].isin(time[:TRAINED])], epochs=2)
    ai.save_state()
    user = user_of(folder)
    made = World(bars, folder/'state', user, pd.Timestamp(ai.live().terms.trained_until))
    with replaying(bars, start=time.iloc[-1] + H, clock='step') as exchange:
        freqtrade('download-data', '-c', config_of(exchange, folder), '--userdir', user, '--timeframes', '1h',
                  '--timerange', days(time.iloc[0], time.iloc[-1] + H))
    return made

@pytest.fixture
def still(world, tmp_path):
    "The arguments of a run on an exchange whose clock stands still at its last bar"
    from replay_exchange import replaying
    with replaying(world.bars, start=world.bars['time'].max() + H, clock='step') as exchange:
        yield where(world, config_of(exchange, tmp_path))

def trades_of(world):
    "Trades of the last backtest"
    from freqtrade.data.btanalysis import load_backtest_data
    return load_backtest_data(world.user/'backtest_results')

def unseen(world): return days(world.trained.ceil('D'), world.bars['time'].max().floor('D'))

def test_backtest(world, still):
    said = freqtrade('backtesting', *still, '--strategy', 'MyBot', '--timerange', unseen(world), '--cache', 'none',
                     world=world)
    print(said[-2500:])
    trades = trades_of(world)
    assert len(trades) > 5 and (trades['open_date'] >= world.trained).all() and 'training has seen' not in said

def test_inside_training(world, still):
    "No trade, and one sentence that says why"
    span = days(world.trained.floor('D') - pd.Timedelta('20D'), world.trained.floor('D') - pd.Timedelta('8D'))
    said = freqtrade('backtesting', *still, '--strategy', 'MyBot', '--timerange', span, '--cache', 'none', world=world)
    print(said[-2500:])
    assert said.count('training has seen them: no signal there') == 1
    assert re.search(r'MyBot\s+│\s+0\s+│', said) or 'No trades made' in said

def test_terms_are_kept(world, still):
    "Without being told to act on what was judged FAIL, or below any threshold, it does nothing"
    said = freqtrade('backtesting', *still, '--strategy', 'Careful', '--timerange', unseen(world), '--cache', 'none',
                     world=world)
    assert 'No trades made' in said or re.search(r'Careful\s+│\s+0\s+│', said)

@pytest.mark.parametrize('strategy, found', [('MyBot', 'No'), ('Leaky', 'Yes')])
def test_lookahead(world, still, strategy, found):
    first = world.trained.ceil('D')
    said = freqtrade('lookahead-analysis', *still, '--strategy', strategy, '--timerange',
                     days(first, first + pd.Timedelta('8D')), '--minimum-trade-amount', 3, '--targeted-trade-amount',
                     4, world=world)
    print(said[-2500:])
    row = next(line for line in said.splitlines() if f'{strategy} ' in line and '│' in line)
    assert row.split('│')[3].strip() == found

def test_recursive(world, still):
    "A row is the same whether freqtrade loads what the model needs, or more; with less there is no score"
    first = world.trained.ceil('D')
    span = days(first, first + pd.Timedelta('3D'))
    said = freqtrade('recursive-analysis', *still, '--strategy', 'MyBot', '--timerange', span, '-p', 'BTC/USDT',
                     '--startup-candle', 1000, 2200, world=world)
    print(said[-2500:])
    assert 'No lookahead bias on indicators found' in said
    def percent(cell): return 0. if cell.strip() == '-' else float(cell.strip().rstrip('%'))
    table = [line.split('│')[1:-1] for line in said.splitlines() if re.match(r'│\s+ml_', line)]
    drift = {name.strip(): [percent(cell) for cell in cells] for name, *cells in table}
    assert np.isnan(drift['ml_score'][0])                                         # 1000 bars
    assert all(abs(x) < .01 for row in drift.values() for x in row[1:]), drift

def dry_run(world, folder, seconds, args, bars_per_s, faults, first, **config):
    "freqtrade trades on a clock of so many bars a second: what it printed, and the state of the exchange"
    from replay_exchange import replaying
    with replaying(world.bars, start=first, clock='step', seed=1) as exchange:
        path = config_of(exchange, folder, **config)
        exchange.faults(**faults)
        exchange.began, exchange.clock, exchange.bars_per_s = exchange_clock(), 'rate', bars_per_s
        speed = bars_per_s * H.total_seconds()
        said = run([here/'fastclock.py'], exchange.url, speed, seconds, 'trade', *where(world, path), '--db-url',
                   f'sqlite:///{folder}/dry.sqlite', *args, world=world, ends=STOPPED, BOT_TRACE=str(folder))
        return said, exchange.control('state', {})

def exchange_clock():
    import time
    return time.time_ns() // 1_000_000

def as_in_a_backtest(world, folder):
    "What was told live, and where it is what a backtest says of the bars that freqtrade had in the end"
    from cryptoml.integration import UltimateTradingAI
    live = pd.DataFrame(map(json.loads, (folder/'said.jsonl').read_text().splitlines()))
    live = live.assign(date=pd.to_datetime(live['date'], utc=True)).set_index(['pair', 'date'])
    ai = UltimateTradingAI(dict(act_on='FAIL'), device='cpu')
    ai.load_state(world.model)
    frames = {pair: pd.read_parquet(folder/f'{pair.replace("/", "_")}.parquet') for pair in PAIRS}
    history = forecast_history(ai.live(), frames, 0., act_on='FAIL').reindex(live.index)
    near = np.isclose(live['ml_score'], history['ml_score'], atol=1e-5, equal_nan=True)
    return live.assign(same=near & (live['ml_signal'] == history['ml_signal']), then=history['ml_why'])

def test_dry_run(world, tmp_path):
    "Faults all around it: it lives, says something of nearly every bar, and what it says is what a backtest says"
    said, state = dry_run(world, tmp_path, 150, ['--strategy', 'Traced'], .2, FAULTS, world.trained + 48 * H)
    live = as_in_a_backtest(world, tmp_path)
    known = live[~live['ml_why'].isin(UNKNOWN)]          # of the others a bar was not there yet, or came too late
    print(said[-1500:], state['injected'], live['ml_why'].value_counts(), live[~live['same']].to_string())
    print(f'{len(live)} rows said of {live.groupby("pair").size().to_dict()}, {len(known)} with an opinion, '
          f'{known["same"].mean():.1%} of them as in a backtest')
    assert len(known) >= 30 and known['same'].mean() > .9
    assert failures(said) == [] and sum(state['injected'].values()) > 20

def failures(said):
    "Errors in our code or in a strategy; freqtrade logs those of an exchange that fails, and goes on"
    entries = re.split(r'(?m)^(?=\d{4}-\d\d-\d\d \d\d:)', said)
    return [e for e in entries if 'Traceback' in e and re.search(r'/cryptoml/|/strategies/|/freqaimodels/', e)]

def freqai(name): return dict(freqai=FREQAI | dict(identifier=name))

FREQAI = dict(
    enabled=True, activate_tensorboard=False, purge_old_models=2, train_period_days=30, backtest_period_days=7,
    live_retrain_hours=6, fit_live_predictions_candles=0,
    save_backtest_models=False,
    feature_parameters=dict(include_timeframes=['1h'], include_corr_pairlist=[], label_period_candles=4,
                            include_shifted_candles=1, indicator_periods_candles=[6, 24], weight_factor=0,
                            plot_feature_importances=0),
    data_split_parameters=dict(test_size=.25, shuffle=False), model_training_parameters={})
LEARNER = ['--strategy', 'Learner', '--freqaimodel', 'OurModel', '--freqaimodel-path', here/'freqaimodels']

def test_freqai_backtest(world, tmp_path):
    from replay_exchange import replaying
    with replaying(world.bars, start=world.bars['time'].max() + H, clock='step') as exchange:
        path = config_of(exchange, tmp_path, **freqai('backtest'))
        last = world.bars['time'].max().floor('D')
        said = freqtrade('backtesting', *where(world, path), *LEARNER, '--timerange',
                         days(last - pd.Timedelta('14D'), last), '--cache', 'none', world=world)
    print(said[-2500:])
    assert said.count('Done training') == 6 and len(trades_of(world)) > 0

def test_freqai_dry_run(world, tmp_path):
    "It is trained again while it trades"
    last, world = world.bars['time'].max(), world._replace(user=user_of(tmp_path))    # without bars of later
    said, state = dry_run(world, tmp_path, 150, LEARNER, .2, FAULTS, last - 200 * H, **freqai('live'))
    print(said[-1500:], state['injected'], *failures(said))
    assert said.count('Done training') > 3 and failures(said) == []

def test_sizes_of_ccxt():
    "Whatever the market, a size is the one that ccxt itself would write"
    import ccxt
    rng = np.random.default_rng(0)
    for mode in (ccxt.DECIMAL_PLACES, ccxt.SIGNIFICANT_DIGITS, ccxt.TICK_SIZE):
        exchange = ccxt.Exchange(dict(precisionMode=mode))
        for _ in range(2000):
            lot = float(rng.choice([1e-8, 1e-5, .001, .01, .1, .5, 1., 5., 10., 1000.]))
            precision = lot if mode == ccxt.TICK_SIZE else int(rng.integers(1, 9))
            amount = float(np.exp(rng.normal(0, 6)))
            market = dict(symbol='A/B', precision=dict(amount=precision), limits={})
            exchange.markets = {'A/B': market}
            try: theirs = exchange.amount_to_precision('A/B', amount)
            except ccxt.InvalidOrder: theirs = '0'
            ours = to_market(amount, 1., market, mode)
            assert ours.amount == decimal(theirs), (mode, precision, amount, theirs, str(ours))
            assert (ours.why is None) == (ours.amount > 0)

def test_sent_to_a_worker(tmp_path):
    "Hyperopt pickles the modules of a strategy's base classes by value: small, and whole in another process"
    import cloudpickle
    import cryptoml.bots
    cloudpickle.register_pickle_by_value(cryptoml.bots)
    try: sent = cloudpickle.dumps(type('Sent', (cryptoml.bots.CryptoMLMixin,), dict(can_short=False)))
    finally: cloudpickle.unregister_pickle_by_value(cryptoml.bots)
    assert len(sent) < 100_000
    (tmp_path/'sent').write_bytes(sent)
    code = ("import pickle, sys; import pandas as pd; bot = pickle.load(open(sys.argv[1], 'rb')); "
            "df = pd.DataFrame(dict(ml_signal=['BUY', 'HOLD'], ml_why=['', 'stale'])); "
            "print(bot.populate_entry_trend(bot, df, {})['enter_long'].tolist(), 'torch' in sys.modules)")
    assert run(['-c', code], tmp_path/'sent').strip().endswith('[1.0, nan] False')
