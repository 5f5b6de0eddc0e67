"""A simulated shop whose law is known, so that the best attainable score is known too.

The law is a marked Markovian arrival process (Neuts, "A versatile Markovian point process", 1979; Asmussen & Koole, "Marked point
processes as limits of Markovian arrival streams", 1993). A user is in one hidden state, a pair of a fixed segment and a moving intent.
In state i, an event of type k that leads to state j comes at the rate D_k[i, j], and a silent move to j at the rate D0[i, j]; the
diagonal of D0 makes the rows of D0 + sum D_k zero. Rates are per day and do not depend on the hour or the date.

A user's first event is the arrival: always a page_view, after which the state is drawn from `initial`. Items, categories and values
depend on the events before them and never on the hidden state, so they tell nothing about it that types and times do not.

Axis letters: S states, I intents, K event types, U users, E events.
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]

DAY_MS = 86_400_000

TYPES = ("page_view", "search", "product_view", "add_to_cart", "remove_from_cart", "purchase", "email_open")
INTENTS = ("browsing", "considering", "buying", "dormant", "gone")

# Events a day, of a user in the middle segment.
RATES_IK = np.array(
    [
        # page, search, product, cart, remove, purchase, email
        [0.600, 0.06, 0.200, 0.004, 0.002, 0.001, 0.020],  # browsing
        [0.500, 0.70, 1.400, 0.220, 0.080, 0.005, 0.010],  # considering
        [0.800, 0.50, 1.600, 2.400, 0.400, 0.900, 0.000],  # buying
        [0.006, 0.00, 0.003, 0.000, 0.000, 0.000, 0.025],  # dormant
        [0.000, 0.00, 0.000, 0.000, 0.000, 0.000, 0.000],  # gone
    ]
)

# Silent moves a day, from row to column.
MOVES_II = np.array(
    [
        # browsing, considering, buying, dormant, gone
        [0.000, 0.007, 0.00, 0.13, 0.010],
        [0.160, 0.000, 0.08, 0.06, 0.003],
        [0.100, 0.100, 0.00, 0.06, 0.000],
        [0.014, 0.000, 0.00, 0.00, 0.015],
        [0.000, 0.000, 0.00, 0.00, 0.000],
    ]
)

# Where an event leads: (type, intent before it) -> probability of each intent after it. An event not named here changes nothing.
LEADS_TO = {
    ("search", "browsing"): (0.94, 0.06, 0.00, 0.00, 0.00),
    ("product_view", "browsing"): (0.97, 0.03, 0.00, 0.00, 0.00),
    ("add_to_cart", "browsing"): (0.30, 0.50, 0.20, 0.00, 0.00),
    ("add_to_cart", "considering"): (0.00, 0.65, 0.35, 0.00, 0.00),
    ("remove_from_cart", "considering"): (0.40, 0.45, 0.00, 0.15, 0.00),
    ("remove_from_cart", "buying"): (0.10, 0.50, 0.40, 0.00, 0.00),
    ("purchase", "browsing"): (0.70, 0.00, 0.00, 0.30, 0.00),
    ("purchase", "considering"): (0.60, 0.10, 0.00, 0.30, 0.00),
    ("purchase", "buying"): (0.50, 0.00, 0.15, 0.33, 0.02),
    ("page_view", "dormant"): (0.60, 0.00, 0.00, 0.40, 0.00),
    ("product_view", "dormant"): (0.60, 0.20, 0.00, 0.20, 0.00),
    ("email_open", "dormant"): (0.12, 0.00, 0.00, 0.88, 0.00),
}

ARRIVAL_INTENT = (0.66, 0.10, 0.02, 0.22, 0.00)


@dataclass(frozen=True)
class Segment:
    """How a kind of user differs from the middle one, for life. `share` of the arrivals; the others multiply rates."""

    name: str
    share: float
    activity: float
    """every event, and the return from dormancy"""
    wanting: float
    """silent moves from browsing to considering and from considering to buying"""
    fading: float
    """silent moves to dormant and to gone"""


SEGMENTS = (
    Segment("heavy", 0.22, activity=1.3, wanting=2.8, fading=0.35),
    Segment("normal", 0.35, activity=1.0, wanting=1.0, fading=1.0),
    Segment("light", 0.43, activity=0.7, wanting=0.1, fading=2.3),
)


@dataclass(frozen=True)
class Law:
    """A marked Markovian arrival process. All rates per day; row sums of d0 + d.sum(0) are zero."""

    types: tuple[str, ...]
    states: tuple[str, ...]
    d0: Floats
    """(S, S): silent moves off the diagonal, minus the total rate of leaving on it"""
    d: Floats
    """(K, S, S): events of type k that lead from i to j"""
    initial: Floats
    """(S,): distribution of the state just after a user's first event"""

    def mean_life_days(self) -> float:
        """Expected days from a user's arrival until no event can come any more."""
        moves_SS = self.d0 + self.d.sum(0)
        live = np.diag(self.d0) < 0
        return float(-self.initial[live] @ np.linalg.solve(moves_SS[np.ix_(live, live)], np.ones(live.sum())))


@dataclass(frozen=True)
class Drift:
    """From `at_ms` on, another law of the same types and states holds; users keep the state that they are in."""

    at_ms: int
    law: Law


def shop_law(promotion: float = 1.0) -> Law:
    """The law of the demo's shop, from the tables above: S = segments x intents.

    promotion: factor on the rates of carts and purchases and on silent moves into buying, as a sale would have it.
    """
    n = len(INTENTS)
    rates_IK, moved_II = RATES_IK.copy(), MOVES_II.copy()
    rates_IK[:, [TYPES.index("add_to_cart"), TYPES.index("purchase")]] *= promotion
    moved_II[:, INTENTS.index("buying")] *= promotion
    lead_KII = np.tile(np.eye(n), (len(TYPES), 1, 1))
    for (kind, intent), after in LEADS_TO.items():
        lead_KII[TYPES.index(kind), INTENTS.index(intent)] = after
    browsing, considering, buying, dormant, gone = range(n)
    size = n * len(SEGMENTS)
    d0, d, initial = np.zeros((size, size)), np.zeros((len(TYPES), size, size)), np.zeros(size)
    for s, segment in enumerate(SEGMENTS):
        block = slice(s * n, (s + 1) * n)
        moves_II = moved_II.copy()
        moves_II[[browsing, considering], [considering, buying]] *= segment.wanting
        moves_II[:, [dormant, gone]] *= segment.fading
        moves_II[dormant, browsing] *= segment.activity
        d[:, block, block] = (rates_IK * segment.activity).T[:, :, None] * lead_KII
        d0[block, block] = moves_II
        initial[block] = np.multiply(ARRIVAL_INTENT, segment.share)
    np.fill_diagonal(d0, -(d0.sum(1) + d.sum((0, 2))))
    states = tuple(f"{segment.name}/{intent}" for segment in SEGMENTS for intent in INTENTS)
    return Law(TYPES, states, d0, d, initial)


@dataclass(frozen=True)
class History:
    """Events of many users as columns, sorted by time (E,)."""

    user: NDArray[np.int32]
    """index into `users`"""
    time_ms: Ints
    type: NDArray[np.int16]
    """index into `types`"""
    item: NDArray[np.int32]
    """-1: none"""
    category: NDArray[np.int16]
    """-1: none"""
    value: Floats
    """the item's price; NaN: none"""
    users: list[str]
    types: tuple[str, ...]


def simulate(law: Law, *, users: int, start_ms: int, days: float, seed: int, drift: Drift | None = None) -> History:
    """One sample of the shop over [start_ms, start_ms + days).

    A first cohort arrives within the first tenth of `days`, ten at most, the rest at uniform times; the cohort is as large as the
    number of live users that those later arrivals can sustain, so the stream stays about stationary.
    """
    rng = np.random.default_rng(seed)
    life = law.mean_life_days()
    cohort = round(users * life / (life + days))
    first = np.concatenate([rng.uniform(0, min(10, days / 10), cohort), rng.uniform(0, days, users - cohort)])
    first.sort()
    phases = [(law, days)] if drift is None else [(law, (drift.at_ms - start_ms) / DAY_MS), (drift.law, days)]
    user, at_days, kind = _events(phases, rng, first)
    time_ms = start_ms + (at_days * DAY_MS).astype(np.int64)
    order = np.lexsort((time_ms, user))
    user, time_ms, kind = user[order], time_ms[order], kind[order]
    item, category, value = _marks(rng, user, kind)
    order = np.argsort(time_ms, kind="stable")
    return History(
        user=user[order].astype(np.int32),
        time_ms=time_ms[order],
        type=kind[order].astype(np.int16),
        item=item[order].astype(np.int32),
        category=category[order].astype(np.int16),
        value=value[order],
        users=[f"u{i + 1:04d}" for i in range(users)],
        types=law.types,
    )


def _events(phases: list[tuple[Law, float]], rng: np.random.Generator, first_U: Floats) -> tuple[Ints, Floats, Ints]:
    """Users, times (days) and types (E,), in no order: all users take their next jump, silent or not, together.

    phases: laws, and the day until which each holds. A jump that would lie beyond it is drawn again by the next law: rates forget.
    """
    law = phases[0][0]
    size = len(law.initial)
    who, at = np.arange(len(first_U)), first_U
    state = rng.choice(size, len(first_U), p=law.initial)
    found: list[tuple[Ints, Floats, Ints]] = [(who, at, np.full(len(who), law.types.index("page_view")))]
    for law, until in phases:
        rate_S = -np.diag(law.d0)
        jumps = np.concatenate([law.d0[None] - np.diag(np.diag(law.d0))[None], law.d]).transpose(1, 0, 2).reshape(size, -1)
        share = np.cumsum(jumps, 1) / np.maximum(rate_S, 1e-300)[:, None]
        # Row s of the table holds s + (cumulative share of each jump): one binary search draws the jumps of all users.
        table = (np.minimum(share, 1) + np.arange(size)[:, None]).ravel()

        waiting = [(who[at >= until], at[at >= until], state[at >= until])]
        who, at, state = who[at < until], at[at < until], state[at < until]
        while True:
            live = rate_S[state] > 0
            waiting.append((who[~live], np.full((~live).sum(), until), state[~live]))
            who, at, state = who[live], at[live], state[live]
            at = at + rng.exponential(1 / rate_S[state])
            inside = at < until
            waiting.append((who[~inside], np.full((~inside).sum(), until), state[~inside]))
            who, at, state = who[inside], at[inside], state[inside]
            if not len(who):
                break
            jump = np.searchsorted(table, state + rng.random(len(who)), side="right") - state * jumps.shape[1]
            kind, state = np.divmod(jump, size)
            event = kind > 0
            found.append((who[event], at[event], kind[event] - 1))
        who, at, state = (np.concatenate(column) for column in zip(*waiting, strict=True))
    user, at_days, kind = (np.concatenate(column) for column in zip(*found, strict=True))
    return user, at_days, kind


ITEMS, CATEGORIES = 400, 12
KEEPS_ITEM = 0.5  # the share of product views that return to the item looked at last


def _marks(rng: np.random.Generator, user: Ints, kind: Ints) -> tuple[Ints, Ints, Floats]:
    """Item, category and value (E,) of events sorted by (user, time): views pick an item, carts and purchases take the last one picked."""
    category_of = rng.integers(0, CATEGORIES, ITEMS)
    price_of = np.round(np.exp(rng.normal(3.3, 0.5, CATEGORIES)[category_of] + rng.normal(0, 0.4, ITEMS)), 2)
    popularity = 1 / np.arange(1, ITEMS + 1)
    drawn = rng.choice(ITEMS, len(user), p=popularity / popularity.sum())

    begins = np.r_[True, user[1:] != user[:-1]]
    picks = begins | ((kind == TYPES.index("product_view")) & (rng.random(len(user)) > KEEPS_ITEM))
    item = drawn[np.maximum.accumulate(np.where(picks, np.arange(len(user)), 0))]
    names_item = np.isin(kind, [TYPES.index(t) for t in ("product_view", "add_to_cart", "remove_from_cart", "purchase")])
    return np.where(names_item, item, -1), np.where(names_item, category_of[item], -1), np.where(names_item, price_of[item], np.nan)
