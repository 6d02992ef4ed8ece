"""LightningModules, one an objective."""

from lit_align.modules.base import LanguageModelModule
from lit_align.modules.ila_mask_learning import ILAMaskLearning
from lit_align.modules.masked_dpo import MaskedDPO
from lit_align.modules.sft import SupervisedFineTuning
from lit_align.modules.token_weighted_npo import TokenWeightedNPO

__all__ = [
    "ILAMaskLearning",
    "LanguageModelModule",
    "MaskedDPO",
    "SupervisedFineTuning",
    "TokenWeightedNPO",
]
