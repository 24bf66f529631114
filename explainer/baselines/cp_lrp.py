"""CP-LRP (Ali et al., ICML 2022): conservative propagation through transformers, the attention matrix taken
as a constant.
"""

from __future__ import annotations

from explainer.baselines.attn_lrp import AttnLrp


class CpLrp(AttnLrp):
    """As :class:`~explainer.baselines.attn_lrp.AttnLrp`, but no relevance flows to queries and keys, and
    values receive all of it.
    """

    name = "cp_lrp"
    constant_attention = True
