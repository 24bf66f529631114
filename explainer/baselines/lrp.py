"""Layer-wise relevance propagation.

Bach et al. (2015), On pixel-wise explanations for non-linear classifier decisions by layer-wise relevance propagation, PLoS ONE 10(7);
Montavon et al. (2017), Explaining nonlinear classification decisions with deep Taylor decomposition, Pattern Recognition 65;
Montavon et al. (2019), Layer-wise relevance propagation: an overview, LNCS 11700; composites: Kohlbrenner et al. (2020).

Conventions differ between libraries; the options name them:

=============  =========================================  ==========================================
option         captum (default of epsilon, gamma, zplus)  zennit (default of the composites)
=============  =========================================  ==========================================
start          ``logit``                                  free; our default is ``logit`` everywhere
max_pool       ``stabilized``                             ``winner``
bias           ``keep``: unchanged in the denominators    ``rule``: z+ counts b+, as for weights
stabilizer     1e-9                                       1e-6
z+             x w+, whatever the sign of x;              (x w)+
               ours at negative features: (x w)+
=============  =========================================  ==========================================

Batch norms are folded into the convolution before them and residual sums are shared (option ``residual``), which captum does not do.
In ``lrp``, layer, group and RMS norms (ConvNeXt, PoolFormer, Mixer) are linear with their standard deviation as a constant (Ali et al.,
ICML 2022): with ``residual="ratio"`` relevance follows that map and biases absorb their share, with the other choices it passes
unchanged, which is the identity rule of AttnLRP (Achtibat et al., ICML 2024). For attention there are ``attn_lrp`` and ``cp_lrp``.
"""

from __future__ import annotations

from abc import abstractmethod
from functools import partial
from typing import Any, ClassVar, Literal, get_args

from torch import Tensor

from explainer.baselines.kernels.relevance_attributor import RelevanceBaseline, Start, check_choice, one_hot
from explainer.baselines.kernels.relevance_rules import (
    Bias,
    FirstLayer,
    Layer,
    MaxPool,
    Residual,
    Rule,
    Rules,
    alpha_beta_rule,
    epsilon_rule,
    gamma_rule,
    plus_rule,
    plus_weights_rule,
)
from explainer.errors import ConfigError

Composite = Literal["epsilon", "gamma", "epsilon_plus", "zplus_zero_bias"]
_CAPTUM = {"epsilon": 1e-9, "stabilizer": 1e-9, "bias": "keep", "max_pool": "stabilized", "residual": "ratio"}
_ZENNIT = {"epsilon": 1e-6, "stabilizer": 1e-6, "bias": "rule", "max_pool": "winner", "residual": "positive"}
_DEFAULTS: dict[str, dict[str, Any]] = {
    "epsilon": _CAPTUM,
    "gamma": _CAPTUM,
    "epsilon_plus": _ZENNIT,
    "zplus_zero_bias": {**_ZENNIT, "bias": "zero"},
}


class _LrpFamily(RelevanceBaseline):
    """Shared options; see :class:`Lrp`."""

    signed = True
    feature_norms: ClassVar[bool] = False  # whether the rules reach layer, group and RMS norms

    def __init__(
        self,
        explanandum: Any,
        start: Start,
        first_layer: FirstLayer,
        defaults: dict[str, Any],
        given: dict[str, Any],
    ) -> None:
        super().__init__(explanandum)
        options = defaults | {key: value for key, value in given.items() if value is not None}
        check_choice("start", start, get_args(Start))
        check_choice("first_layer", first_layer, get_args(FirstLayer))
        for option, kind in (("bias", Bias), ("max_pool", MaxPool), ("residual", Residual)):
            check_choice(option, options[option], get_args(kind))
        for option in ("epsilon", "stabilizer"):
            if options[option] <= 0:
                raise ConfigError(f"{option} must be positive (it keeps denominators from being 0), received {options[option]}.")
        self.start: Start = start
        self.first_layer: FirstLayer = first_layer
        self.epsilon: float = options["epsilon"]
        self.stabilizer: float = options["stabilizer"]
        self.bias: Bias = options["bias"]
        self.max_pool: MaxPool = options["max_pool"]
        self.residual: Residual = options["residual"]

    @abstractmethod
    def _weighted(self, layer: Layer) -> Rule:
        """The rule of a layer that is not the first."""

    def _rules(self, images: Tensor) -> Rules:
        def choose(layer: Layer) -> Rule:
            return self._first(self.first_layer, self._weighted(layer), images, self.epsilon) if layer.first else self._weighted(layer)

        norm: Literal["affine", "pass"] = "affine" if self.residual == "ratio" else "pass"
        return Rules(
            choose,
            residual=self.residual,
            max_pool=self.max_pool,
            norm=norm,
            epsilon=self.stabilizer,
            feature_norms=self.feature_norms,
        )

    def _start(self, logits: Tensor, class_index: Tensor) -> Tensor:
        chosen = logits.gather(1, class_index[:, None]).squeeze(1)
        return one_hot(class_index, chosen if self.start == "logit" else chosen.new_ones(chosen.shape), logits)


class Lrp(_LrpFamily):
    """LRP with one rule, or one rule per kind of layer.

    Args:
        explanandum: the classifier.
        rule: ``epsilon`` (with a tiny epsilon and ReLUs this is input x gradient; 0.1 to 0.25 damps noise), ``gamma``,
            ``epsilon_plus`` (z+ in convolutions, epsilon in linear layers) or ``zplus_zero_bias`` (z+ everywhere without biases,
            which conserves relevance exactly).
        epsilon: epsilon of the epsilon rule, and what keeps the other rules' denominators from 0. None: 1e-9, in composites 1e-6.
        gamma: how much more positive weights count, in the gamma rule.
        start: relevance of the class's logit: ``logit`` its value, ``one``.
        bias: ``keep``, ``rule`` or ``zero`` in the denominators. None: see the module's table.
        max_pool: ``stabilized``, ``winner`` or ``proportional``. None: see the module's table.
        first_layer: ``same``, ``z_box`` (pixels bounded by black and white) or ``w_square``.
        residual: how sums of feature maps are shared. None: ``ratio`` for epsilon and gamma, ``positive`` for composites.
        stabilizer: what keeps the denominators of pooling layers and sums from 0. None: 1e-9, in composites 1e-6.
    """

    name = "lrp"
    feature_norms = True

    def __init__(
        self,
        explanandum: Any,
        *,
        rule: Composite = "epsilon",
        epsilon: float | None = None,
        gamma: float = 0.25,
        start: Start = "logit",
        bias: Bias | None = None,
        max_pool: MaxPool | None = None,
        first_layer: FirstLayer = "same",
        residual: Residual | None = None,
        stabilizer: float | None = None,
    ) -> None:
        check_choice("rule", rule, get_args(Composite))
        given = {"epsilon": epsilon, "bias": bias, "max_pool": max_pool, "residual": residual, "stabilizer": stabilizer}
        super().__init__(explanandum, start, first_layer, _DEFAULTS[rule], given)
        if gamma < 0:
            raise ConfigError(f"gamma must be at least 0, received {gamma}.")
        self.rule: Composite = rule
        self.gamma = gamma

    def _weighted(self, layer: Layer) -> Rule:
        if self.rule == "epsilon" or (self.rule == "epsilon_plus" and layer.kind == "linear"):
            return partial(epsilon_rule, epsilon=self.epsilon, bias=self.bias)
        if self.rule == "gamma":
            return partial(gamma_rule, gamma=self.gamma, epsilon=self.epsilon, bias=self.bias)
        return partial(plus_rule, epsilon=self.epsilon, bias=self.bias)


class LrpAlphaBeta(_LrpFamily):
    """LRP-alpha-beta (Bach et al. 2015, eq. 60), beta = alpha - 1.

    Args:
        explanandum: the classifier.
        alpha: weight of positive contributions, at least 1 (1 is the z+ rule, 2 the usual choice).
        start, first_layer, bias, max_pool, residual, epsilon: as for :class:`Lrp`; the default bias counts with its own sign.
    """

    name = "lrp_alpha_beta"
    passes = "1 forward + 1 modified backward (4 linear maps a layer)"

    def __init__(
        self,
        explanandum: Any,
        *,
        alpha: float = 2.0,
        start: Start = "logit",
        first_layer: FirstLayer = "same",
        bias: Bias | None = None,
        max_pool: MaxPool | None = None,
        residual: Residual | None = None,
        epsilon: float | None = None,
    ) -> None:
        given = {"epsilon": epsilon, "bias": bias, "max_pool": max_pool, "residual": residual, "stabilizer": epsilon}
        defaults = {**_ZENNIT, "epsilon": 1e-9, "stabilizer": 1e-9}
        super().__init__(explanandum, start, first_layer, defaults, given)
        if alpha < 1:
            raise ConfigError(f"alpha must be at least 1 (beta = alpha - 1 is not negative), received {alpha}.")
        self.alpha = alpha

    def _weighted(self, layer: Layer) -> Rule:
        return partial(alpha_beta_rule, alpha=self.alpha, epsilon=self.epsilon, bias=self.bias)


class LrpZPlus(_LrpFamily):
    """The z+ rule (Montavon et al. 2017, eq. 15), the propagation rule of deep Taylor decomposition.

    Args:
        explanandum: the classifier.
        contributions: ``weights`` counts x w+ (captum; the formula for inputs that are not negative), ``positive`` counts (x w)+, which
            differs where inputs can be negative: at the normalised pixels and after other activations than ReLU. ``auto``: ``weights`` at
            the pixels and ``positive`` at features, so that only networks with negative features differ from captum.
        start, bias, max_pool, residual, epsilon: as for :class:`Lrp`.
        first_layer: ``same``, or ``z_box`` for the paper's rule at the pixels.
    """

    name = "lrp_zplus"
    revision = 1  # negative features give positive contributions

    def __init__(
        self,
        explanandum: Any,
        *,
        contributions: Literal["auto", "weights", "positive"] = "auto",
        start: Start = "logit",
        first_layer: FirstLayer = "same",
        bias: Bias | None = None,
        max_pool: MaxPool | None = None,
        residual: Residual = "positive",
        epsilon: float | None = None,
    ) -> None:
        check_choice("contributions", contributions, ("auto", "weights", "positive"))
        given = {"epsilon": epsilon, "bias": bias, "max_pool": max_pool, "residual": residual, "stabilizer": epsilon}
        super().__init__(explanandum, start, first_layer, _CAPTUM, given)
        self.contributions = contributions

    def _weighted(self, layer: Layer) -> Rule:
        if self.contributions == "positive":
            return partial(plus_rule, epsilon=self.epsilon, bias=self.bias)
        features: Literal["any", "positive"] = "positive" if self.contributions == "auto" else "any"
        return partial(plus_weights_rule, epsilon=self.epsilon, bias=self.bias, features=features)
