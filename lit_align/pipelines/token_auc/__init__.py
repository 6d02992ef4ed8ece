"""Token weights against the errors that people marked."""

from lit_align.pipelines.token_auc.pipeline import token_weight_auc

__all__ = ["token_weight_auc"]
