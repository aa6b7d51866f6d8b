"""Money: a person's own file of prices, YAML, family (or whole topology) -> price of one chip's hour.

v5p: 4.2
h100: 2.99
"v5e:4x8": 0.9
"""

from pathlib import Path

from jaxmed.errors import UserError
from jaxmed.plan.topology import Topology


def read_prices(path: str) -> dict[str, float]:
    import yaml

    try:
        prices = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        line = getattr(getattr(error, "problem_mark", None), "line", -1) + 1
        raise UserError(f"{path}: line {line} is no YAML; give lines such as `v5p: 4.2`") from error
    if not isinstance(prices, dict):
        raise UserError(f"{path}: give lines such as `v5p: 4.2`, the price of one chip's hour")
    numbers = (int, float)
    wrong = [f"{k}: {v}" for k, v in prices.items() if isinstance(v, bool) or not isinstance(v, numbers) or v < 0]
    if wrong:
        raise UserError(f"{path}: {', '.join(wrong)}; a price is a number, of one chip's hour")
    return {str(k).lower(): float(v) for k, v in prices.items()}


def price_of(prices: dict[str, float], topology: Topology, path: str) -> float:
    """Of one chip's hour."""
    for name in (topology.name, topology.chip.family):
        if name in prices:
            return prices[name]
    raise UserError(f"{path} has no price for {topology.chip.family}; it has {', '.join(prices) or 'none at all'}")
