"""A FreqAI strategy: a user's features and label, our model"""
import numpy as np
from freqtrade.strategy import IStrategy

class Learner(IStrategy):
    timeframe = '1h'
    startup_candle_count = 40
    process_only_new_candles = True
    minimal_roi = {'0': 10}
    stoploss = -.2

    def feature_engineering_expand_all(self, dataframe, period, metadata, **kwargs):
        r = np.log(dataframe['close']).diff()
        dataframe['%-trend-period'] = r.rolling(period).mean()
        dataframe['%-move-period'] = r.rolling(period).std()
        return dataframe

    def feature_engineering_expand_basic(self, dataframe, metadata, **kwargs):
        dataframe['%-change'] = dataframe['close'].pct_change()
        return dataframe

    def feature_engineering_standard(self, dataframe, metadata, **kwargs):
        dataframe['%-hour'] = dataframe['date'].dt.hour
        return dataframe

    def set_freqai_targets(self, dataframe, metadata, **kwargs):
        ahead = self.freqai_info['feature_parameters']['label_period_candles']
        dataframe['&-move'] = np.log(dataframe['close'].shift(-ahead) / dataframe['close'])
        return dataframe

    def populate_indicators(self, dataframe, metadata): return self.freqai.start(dataframe, metadata, self)

    def populate_entry_trend(self, dataframe, metadata):
        sure = (dataframe['do_predict'] == 1) & (dataframe['&-move'] > .2 * dataframe['ml_spread'])
        dataframe.loc[sure, 'enter_long'] = 1
        return dataframe

    def populate_exit_trend(self, dataframe, metadata):
        dataframe.loc[dataframe['&-move'] < 0, 'exit_long'] = 1
        return dataframe
