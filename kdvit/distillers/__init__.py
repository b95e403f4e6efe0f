"""Distillers: what a student is trained against. One method a file; none holds or runs a network."""

from kdvit.distillers.base import Distiller
from kdvit.distillers.dist import DISTDistiller, dist
from kdvit.distillers.distillation_token import DistillationTokenDistiller
from kdvit.distillers.dkd import DKDDistiller, dkd
from kdvit.distillers.feature import FeatureDistiller, feature_mse
from kdvit.distillers.lift import LiftDistiller
from kdvit.distillers.logit import LogitDistiller, hard_kd, soft_kd
from kdvit.distillers.relations import (
    AttentionTransferDistiller,
    TokenRelationDistiller,
    attention_transfer,
    token_relations,
)
from kdvit.distillers.rkd import RKDDistiller
from kdvit.distillers.spectral import spectral_mse
from kdvit.distillers.vitkd import ViTKDDistiller
from kdvit.distillers.weights import Weight, WeightSchedule
from kdvit.distillers.wide_last import WideLastDistiller

__all__ = [
    "AttentionTransferDistiller",
    "DISTDistiller",
    "DKDDistiller",
    "DistillationTokenDistiller",
    "Distiller",
    "FeatureDistiller",
    "LiftDistiller",
    "LogitDistiller",
    "RKDDistiller",
    "TokenRelationDistiller",
    "ViTKDDistiller",
    "Weight",
    "WeightSchedule",
    "WideLastDistiller",
    "attention_transfer",
    "dist",
    "dkd",
    "feature_mse",
    "hard_kd",
    "soft_kd",
    "spectral_mse",
    "token_relations",
]
