"""Distillers: what a student is trained against. One method a file; none holds or runs a network."""

from kdvit.distillers.base import Distiller
from kdvit.distillers.feature import FeatureDistiller, feature_mse
from kdvit.distillers.lift import LiftDistiller
from kdvit.distillers.logit import LogitDistiller, hard_kd, soft_kd
from kdvit.distillers.spectral import spectral_mse
from kdvit.distillers.wide_last import WideLastDistiller

__all__ = [
    "Distiller",
    "FeatureDistiller",
    "LiftDistiller",
    "LogitDistiller",
    "WideLastDistiller",
    "feature_mse",
    "hard_kd",
    "soft_kd",
    "spectral_mse",
]
