from cryptoml.bots import CryptoMLModel
from freqtrade.freqai.base_models.BaseRegressionModel import BaseRegressionModel

class OurModel(CryptoMLModel, BaseRegressionModel): pass
