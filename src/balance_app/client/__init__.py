"""A typed client of the service: `from balance_app.client import Service`.

It knows the service by its HTTP contract alone. Every call ends in one of three ways: with the
answer; with a `Refused`, of one class per problem; or with `OutcomeUnknown`, whose key asks again
later. Between them are retries: a request that moves money is sent with an idempotency key, or is
one that takes effect once by itself, so it may be sent again whenever its outcome is not known.

`service` has the calls, `answers` what they return, `failures` what they raise; `transport` sends
requests until they are answered.
"""

from balance_app.client.answers import (
    Account,
    Change,
    Entry,
    Hold,
    PastBalance,
    Settings,
    State,
    Transfer,
)
from balance_app.client.failures import (
    BalanceLimitExceeded,
    CaptureExceedsHold,
    EntryNotFound,
    ExternalIdTaken,
    FloorNotCovered,
    HoldEnded,
    HoldNotFound,
    IdempotencyKeyReused,
    IncompleteExport,
    InsufficientFunds,
    InsufficientScope,
    InvalidRequest,
    InvalidURL,
    KeyNotFound,
    KeyNotSent,
    MisdirectedRequest,
    NotReversible,
    NotTheService,
    OutcomeUnknown,
    Refused,
    ServiceFailure,
    TooManyRequests,
    TransferNotFound,
    Unauthorized,
    Unavailable,
    UserFrozen,
    UserNotFound,
    VersionConflict,
)
from balance_app.client.service import Service

__all__ = [
    "Account",
    "BalanceLimitExceeded",
    "CaptureExceedsHold",
    "Change",
    "Entry",
    "EntryNotFound",
    "ExternalIdTaken",
    "FloorNotCovered",
    "Hold",
    "HoldEnded",
    "HoldNotFound",
    "IdempotencyKeyReused",
    "IncompleteExport",
    "InsufficientFunds",
    "InsufficientScope",
    "InvalidRequest",
    "InvalidURL",
    "KeyNotFound",
    "KeyNotSent",
    "MisdirectedRequest",
    "NotReversible",
    "NotTheService",
    "OutcomeUnknown",
    "PastBalance",
    "Refused",
    "Service",
    "ServiceFailure",
    "Settings",
    "State",
    "TooManyRequests",
    "Transfer",
    "TransferNotFound",
    "Unauthorized",
    "Unavailable",
    "UserFrozen",
    "UserNotFound",
    "VersionConflict",
]
