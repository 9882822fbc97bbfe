"""What the cache of an engine is managed with: decided when the engine is built, as its graph and its memory are.

A policy (``runtime/cache_policies``) decides which rows of a cache stay, and needs inputs of the graph for that: what
rows have received of attention, and biases of residual rows. It also says how many rows stay in each layer. Both are
fixed in an engine; so is what a session of it can do.
"""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

from gta_edge.plugins.attention.definition import Features
from gta_edge.support.text import brief

if TYPE_CHECKING:
    from gta_edge.model.config import ModelConfig
    from gta_edge.runtime.cache_policies.base import CachePolicy

__all__ = ["EngineCache", "policy_options"]


@dataclass(frozen=True)
class EngineCache:
    """What an engine has for a policy.

    Attributes:
        policy: the options of ``gta-edge build`` that it was built with, ``--cache-policy h2o --cache-rows 1024``.
        capacities: rows that each layer has room for.
        observe: what is observed, ``mass`` or ``last``; None if nothing is.
        bias_rows: rows whose scores can have a bias.
    """

    policy: str
    capacities: tuple[int, ...]
    observe: str | None = None
    bias_rows: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "capacities", tuple(self.capacities))  # a list, where it was read from a record

    @property
    def features(self) -> Features:
        """Which inputs the graph has.

        Raises:
            ValueError: no graph has them.
        """
        return Features(self.observe, self.bias_rows, has_positions=True)

    @classmethod
    def of(cls, policy: CachePolicy, config: ModelConfig, cache_dtype: str, **options: Any) -> EngineCache:
        """Return what a policy needs of an engine.

        Args:
            policy: which rows stay.
            config: the model's sizes.
            cache_dtype: type of cached values.
            options: ``chunk_size`` and ``max_length`` of the engine, and what else ``CacheState`` takes.

        Raises:
            InputError: the policy makes no sense for this model.
        """
        from gta_edge.runtime.managed_cache import cache_state

        capacities = cache_state(config, cache_dtype, policy, **options).capacities_for(0)
        return cls(policy_options(policy), capacities, policy.observe, policy.bias_rows)

    def lacks(self, needed: EngineCache) -> str | None:
        """Return what another policy needs and this has not, as "the engine …" goes on; None if there is nothing."""
        if needed.observe not in (None, self.observe):
            return f"observes {self.observe or 'nothing'} and not {needed.observe}"
        if needed.bias_rows > self.bias_rows:
            return f"has biases for {self.bias_rows} rows and not for {needed.bias_rows}"
        for layer, (has, needs) in enumerate(zip(self.capacities, needed.capacities, strict=True)):
            if has < needs:
                return f"has room for {has} rows in layer {layer} and not for {needs}"
        return None


def policy_options(policy: CachePolicy) -> str:
    """Return the options of the command line that stand for a policy; those at their defaults are left out.

    Measured budgets are the bundle's own in the command, wherever they were from.
    """
    given, rule = [f"--cache-policy {policy.name}"], getattr(policy, "rule", None)
    if rule is not None:
        given.append(f"--cache-rule {rule.name}")
    for option in fields(rule or policy):
        value, name = getattr(rule or policy, option.name), f"--cache-{option.name.replace('_', '-')}"
        if value is True:
            given.append(name)
        elif value != option.default and isinstance(value, int | float | str):
            given.append(f"{name} {brief(value)}")
    return " ".join(given)
