"""The kinds of violations that the history of several accounts can have."""

from enum import StrEnum, unique


@unique
class AccountsKind(StrEnum):
    """The kind of a violation that no account has alone or without holds."""

    HALF_MISSING = "half missing"
    HALVES_DIFFER = "halves differ"
    ANSWER_DIFFERS = "answer differs"
    AVAILABLE_DIFFERS = "available differs"
    WRONG_SIDE = "wrong side refused"
    TORN_SNAPSHOT = "torn snapshot"
    TIME_WENT_BACK = "time went back"
    HELD_DIFFERS = "held differs"
    HOLD_LOST = "lost hold"
    HOLD_ALTERED = "altered hold"
    HOLD_PHANTOM = "phantom hold"
    END_LOST = "lost end of a hold"
    END_PHANTOM = "phantom end of a hold"
    ENDED_TWICE = "hold ended twice"
    EXPIRED_EARLY = "hold expired early"
    OVERDUE = "overdue hold open"
    CAPTURE_DIFFERS = "capture differs"
    REVERSAL_DIFFERS = "reversal differs"
    PAST_DIFFERS = "past differs"
    NO_ORDER = "no order"
