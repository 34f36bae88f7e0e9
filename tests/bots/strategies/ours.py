"""Strategies of `make bots`: as a user writes one, one that writes down what it was told, and one that leaks"""
import json, os
from pathlib import Path

from freqtrade.strategy import IStrategy

from cryptoml.bots import COLUMNS, CryptoMLMixin

class MyBot(CryptoMLMixin, IStrategy):
    ml_model = os.environ.get('BOT_MODEL')
    ml_config = dict(act_on='FAIL')      # a model of two epochs is judged so, and is to trade all the same
    ml_min_confidence = 0.

class Careful(CryptoMLMixin, IStrategy): ml_model = os.environ.get('BOT_MODEL')

class Traced(MyBot):
    "Live, what it was told of each newest bar goes to a file, and the bars it was told it from to another"
    def populate_indicators(self, dataframe, metadata):
        pair, folder = metadata['pair'], Path(os.environ['BOT_TRACE'])
        frames = self.ml_frames(dataframe, pair, pair)
        df = super().populate_indicators(dataframe, metadata)
        for coin, frame in frames.items(): frame.to_parquet(folder/f'{coin.replace("/", "_")}.parquet')
        row = dict(pair=pair, date=str(df['date'].iloc[-1])) | df[list(COLUMNS)].iloc[-1].to_dict()
        with open(folder/'said.jsonl', 'a') as f: f.write(json.dumps(row) + '\n')
        return df

class Leaky(MyBot):
    "It waits for bars that rise: two bars ahead"
    def populate_entry_trend(self, dataframe, metadata):
        dataframe = super().populate_entry_trend(dataframe, metadata)
        dataframe.loc[dataframe['close'].shift(-2) < dataframe['close'], 'enter_long'] = 0
        return dataframe
