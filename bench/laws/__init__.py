"""Laws of events: each is drawn fresh from a seed, and the best answer to every question is known."""

from bench.laws import bursts, lifelong, marks, phases, rare, rhythm, season, shop, single
from bench.laws.case import Law

LAWS: dict[str, Law] = {
    law.name: law
    for law in (
        shop.LAW, phases.LAW, lifelong.LAW, rhythm.LAW, bursts.LAW, single.LAW, season.LAW, rare.LAW, marks.LAW, shop.FEW
    )
}  # fmt: skip
