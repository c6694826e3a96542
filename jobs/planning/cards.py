"""Graphics cards that are rented for this, as their makers describe them. Figures to plan with, not measurements."""

from dataclasses import dataclass, replace

from cluster.errors import ConfigError


@dataclass(frozen=True)
class Card:
    """One card.

    Args:
        bf16_tflops: peak of dense bfloat16 matrix products, without sparsity, in TFLOP/s.
        memory_gb: in gigabytes of 1,000,000,000 bytes.
        per_node: cards in the instance below.
        instance: the smallest AWS instance type that is sold with it.
        usd_per_hour: of one card, or None where no price was at hand.
        priced: what that price is, and of when.
    """

    name: str
    bf16_tflops: float
    memory_gb: float
    per_node: int
    instance: str
    usd_per_hour: float | None = None
    priced: str = "no price at hand"


_BLOCK = "AWS capacity block, December 2024"
CARDS = {
    card.name: card
    for card in (
        Card("l4", 121, 24, 1, "g6.xlarge"),
        Card("a10g", 70, 24, 1, "g5.xlarge", 1.006, "AWS on demand, us-east-1, June 2026"),
        Card("l40s", 362, 48, 1, "g6e.xlarge"),
        Card("a100_40", 312, 40, 8, "p4d.24xlarge", 1.844, _BLOCK),
        Card("a100_80", 312, 80, 8, "p4de.24xlarge"),
        Card("h100", 989, 80, 8, "p5.48xlarge", 4.916, _BLOCK),
        Card("h200", 989, 141, 8, "p5en.48xlarge", 5.408, _BLOCK),
        Card("b200", 2250, 180, 8, "p6-b200.48xlarge"),
    )
}


def find_card(name: str, prices: dict[str, float] | None = None) -> Card:
    """The card of a name, at the price given for it if there is one (dollars per card and hour).

    Raises:
        ConfigError: no such card.
    """
    if name not in CARDS:
        raise ConfigError(f"card {name}: not in the table; known: {', '.join(CARDS)}")
    card = CARDS[name]
    return replace(card, usd_per_hour=prices[name], priced="as given") if prices and name in prices else card


def read_prices(given: list[str]) -> dict[str, float]:
    """Prices from `CARD=DOLLARS` texts.

    Raises:
        ConfigError: another form, an unknown card, or no positive number.
    """
    prices = {}
    for text in given:
        name, _, value = text.partition("=")
        find_card(name)
        try:
            prices[name] = float(value)
        except ValueError:
            prices[name] = 0.0
        if not 0 < prices[name] < float("inf"):
            raise ConfigError(f"price {text!r}: expected CARD=DOLLARS for a card and hour, for example h100=4.9")
    return prices
