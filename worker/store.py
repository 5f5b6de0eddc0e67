"""Redis: a view of the log, one partition a slot.

Layout. Every key of input partition P starts with the hash tag {GROUP:P}, so a Redis Cluster keeps it in one slot:

    {GROUP:P}:applied        string   what the states below are exact for: see `Applied`
    {GROUP:P}:due            zset     user -> epoch ms at which to look whether the user is due (a silence score, or deletion): not later
                                      than the user is, and often earlier, because events that put a due off do not move the timer
    {GROUP:P}:u:USER         string   the user's record: see `worker.record`
    {GROUP:P}:c:SLOT:USER    string   a chunk of TAIL older events, in a ring of slots

Rules.

1. All writes of a flush are one atomic step, a compare-and-set on `applied`: `FLUSH` does nothing unless `applied` still is what this
   worker last wrote or read. So states and `applied` never part, and a worker that lost its partition writes nothing. `applied` is another
   one after each flush, even where no offset moved: a flush that finds its own there is a repetition of one whose answer was lost.
2. Every read of states is one MGET that reads `applied` first, and every read of dues is a script that does. If it is not what this
   worker last wrote or read, nothing that was read is used: somebody else has written, or Redis was flushed or restored. So nobody scores
   from states that are not his own, or takes users who were lost for users who are not due.
3. Inside `FLUSH` everything that can fail is tried before the first write: scripts are not rolled back.
4. A flush may go on beside the worker, which meanwhile polls and decodes. Nothing else is asked of a partition's slot before its answer
   is known (`settle`), so all of the above holds as if nothing had gone on beside.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Sequence
from concurrent.futures import Executor
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from typing import Any, cast

import redis
from redis.exceptions import NoScriptError, OutOfMemoryError, ReadOnlyError, ResponseError

AWAY = (
    redis.exceptions.ConnectionError,
    redis.exceptions.TimeoutError,
    redis.exceptions.InvalidResponse,
    redis.exceptions.ClusterError,
    redis.exceptions.RedisClusterException,  # no RedisError: a node or a slot that is not there
    redis.exceptions.TryAgainError,
)

READ_BYTES = 1 << 20  # an answer has about a megabyte, and each read gives other threads a chance to keep this one waiting

# KEYS: applied, due, keys to set...; ARGV: expected, new, n set, values..., n due, (score, user)..., n gone, users..., n delete, keys...
FLUSH = """
local applied = redis.call('GET', KEYS[1])
if applied == ARGV[2] then return 2 end
if (applied or '') ~= ARGV[1] then return 0 end
local kind = redis.call('TYPE', KEYS[2]).ok
if kind ~= 'zset' and kind ~= 'none' then return redis.error_reply('WRONGTYPE ' .. KEYS[2] .. ' holds a ' .. kind) end
local at = 3
local function take(step)
  local n = tonumber(ARGV[at]); at = at + 1
  local first = at; at = at + n * step
  return first, n
end
local function each(first, n, step, call)
  for from = 0, n - 1, 1000 do
    local upto = math.min(from + 1000, n)
    call(first + from * step, first + upto * step - 1, from, upto)
  end
end
local values, n = take(1)
each(values, n, 1, function(a, b, from)
  local pairs = {}
  for i = a, b do
    pairs[#pairs + 1] = KEYS[2 + from + i - a + 1]
    pairs[#pairs + 1] = ARGV[i]
  end
  redis.call('MSET', unpack(pairs))
end)
local dues, m = take(2)
each(dues, m, 2, function(a, b) redis.call('ZADD', KEYS[2], unpack(ARGV, a, b)) end)
local gone, g = take(1)
each(gone, g, 1, function(a, b) redis.call('ZREM', KEYS[2], unpack(ARGV, a, b)) end)
for i = 2 + n + 1, #KEYS, 1000 do redis.call('UNLINK', unpack(KEYS, i, math.min(i + 999, #KEYS))) end
redis.call('SET', KEYS[1], ARGV[2])
return 1
"""


# KEYS: applied, due; ARGV: expected, min, max, limit
DUE = """
if (redis.call('GET', KEYS[1]) or '') ~= ARGV[1] then return false end
return redis.call('ZRANGEBYSCORE', KEYS[2], ARGV[2], ARGV[3], 'WITHSCORES', 'LIMIT', 0, ARGV[4])
"""


class StoreUnavailable(Exception):
    """Redis cannot be reached, or refuses writes for now (full, read-only). Trying again may help. The message says what to do."""


class StoreError(Exception):
    """Redis holds something that cannot be ours. Trying again cannot help. The message says which key and what to do."""


class Moved(Exception):
    """`applied` is not what this worker last wrote or read: the partition must be acquired anew."""


@dataclass(frozen=True)
class Applied:
    """Up to where a partition's states are exact.

    offsets: next offset of each event topic. fired_ms, stream_ms: the clock there (see `worker.schedule`). partitions: the input topics'
    partition count, because users move between partitions when it changes. encoder: the encoder_id that every stored record is known to
    have, "" while some may still be rebuilt. flush: a name of its own for each flush.
    """

    offsets: dict[str, int]
    fired_ms: int
    stream_ms: int
    partitions: int
    encoder: str = ""
    flush: str = field(default="", compare=False)

    def encode(self) -> bytes:
        return json.dumps(asdict(self), sort_keys=True).encode()

    @classmethod
    def decode(cls, value: bytes, key: str) -> Applied:
        """Raises StoreError."""
        try:
            return cls(**json.loads(value))
        except (ValueError, TypeError):
            raise StoreError(
                f"Redis key {key} does not hold what a worker writes there: is another program using it? Delete it to rebuild"
            ) from None


@dataclass(slots=True)
class Flush:
    """What one flush writes, besides `applied`."""

    records: dict[str, bytes] = field(default_factory=dict)  # by user
    chunks: dict[tuple[str, int], bytes] = field(default_factory=dict)  # by user and slot
    due: dict[str, int] = field(default_factory=dict)
    gone: list[str] = field(default_factory=list)  # users to delete


@dataclass(slots=True)
class _Attempt:
    """A flush whose answer is not known yet. outcome: the answer, or how to get it by sending the same once more."""

    token: bytes
    outcome: Callable[[], Any]
    again: Callable[[], Any]


class Store:
    """One partition's part of Redis. `token` is what `applied` must still be.

    beside: runs flushes; None: they are done when `flush` returns. What a flush came to is raised by whatever is asked next.
    """

    def __init__(self, client: redis.Redis, group: str, partition: int, slots: int, beside: Executor | None = None) -> None:
        self._redis = client
        self._beside = beside
        self._attempt: _Attempt | None = None
        self._tag = f"{{{group}:{partition}}}"
        self._slots = slots
        self._applied_key = f"{self._tag}:applied"
        self._due_key = f"{self._tag}:due"
        self._users = f"{self._tag}:u:"
        self._flush_sha: str | None = None
        self._flush_name = secrets.token_hex(8)
        self.token: bytes | None = None

    def acquire(self) -> Applied | None:
        """Read `applied` and build on it from now on. None: nothing is stored. Raises StoreUnavailable, StoreError."""
        self.abandon()
        self.token = cast("bytes | None", self._try(lambda: self._redis.get(self._applied_key)))
        return None if self.token is None else Applied.decode(self.token, self._applied_key)

    def load(self, users: Sequence[str]) -> list[bytes | None]:
        """The stored records of users, None for a user who has none. Raises Moved, StoreUnavailable, StoreError."""
        prefix = self._users
        return self._mget([prefix + u for u in users])

    def chunks(self, users: Sequence[str]) -> list[list[bytes | None]]:
        """The ring of chunks of each user. Raises Moved, StoreUnavailable, StoreError."""
        if not users:
            return []
        flat = self._mget([self._chunk_key(user, slot) for user in users for slot in range(self._slots)])
        return [flat[i : i + self._slots] for i in range(0, len(flat), self._slots)]

    def due(self, after_ms: int, upto_ms: int, limit: int) -> list[tuple[str, int]]:
        """At most `limit` users due in (after_ms, upto_ms], soonest first. Raises Moved, StoreUnavailable, StoreError."""
        return self._due(after_ms, upto_ms, limit)

    def next_due(self, after_ms: int) -> int | None:
        """When the next user after a moment is due, None if nobody is. Raises Moved, StoreUnavailable, StoreError."""
        found = self._due(after_ms, "+inf", 1)
        return found[0][1] if found else None

    def users(self) -> int:
        """Users stored. Raises StoreUnavailable, StoreError."""
        return int(self._try(lambda: self._redis.zcard(self._due_key)))

    def clear(self) -> None:
        """Delete every user and `applied`. Not atomic, but it can be repeated. Raises StoreUnavailable, StoreError."""
        self._try(lambda: self._redis.unlink(self._applied_key))
        while users := [u.decode() for u in self._try(lambda: self._redis.zrange(self._due_key, 0, 999))]:
            keys = [self._users + u for u in users] + [self._chunk_key(u, s) for u in users for s in range(self._slots)]
            self._try(lambda keys=keys: self._redis.unlink(*keys))  # type: ignore[misc]
            self._try(lambda users=users: self._redis.zrem(self._due_key, *users))  # type: ignore[misc]
        self.token = None

    def scan(self, cursor: int, count: int) -> tuple[int, list[str]]:
        """Some users and the cursor of the next call; a cursor of 0 ends the round. Raises Moved, StoreUnavailable, StoreError."""
        self.settle()
        cursor, found = self._try(lambda: self._redis.zscan(self._due_key, cursor, count=count))
        return int(cursor), [user.decode() for user, _ in found]

    def flush(self, changes: Flush, applied: Applied) -> None:
        """Write changes and `applied` in one atomic step: begin with it, and without `beside` end it, too. See `settle`."""
        self.settle()
        new = replace(applied, flush=self._flush_name).encode()
        keys: list[str] = [self._users + u for u in changes.records]
        keys += [self._chunk_key(user, slot) for user, slot in changes.chunks]
        deleted = [self._users + u for u in changes.gone] + [self._chunk_key(u, s) for u in changes.gone for s in range(self._slots)]
        arguments: list[Any] = [self.token or b"", new, len(keys), *changes.records.values(), *changes.chunks.values()]
        arguments.append(len(changes.due))
        for user, due_ms in changes.due.items():
            arguments += (due_ms, user)
        arguments += (len(changes.gone), *changes.gone)
        all_keys = [self._applied_key, self._due_key, *keys, *deleted]
        self._flush_name = secrets.token_hex(8)

        def evaluate() -> Any:
            return self._evaluate(all_keys, arguments)

        self._attempt = _Attempt(new, self._beside.submit(evaluate).result if self._beside else evaluate, evaluate)
        if self._beside is None:
            self.settle()

    def settle(self) -> None:
        """Wait for the flush that was begun. Raises Moved if `token` no longer held, and nothing was written; StoreUnavailable,
        StoreError and nothing was written, unless a lost connection hid a success. The next call sends the same again, and
        recognises that."""
        if (attempt := self._attempt) is None:
            return
        outcome, attempt.outcome = attempt.outcome, attempt.again
        try:
            written = self._try(outcome)
        except StoreError:
            self._attempt = None
            raise
        self._attempt = None
        if not written:
            raise Moved(f"{self._applied_key} was changed by another worker, or Redis was flushed or restored")
        self.token = attempt.token

    def abandon(self) -> None:
        """Nobody builds on a flush that was begun any more. Waits until it can do nothing any more, whatever it came to."""
        attempt, self._attempt = self._attempt, None
        if attempt is not None and attempt.outcome is not attempt.again:
            with suppress(Exception):
                attempt.outcome()

    def _evaluate(self, keys: list[str], arguments: list[Any]) -> Any:
        if self._flush_sha is None:
            self._flush_sha = str(self._redis.script_load(FLUSH))
        try:
            return self._redis.evalsha(self._flush_sha, len(keys), *keys, *arguments)
        except NoScriptError:  # Redis was restarted
            return self._redis.eval(FLUSH, len(keys), *keys, *arguments)

    def _mget(self, keys: list[str]) -> list[bytes | None]:
        self.settle()
        found = cast("list[bytes | None]", self._try(lambda: self._redis.mget([self._applied_key, *keys])))
        if found[0] != self.token:
            raise Moved(f"{self._applied_key} was changed by another worker, or Redis was flushed or restored")
        values = found[1:]
        missing = [k for k, v in zip(keys, values, strict=True) if v is None]
        # MGET says None for a key of another type, too; writing over it would lose somebody's data in silence.
        if missing and self._try(lambda: self._redis.exists(*missing)):
            wrong = next((k for k in missing if self._try(lambda k=k: self._redis.type(k)) not in (b"none", b"string")), None)  # type: ignore[misc]
            if wrong:
                raise StoreError(
                    f"Redis key {wrong} is not a string: another program uses this key space; choose another `group` or Redis database"
                )
        return values

    def _due(self, after_ms: int, upto_ms: int | str, limit: int) -> list[tuple[str, int]]:
        self.settle()
        keys, token = (self._applied_key, self._due_key), self.token or b""
        found = self._try(lambda: self._redis.eval(DUE, len(keys), *keys, token, f"({after_ms}", upto_ms, limit))
        if found is None:  # an empty set would pass for silence scores that are out
            raise Moved(f"{self._applied_key} was changed by another worker, or Redis was flushed or restored")
        return [(user.decode(), int(float(score))) for user, score in zip(found[::2], found[1::2], strict=True)]

    def _chunk_key(self, user: str, slot: int) -> str:
        return f"{self._tag}:c:{slot}:{user}"

    def _try(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except OutOfMemoryError as error:
            raise StoreUnavailable(
                f"Redis is full ({error}): raise its maxmemory or lower retention_days; states wait in memory"
            ) from error
        except ReadOnlyError as error:
            raise StoreUnavailable(f"Redis is a read-only replica ({error}): point redis_url at the primary") from error
        except redis.exceptions.AuthenticationError as error:
            raise StoreUnavailable("Redis refuses this login: write its user and password into redis_url") from error
        except AWAY as error:
            raise StoreUnavailable(f"Redis does not answer: {error}") from error
        except ResponseError as error:
            text = str(error)
            if text.startswith(("WRONGTYPE", "ERR WRONGTYPE")) or "wrong kind of value" in text:
                raise StoreError(
                    f"a Redis key of {self._tag} holds another type than a worker writes ({text}): choose another `group` or database"
                ) from error
            if text.startswith(("OOM", "READONLY", "MISCONF", "LOADING", "MASTERDOWN", "CLUSTERDOWN", "TRYAGAIN", "NOREPLICAS")):
                raise StoreUnavailable(f"Redis refuses for now: {text}") from error
            raise StoreError(f"Redis refused: {text}") from error


def connect(url: str, *, cluster: bool, timeout_seconds: float, ssl_cafile: str | None) -> redis.Redis:
    """A client for `url` (redis://, rediss://, unix://). Raises ValueError where the url cannot be one, and, as a client of a cluster
    connects at once, StoreUnavailable."""
    options: dict[str, Any] = {
        "socket_timeout": timeout_seconds,
        "socket_connect_timeout": timeout_seconds,
        "socket_read_size": READ_BYTES,
    }
    if ssl_cafile:
        options["ssl_ca_certs"] = ssl_cafile
    try:
        if cluster:
            return cast("redis.Redis", redis.RedisCluster.from_url(url, **options))
        return redis.Redis.from_url(url, **options)
    except ValueError:  # not passed on: it may quote a part of the password
        raise ValueError(
            "redis_url is no Redis URL: write redis://USER:PASSWORD@HOST:PORT/DATABASE (rediss:// for TLS, unix:// for a socket), with "
            "special characters in user and password percent-encoded"
        ) from None
    except redis.exceptions.RedisClusterException as error:
        raise StoreUnavailable(f"{error}: is redis_cluster right?") from error
