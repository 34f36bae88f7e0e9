"Names of markets, files that people have, and one bad coin among good ones"
import gzip, json, zipfile
from decimal import Decimal
from itertools import combinations

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import given, settings, strategies as st

from cryptoml.data import (
    CANDLE, PRICES, DataError, NoSymbol, clean, clean_each, market_frame, normalise_symbol, read_bars, read_each,
    read_panel, to_utc)
from cryptoml.features import AdvancedFeatureEngineer
from cryptoml.symbols import COINS, QUOTES

# ---- names

RIGHT = {
    'BNBUSD': 'BNB/USD',
    'DOTUSD': 'DOT/USD',
    'SHIBUSD': 'SHIB/USD',
    'USDTUSD': 'USDT/USD',
    'TUSDUSDT': 'TUSD/USDT',
    'BTCTUSD': 'BTC/TUSD',
    'BTCPYUSD': 'BTC/PYUSD',
    'BTCFDUSD': 'BTC/FDUSD',
    'BTCGUSD': 'BTC/GUSD',
    'SANDBUSD': 'SAND/BUSD',
    'BTCUSD1': 'BTC/USD1',
    'BTCKRW': 'BTC/KRW',
    'BTCAEUR': 'BTC/AEUR',
    'ADAEUR': 'ADA/EUR',
    'EURUSDT': 'EUR/USDT',
    'XRPBNB': 'XRP/BNB',
    '1000SHIBUSDT': '1000SHIB/USDT',
    '1MBABYDOGEUSDT': '1MBABYDOGE/USDT',
    'btcusdt': 'BTC/USDT',
    'XBTUSD': 'BTC/USD',
    'XXBTZUSD': 'BTC/USD',
    'XXDGZEUR': 'DOGE/EUR',
    'XETHXXBT': 'ETH/BTC',
    'XBT/USD': 'BTC/USD',
    'tBTCUSD': 'BTC/USD',
    'tDOGE:USD': 'DOGE/USD',
    'tBTCUST': 'BTC/USDT',
    'tETHF0:USTF0': 'ETH/USDT',
    'TBTCUSD': 'TBTC/USD',
    'tBTC/USDT': 'TBTC/USDT',
    'UST/USD': 'UST/USD',
    'BTCUSD_PERP': 'BTC/USD',
    'BTCUSDT_240628': 'BTC/USDT',
    'BTCUSDT-28JUN24': 'BTC/USDT',
    'BTC-USD-SWAP': 'BTC/USD',
    'BTC-USDT-240628': 'BTC/USDT',
    'BTC_USDC-PERPETUAL': 'BTC/USDC',
    'ETH_BTC': 'ETH/BTC',
    'BTC_ETH': 'ETH/BTC',
    'USDT_BTC': 'BTC/USDT',
    'KRW-BTC': 'BTC/KRW',
    'KRW-USDT': 'USDT/KRW',
    'USDT-EUR': 'USDT/EUR',
    'XBTUSDTM': 'BTC/USDT',
    'BINANCE:BTCUSDT': 'BTC/USDT',
    'KRAKEN:XBTUSD': 'BTC/USD',
    'COINBASE:BTC-USD': 'BTC/USD',
    'BYBIT:BTCUSDT.P': 'BTC/USDT',
    'BITSTAMP_SPOT_BTC_USD': 'BTC/USD',
    'BINANCEFTS_PERP_BTC_USDT': 'BTC/USDT',
    '币安人生USDT': '币安人生/USDT',
}

@pytest.mark.parametrize('name', RIGHT)
def test_a_name_is_read(name):
    assert normalise_symbol(name) == RIGHT[name]
    assert normalise_symbol(RIGHT[name]) == RIGHT[name]


@pytest.mark.parametrize('name, said', [
    ('CRBUSD', 'it may mean CR/BUSD or CRB/USD'),
    ('ARBUSD', 'it may mean AR/BUSD or ARB/USD'),                 # Arweave and Arbitrum are both coins
    ('OMGUSD', 'it may mean OM/GUSD or OMG/USD'),
    ('OPTUSD', 'it may mean OP/TUSD or OPT/USD'),                 # what is not known may be there
    ('XYZFDUSD', 'it may mean XYZ/FDUSD or XYZFD/USD'),
    ('BTC-PERP', 'write it as'),
    ('SOL-PERPETUAL', 'write it as'),
    ('BTC-28JUN24', 'write it as'),
    ('BTC.D', 'write it as'),
    ('FOO-BAR', 'BAR is no currency that is known to be one'),
    ('USDT_XYZ', 'XYZ is no currency'),
    ('BTC/USD:BTC-240628-60000-C', 'write it as'),
    ('BTC USDT', 'write it as'),
    ('USDT', 'write it as'),
    ('/', 'write it as'),
    ('', 'write it as'),
    (None, 'write it as'),
    (7, 'write it as'),
])
def test_what_may_be_another_is_refused(name, said):
    with pytest.raises(DataError, match='cannot be split') as refused: normalise_symbol(name)
    assert said in str(refused.value)


@settings(max_examples=300, deadline=None, derandomize=True)
@given(st.sampled_from(sorted(COINS)), st.sampled_from(QUOTES), st.sampled_from(['{}{}', '{}-{}', '{}_{}', '{}/{}']))
def test_a_known_coin_is_read_or_refused_and_never_another(coin, quote, form):
    try: said = normalise_symbol(form.format(coin, quote))
    except DataError: return
    assert said in (f'{coin}/{quote}', f'{quote}/{coin}')
    if form in ('{}{}', '{}/{}'): assert said == f'{coin}/{quote}'


INSTRUMENTS = ['BTCUSDT', 'BTC/USDT:USDT', 'BTCUSDT_240628', 'BTCUSDT_240927', 'BTCUSDT.P', 'KRAKEN:BTCUSDT']

@pytest.mark.parametrize('one, other', list(combinations(INSTRUMENTS, 2)))
def test_two_instruments_of_one_coin(one, other):
    "A dict goes by the rule of a column"
    half = bars(symbol=None)
    for coins in ({one: half, other: half}, {one: half[:20], other: half[20:]}):
        with pytest.raises(DataError, match='would both become'): read_bars(coins)
        column = pd.concat([x.assign(symbol=name) for name, x in coins.items()])
        with pytest.raises(DataError, match='would both become'): read_bars(column)


def test_spellings_of_one_instrument_are_one():
    names = ['BTCUSDT', 'btc-usdt', 'BTC_USDT', 'BTC/USDT']
    frame = bars(n=40).assign(symbol=np.repeat(names, 10))
    assert read_bars(frame).symbol.unique().tolist() == ['BTC/USDT']


# ---- a market, and files of it

def bars(n=40, symbol='BTC/USDT', seed=0, price=100.):
    "Hourly bars, prices rounded as an exchange prints them"
    rng = np.random.default_rng(seed)
    close = price * np.exp(rng.normal(0, .01, n).cumsum())
    open = np.r_[price, close[:-1]]
    frame = pd.DataFrame(dict(
        time=pd.date_range('2024-12-31 04:00', periods=n, freq='h', tz='UTC', unit='us'),
        symbol=symbol,
        open=open,
        high=np.maximum(open, close) * 1.003,
        low=np.minimum(open, close) * .997,
        close=close,
        volume=rng.uniform(1, 9, n),
    ))
    frame[CANDLE] = frame[CANDLE].round(4)
    return frame if symbol else frame.drop(columns='symbol')

MARKET = bars()
COUNT = np.arange(len(MARKET)) + 5.
EPOCH = {k: MARKET.time.astype('int64') // 10**6 * n for k, n in dict(s=1, ms=10**3, us=10**6).items()}

def rows(time, *more): return pd.concat([pd.Series(time), MARKET[CANDLE], *map(pd.Series, more)], axis=1)

def klines(time):
    zero = np.zeros(len(MARKET), int)
    turnover, bought = MARKET.volume * MARKET.close, MARKET.volume / 2
    return rows(time, time + 3_599_999, turnover, COUNT.astype(int), bought, MARKET.volume, zero)

def cryptodatadownload(unix=EPOCH['s'], form='%Y-%m-%d %H:%M:%S'):
    columns = dict(Unix=unix, Date=MARKET.time.dt.strftime(form), Symbol='BTCUSDT')
    prices = {c.capitalize(): MARKET[c] for c in PRICES}
    rest = {'Volume BTC': MARKET.volume, 'Volume USDT': MARKET.volume * MARKET.close, 'tradecount': COUNT.astype(int)}
    return pd.DataFrame(columns | prices | rest)[::-1]

KLINE = ('open_time open high low close volume close_time quote_volume count taker_buy_volume taker_buy_quote_volume '
         'ignore').split()
PLAIN = MARKET.drop(columns='symbol').rename(columns=dict(time='date'))
NEW_YORK = MARKET.time.dt.tz_convert('America/New_York').map(lambda t: t.isoformat())

def csv(frame, **how): return lambda path: frame.to_csv(path, index=False, **how)
def text(words): return lambda path: path.write_text(words, encoding='utf-8')

def zipped(path):
    january = klines(EPOCH['us']).to_csv(index=False, header=False)
    with zipfile.ZipFile(path, 'w') as f: f.writestr('BTCUSDT-1h-2025-01.csv', january)

def listed(path):
    with (gzip.open if path.suffix == '.gz' else open)(path, 'wt') as f: json.dump(rows(EPOCH['ms']).values.tolist(), f)

TWO_UNITS = np.where(COUNT < 20, EPOCH['s'], EPOCH['ms'])
URL = 'https://www.CryptoDataDownload.com\n'
FILES = {   # name, how it is written, extra columns that it has
    'XBTUSDT_60.csv': (csv(rows(EPOCH['s'], COUNT.astype(int)), header=False), {'trades'}),
    'BTCUSDT-1h-2024-12.csv': (csv(klines(EPOCH['ms']), header=False), {'quote_volume', 'trades', 'taker_buy_volume'}),
    'BTCUSDT-1h-2025-01.csv': (csv(klines(EPOCH['us']), header=False), {'quote_volume', 'trades', 'taker_buy_volume'}),
    'BTCUSDT-1h-2025-01.zip': (zipped, {'quote_volume', 'trades', 'taker_buy_volume'}),
    'futures.csv': (csv(klines(EPOCH['ms']).set_axis(KLINE, axis=1)), {'quote_volume', 'trades', 'taker_buy_volume'}),
    'Binance_BTCUSDT_1h.csv': (text(URL + cryptodatadownload().to_csv(index=False)), {'quote_volume', 'trades'}),
    'no_url.csv': (csv(cryptodatadownload()), {'quote_volume', 'trades'}),
    'old_dates.csv': (csv(cryptodatadownload(form='%Y-%m-%d %I-%p')), {'quote_volume', 'trades'}),
    'two_units.csv': (csv(cryptodatadownload(TWO_UNITS)), {'quote_volume', 'trades'}),
    'tradingview.csv': (csv(PLAIN.assign(date=NEW_YORK, **{'Volume MA': 1., 'Volume MA.1': 2.})), set()),
    'BTC_USDT-1h.json': (listed, set()),
    'BTC_USDT-1h.json.gz': (listed, set()),
    'BTC_USDT-1h.feather': (lambda path: PLAIN.assign(date=PLAIN.date.dt.as_unit('ms')).to_feather(path), set()),
    'packed.csv.gz': (csv(PLAIN), set()),
    'index.csv': (lambda path: PLAIN.set_index('date').to_csv(path), set()),
    'bom.csv': (csv(PLAIN, encoding='utf-8-sig'), set()),
    'bom_unnamed.csv': (csv(rows(EPOCH['s']), header=False, encoding='utf-8-sig'), set()),
    'blanks.csv': (text(PLAIN.to_csv(index=False).replace(',', ', ')), set()),
}

@pytest.mark.parametrize('name', FILES)
def test_a_file_is_read(tmp_path, name):
    write, extra = FILES[name]
    write(tmp_path/name)
    read = market_frame(tmp_path/name, symbol='BTC/USDT')
    pd.testing.assert_frame_equal(read[MARKET.columns], MARKET)
    assert set(read) - set(MARKET) == extra
    if 'trades' in extra: assert read.trades.tolist() == COUNT.tolist()
    if 'taker_buy_volume' in extra: np.testing.assert_allclose(read.taker_buy_volume, MARKET.volume / 2)
    if 'quote_volume' in extra: np.testing.assert_allclose(read.quote_volume, MARKET.volume * MARKET.close)


@pytest.mark.parametrize('name, write, said', [
    ('european.csv', csv(PLAIN, sep=';', decimal=','), "separated by ';', not by a comma"),
    ('tabs.csv', csv(PLAIN, sep='\t'), r"separated by '\\t', not by a comma"),
    ('comma.csv', csv(PLAIN.assign(close=PLAIN.close.map(lambda x: f'{x}'.replace('.', ',')))), 'with a decimal point'),
    ('empty.csv', text(''), 'cannot read'),
    ('nine.csv', csv(klines(EPOCH['ms']).iloc[:, :9], header=False), '9 columns without names are no layout'),
    ('coinbase.csv', csv(rows(EPOCH['s']).iloc[:, [0, 3, 2, 1, 4, 5]], header=False), 'order of the columns'),
    ('words.json', text('{"BTC/USDT": "Too many requests"}'), 'BTC/USDT: no such file: Too many requests'),
    ('broken.json', text('[[1, 2'), 'cannot read'),
])
def test_a_file_is_refused(tmp_path, name, write, said):
    write(tmp_path/name)
    with pytest.raises(DataError, match=said): read_bars(tmp_path/name, symbol=None if 'json' in name else 'BTC/USDT')


@pytest.mark.parametrize('name, symbol', [
    ('BTC_USDT-1h.csv', 'BTC/USDT'),
    ('BTC_USDT_USDT-1h-futures.csv', 'BTC/USDT'),
    ('BTCUSDT-1h-2025-01.csv', 'BTC/USDT'),
    ('XBTUSD_60.csv', 'BTC/USD'),
    ('Bitstamp_BTCUSD_2021_minute.csv', 'BTC/USD'),
])
def test_the_name_of_a_file_says_whose_bars_it_holds(tmp_path, name, symbol):
    PLAIN.to_csv(tmp_path/name, index=False)
    assert read_bars(tmp_path/name).symbol.unique().tolist() == [symbol]
    assert read_bars(tmp_path/name, symbol='ETHUSDT').symbol[0] == 'ETH/USDT'              # the user knows better
    with pytest.raises(DataError, match='unknown symbols ETH/USDT'): read_bars(tmp_path/name, 'ETHUSDT')


@pytest.mark.parametrize('name', ['bars.csv', 'model-1h.csv', 'CRBUSD_60.csv', 'a-2b.csv'])
def test_a_name_that_says_nothing(tmp_path, name):
    PLAIN.to_csv(tmp_path/name, index=False)
    with pytest.raises(NoSymbol): read_bars(tmp_path/name)


def test_a_folder_of_files(tmp_path):
    coins = {'BTC_USDT': bars(), 'ETH_USDT': bars(symbol='ETH/USDT', seed=1)}
    for name, frame in coins.items(): frame.drop(columns='symbol').to_feather(tmp_path/f'{name}-1h.feather')
    (tmp_path/'BTC_USDT_USDT-8h-mark.feather').write_bytes(b'no bars')
    (tmp_path/'readme.txt').write_text('notes')
    pd.testing.assert_frame_equal(market_frame(tmp_path), pd.concat(coins.values(), ignore_index=True))
    (tmp_path/'ETH_USDT-4h.feather').write_bytes(b'of another length')
    with pytest.raises(DataError, match='hold bars of 1h, 4h: pass timeframe'): read_bars(tmp_path)
    panel, report = read_panel(tmp_path, timeframe='1h')
    assert (panel.symbols, report.refused) == (['BTC/USDT', 'ETH/USDT'], {})
    with pytest.raises(DataError, match='hold bars of 1h, 4h'): read_panel(tmp_path, timeframe='1d')
    (tmp_path/'mine.csv').write_text('a,b\n')
    with pytest.raises(DataError, match='holds mine.csv, whose name does not say'): read_panel(tmp_path, timeframe='1h')


def test_the_months_of_a_coin_are_joined(tmp_path):
    "December in milliseconds without names, January in microseconds with them"
    december = MARKET.time < '2025-01-01'
    old, new = klines(EPOCH['ms'])[december], klines(EPOCH['us']).set_axis(KLINE, axis=1)[~december]
    old.to_csv(tmp_path/'BTCUSDT-1h-2024-12.csv', header=False, index=False)
    new.to_csv(tmp_path/'BTCUSDT-1h-2025-01.csv', index=False)
    pd.testing.assert_frame_equal(market_frame(tmp_path)[MARKET.columns], MARKET)
    files = sorted(tmp_path.iterdir())
    pd.testing.assert_frame_equal(market_frame(files)[MARKET.columns], MARKET)
    pd.testing.assert_frame_equal(market_frame({'BTC/USDT': files})[MARKET.columns], MARKET)


# ---- tables

def decimal(x): return Decimal(f'{x:.4f}')

SHAPES = {
    'Decimal': lambda: MARKET.assign(**{c: MARKET[c].map(decimal) for c in CANDLE}),
    'text': lambda: MARKET.astype({c: str for c in CANDLE}),
    'arrow table': lambda: pa.Table.from_pandas(MARKET),
    'arrow frame': lambda: pa.Table.from_pandas(MARKET).to_pandas(types_mapper=pd.ArrowDtype),
    'arrow decimals': lambda: pa.table(
        dict(time=pa.array(EPOCH['ms']), symbol=['BTC/USDT'] * len(MARKET))
        | {c: pa.array(MARKET[c].map(decimal), pa.decimal128(20, 8)) for c in CANDLE}
    ).to_pandas(types_mapper=pd.ArrowDtype),
    'nullable': lambda: MARKET.convert_dtypes().assign(time=EPOCH['ms'].astype('Int64')),
    'categories': lambda: MARKET.assign(symbol=MARKET.symbol.astype('category')),
    'epoch as text': lambda: MARKET.assign(time=EPOCH['us'].astype(str)),
    'dict of columns': lambda: {c: MARKET[c].tolist() for c in MARKET},
    'records': lambda: MARKET.to_dict('records'),
    'structured': lambda: MARKET.assign(time=EPOCH['ms']).to_records(index=False),
    'lists in a frame': lambda: pd.DataFrame(rows(EPOCH['ms']).values.tolist()),
    'newest first, in text': lambda: [[int(t), *map(str, r)] for t, *r in rows(EPOCH['ms']).values.tolist()][::-1],
    'CoinAPI': lambda: MARKET.rename(columns=dict(
        time='time_period_start', volume='volume_traded', **{c: f'price_{c}' for c in PRICES})),
    'camel case': lambda: MARKET.rename(columns=dict(time='openTime', **{c: f'{c}Price' for c in PRICES})),
}

@pytest.mark.parametrize('shape', SHAPES)
def test_a_table_is_read(shape):
    pd.testing.assert_frame_equal(market_frame(SHAPES[shape](), symbol='BTC/USDT'), MARKET)


@pytest.mark.parametrize('columns, extra', [
    (dict(qav=9., num_trades=7, taker_base_vol=2.), [9, 7, 2]),                    # python-binance tutorials
    (dict(quote_asset_volume=9., number_of_trades=7, taker_buy_base_asset_volume=2.), [9, 7, 2]),
    (dict(quoteAssetVolume=9., count=7, takerBuyBaseAssetVolume=2.), [9, 7, 2]),
    (dict(quote_av=9., trades=7, tb_base_av=2.), [9, 7, 2]),
])
def test_columns_that_are_called_otherwise(columns, extra):
    read = read_bars(MARKET.assign(**columns)).iloc[0]
    assert read[['quote_volume', 'trades', 'taker_buy_volume']].tolist() == extra


@pytest.mark.parametrize('more, name', [
    ((COUNT,), 'trades'),                                                          # Kraken
    ((MARKET.volume * (MARKET.high + MARKET.low) / 2,), 'quote_volume'),           # Bybit
])
def test_a_seventh_column_without_a_name(more, name):
    assert list(read_bars(rows(EPOCH['ms'], *more).values.tolist(), symbol='BTC/USDT'))[7:] == [name]


def lists(*columns): return [list(row) for row in zip(EPOCH['ms'], *(MARKET[c] for c in columns))]

@pytest.mark.parametrize('given, said', [
    (lists('low', 'high', 'open', 'close', 'volume'), 'order of the columns'),                       # Coinbase
    (lists('open', 'close', 'high', 'low', 'volume'), 'order of the columns'),                       # Bitfinex
    (lists('open', 'close', 'high', 'low', 'volume', 'volume'), 'order of the columns'),             # KuCoin
    (lists('volume', 'close', 'high', 'low', 'open', 'volume', 'volume'), 'order of the columns'),   # Gate
    (lists('open', 'high', 'low', 'close', 'volume', 'volume', 'volume', 'volume'), '9 columns without names'),    # OKX
    (lists('open', 'high', 'low', 'close', 'volume', 'high'), 'seventh of seven columns'),
    (pd.read_csv, 'cannot take bars from a function'),
    (rows(EPOCH['ms']).set_axis([str(x) for x in rows(EPOCH['ms']).iloc[0]], axis=1), 'read it with header=None'),
])
def test_a_table_is_refused(given, said):
    with pytest.raises(DataError, match=said): read_bars(given, symbol='BTC/USDT')


def test_the_order_is_told_by_bars_that_moved():
    "Flat bars are the same in any order, one bad print is no order, and a third without shadows is not enough"
    flat = [[t, c, c, c, c, 1.] for t, c in zip(EPOCH['ms'], MARKET.close)]
    assert (read_bars(flat, symbol='BTC/USDT').close == MARKET.close).all()
    one_bad = lists(*CANDLE)
    one_bad[7][4] *= 2
    assert len(clean(read_bars(one_bad, symbol='BTC/USDT'))[0]) == len(MARKET) - 1
    low, high = MARKET[['open', 'close']].min(axis=1), MARKET[['open', 'close']].max(axis=1)
    bare = [list(row) for row in zip(EPOCH['s'], low, high, MARKET.open, MARKET.close, MARKET.volume)]      # Coinbase
    with pytest.raises(DataError, match='order of the columns'): read_bars(bare, symbol='BTC/USDT')


SECONDS = st.integers(1_231_000_000, 4_102_000_000)

@settings(max_examples=60, deadline=None, derandomize=True)
@given(st.lists(st.tuples(SECONDS, st.sampled_from([1, 10**3, 10**6, 10**9])), min_size=1))
def test_every_row_says_its_unit(times):
    numbers = np.array([t * k for t, k in times], dtype=np.int64)
    assert (to_utc(numbers).asi8 == np.array([t for t, _ in times]) * 10**6).all()


TEN = ['2024-12-31 10:00', '20241231T10', 1735639200, 1735639200000, '2024-12-31T11:00+01:00']

@pytest.mark.parametrize('start', TEN)
def test_a_bound_is_read(start): assert read_bars(MARKET, start=start).time.min().hour == 10

@pytest.mark.parametrize('start', ['05/01/2024', 'soon', 'Jan 1, 2024'])
def test_a_bound_that_is_two_days(start):
    with pytest.raises(DataError, match='is no day and no moment'): read_bars(MARKET, start=start)


# ---- one bad coin

GOOD = {'BTC/USDT': bars(symbol=None), 'SOL/USDT': bars(symbol=None, seed=2)}
SLOW = bars(symbol=None).assign(time=pd.date_range('2024-12-31 04:00', periods=40, freq='4h', tz='UTC', unit='us'))
BAD = {   # what one coin answers, and what is said of it
    'empty': ([], 'no rows'),
    'None': (None, 'cannot take bars from a NoneType'),
    'words': ('<html>502 Bad Gateway</html>', 'no such file'),
    'long words': ('Too many requests. ' * 1000, 'no such file'),
    'an error': ({'code': -1003, 'msg': 'Too many requests'}, 'code: cannot take bars from a int'),
    'rows of None': ([None, None], 'no column for'),
    'no volume': (bars(symbol=None).drop(columns='volume'), 'no column for volume'),
    'text': (bars(symbol=None).assign(close='n/a'), 'values are no numbers'),
    'no time': ([[0, 1, 1, 1, 1, 1]], 'no epoch time'),
    'another coin': (bars(), "given as 'ETH/USDT' holds"),
    'all bad': (bars(symbol=None).assign(close=np.nan), 'not a single usable bar: NaN in close (40 times)'),
    'four hours': (SLOW, 'mixed timeframes'),
}

@pytest.mark.parametrize('kind', BAD)
@pytest.mark.parametrize('asked', [None, ['BTCUSDT', 'ETHUSDT', 'SOLUSDT']])
def test_one_bad_coin_is_named_and_left_out(kind, asked):
    answer, said = BAD[kind]
    panel, report = read_panel(GOOD | {'ETH/USDT': answer}, asked)
    alone, _ = read_panel(GOOD)
    pd.testing.assert_frame_equal(panel.frame(), alone.frame())
    assert list(report.refused) == ['ETH/USDT'] and said in report.refused['ETH/USDT']
    assert report.symbols == ['BTC/USDT', 'SOL/USDT']
    assert panel.symbols == (['BTC/USDT', 'ETH/USDT', 'SOL/USDT'] if asked else report.symbols)     # its row is masked
    for shown in (report.headline(), str(report), report._repr_html_()): assert 'left out: ETH/USDT: ' in shown


@pytest.mark.parametrize('kind', [k for k in BAD if k not in ('all bad', 'four hours')])
def test_the_strict_reader_names_the_coin(kind):
    with pytest.raises(DataError, match='^ETH/USDT: '): read_bars(GOOD | {'ETH/USDT': BAD[kind][0]})


@pytest.mark.parametrize('kind', ['text', 'all bad', 'four hours'])
def test_one_bad_coin_in_one_frame(kind):
    answer, said = BAD[kind]
    frame = pd.concat([x.assign(symbol=name) for name, x in (GOOD | {'ETH/USDT': answer}).items()])
    panel, report = read_panel(frame)
    assert panel.symbols == ['BTC/USDT', 'SOL/USDT'] and said in report.refused['ETH/USDT']


@pytest.mark.parametrize('name', ['CRBUSD', 'GOLD', 'BTC-PERP'])
def test_a_coin_whose_name_is_refused(name):
    panel, report = read_panel(GOOD | {name: bars(symbol=None)})
    assert panel.symbols == ['BTC/USDT', 'SOL/USDT'] and 'cannot be split' in report.refused[name]
    frame = pd.concat([x.assign(symbol=k) for k, x in (GOOD | {name: bars(symbol=None)}).items()])
    assert read_panel(frame)[1].refused == report.refused


def test_two_instruments_are_left_out_both():
    panel, report = read_panel(GOOD | {'BTC/USDT:USDT': bars(symbol=None, seed=1)})
    assert panel.symbols == ['SOL/USDT'] and 'would both become' in report.refused['BTC/USDT']


def test_an_unreadable_file_of_a_folder(tmp_path):
    for name, frame in GOOD.items(): frame.to_feather(tmp_path/f'{name.replace("/", "_")}-1h.feather')
    (tmp_path/'ETH_USDT-1h.feather').write_bytes(b'cut off')
    panel, report = read_panel(tmp_path)
    assert panel.symbols == ['BTC/USDT', 'SOL/USDT'] and 'cannot read' in report.refused['ETH/USDT']
    with pytest.raises(DataError, match='ETH_USDT: cannot read'): read_bars(tmp_path)


@pytest.mark.parametrize('data, symbols, said', [
    ({}, None, 'no rows'),
    ({'BTC/USDT': [], 'ETH/USDT': 3}, None, 'no coin can be used: BTC/USDT: no rows.*; ETH/USDT: cannot take bars'),
    (GOOD | {'ETH/USDT': []}, ['ETH/USDT'], 'no coin can be used: ETH/USDT: no rows'),
    (GOOD | {'ETH/USDT': []}, ['BTC/USDT', 'XRP/USDT'], 'unknown symbols XRP/USDT'),
    (bars().drop(columns='close'), None, '^no column for close'),
    (pd.concat([bars(), bars(symbol='ETH/USDT')]).drop(columns='close'), None, '^no column for close'),
    (bars().assign(symbol=None), None, '40 of 40 rows have none'),
])
def test_where_nothing_is_left(data, symbols, said):
    with pytest.raises(DataError, match=said): read_panel(data, symbols)


def test_a_coin_asked_for_that_is_not_there_at_that_time():
    late = GOOD['SOL/USDT'].assign(time=lambda x: x.time + pd.Timedelta('30h'))
    panel, report = read_panel(GOOD | {'SOL/USDT': late}, ['BTC/USDT', 'SOL/USDT'], end='2025-01-01')
    assert panel.mask.sum(1).tolist() == [20, 0] and 'no rows from None to 2025-01-01' in report.refused['SOL/USDT']


def test_a_coin_with_one_bar_goes_with_the_others():
    "Its own timeframe cannot be told, that of the others can"
    coins = [x.assign(symbol=k) for k, x in (GOOD | {'XRP/USDT': SLOW}).items()]
    young = pd.concat([*coins, bars(1, 'ETH/USDT')])
    good, report = clean_each(read_each(young)[0])
    assert list(report.refused) == ['XRP/USDT'] and (good.symbol == 'ETH/USDT').sum() == 1


# ---- live bars

@pytest.mark.parametrize('form', [
    lambda t, row: [t, *row],                                                      # ccxt
    lambda t, row: (t, *map(str, row)),
    lambda t, row: dict(zip(['timestamp', *CANDLE], [t, *row])),
    lambda t, row: dict(zip(['Date', *map(str.capitalize, CANDLE)], [pd.Timestamp(t, unit='ms'), *row])),
    lambda t, row: pd.Series([t, *row], ['open_time', *CANDLE]),
])
def test_a_live_bar_in_any_form(form):
    engineer = AdvancedFeatureEngineer(families=['technical'])
    one, other, panel = engineer.stream('BTC/USDT'), engineer.stream('BTC/USDT'), engineer.panel_stream(['BTC/USDT'])
    for t, plain in zip(EPOCH['ms'], MARKET.to_dict('records')):
        bar = form(int(t), [plain[c] for c in CANDLE])
        expected = one.update(plain)
        np.testing.assert_array_equal(other.update(bar), expected)
        np.testing.assert_array_equal(panel.update({'BTCUSDT': bar})[0], expected)


@pytest.mark.parametrize('bar, said', [
    ([1, 2, 3], 'a list is no bar: pass a mapping with time, open, high, low, close, volume'),
    (None, 'a NoneType is no bar'),
    (dict(timestamp=1, open=1.), 'the bar has no high, low, close, volume'),
    (dict(open=1.), 'the bar has no time, high'),
])
def test_what_is_no_bar(bar, said):
    engineer = AdvancedFeatureEngineer(families=['technical'])
    with pytest.raises(DataError, match=said): engineer.stream('BTC/USDT').update(bar)
    with pytest.raises(DataError, match=said): engineer.panel_stream(['BTC/USDT']).update({'BTC/USDT': bar})
