"""Publishing through kafka-python: a transaction of messages and positions, or messages alone. For `worker.transport_kafka` only.

What this file knows of kafka-python (3.0.12) beyond its manual:

1. `commit_transaction` and its like wait without limit: `bounded`.
2. A batch that expired does not abort its transaction: every future is looked at before the commit.
3. After an error the producer's state cannot be relied on: it is dropped, and a new one made when it is needed.
4. `close` flushes first. With messages that cannot be delivered it fails there and the sender goes on sending: `Producer.abandon`.
5. A client that cannot be made leaves its network thread behind: `connect`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from itertools import repeat
from operator import methodcaller
from typing import Any, TypeVar

from kafka import KafkaProducer
from kafka import errors as E
from kafka.net.compat import KafkaNetClient

from worker.settings import WorkerSettings
from worker.transport import Outgoing

T = TypeVar("T")
ANSWER_MS = 5_000  # for one answer; nothing waits for Kafka longer than this, but for transactions
CLOSE_S = 2.0
BATCH_BYTES = 512 * 1024  # below the 1 MB that a topic takes by default: a larger batch would be refused, split and sent again
LINGER_MS = 100  # nothing lingers, as all is flushed; but the sender does not begin with small requests while more is being added
LARGEST_REQUEST = 64 * 1024 * 1024  # a topic may allow large dead letters


class Undelivered(Exception):
    """args: which message, and Kafka's error."""

    def __str__(self) -> str:
        return f"{self.args[0]}: {said(self.args[1])}"


class Producer(KafkaProducer):  # type: ignore[misc]
    """A producer that can be given up with messages in it, and whose name is at hand: `send` asks for it twice a message, to log it."""

    _abandoned = False
    _name = ""

    def __str__(self) -> str:
        self._name = self._name or str(super().__str__())
        return self._name

    def flush(self, timeout: float | None = None) -> None:
        if not self._abandoned:
            super().flush(timeout)

    def abandon(self) -> None:
        self._abandoned = True
        with suppress(Exception):
            self.close(timeout=0)


class Publisher:
    """One producer at a time, made when it is needed and dropped after any error."""

    def __init__(self, settings: WorkerSettings, transactional_id: str) -> None:
        self._settings = settings
        self._transactional_id = transactional_id
        self._exactly_once = settings.guarantee == "exactly_once"
        self._limit_ms = settings.transaction_timeout_ms  # Kafka has given a transaction up by then
        self._producer: Producer | None = None
        self._ready = False
        self._ending: Future[None] | None = None

    def prepare(self) -> Producer:
        """exactly_once: when this returns, no transaction of this transactional id is open, also none of a worker that died."""
        if self._producer is None:
            transactional = {"transactional_id": self._transactional_id, "transaction_timeout_ms": self._limit_ms}
            self._producer = connect(
                Producer,
                self._settings,
                client_id=self._transactional_id,
                metrics_enabled=False,
                acks="all",
                enable_idempotence=True,
                linger_ms=LINGER_MS,
                batch_size=BATCH_BYTES,
                max_request_size=LARGEST_REQUEST,
                max_block_ms=ANSWER_MS,
                request_timeout_ms=min(ANSWER_MS, self._limit_ms - LINGER_MS),
                delivery_timeout_ms=self._limit_ms,
                retry_backoff_ms=10,  # also between transactions, while the last one's markers are written: 4 ms rather than 34 for each
                **(transactional if self._exactly_once else {}),
            )
            self._ready = not self._exactly_once
        if not self._ready:
            try:
                self._producer.init_transactions()
            except E.KafkaTimeoutError:
                raise  # the next call goes on waiting for the same answer
            except Exception:
                self._drop()
                raise
            self._ready = True
        return self._producer

    def begin(self, outgoing: Sequence[Outgoing], offsets: Mapping[Any, Any], member: Any) -> None:
        """exactly_once: in one transaction with the offsets. at_least_once: the offsets are not looked at."""
        producer = self.prepare()
        with self._undoing(producer):
            if self._exactly_once:
                producer.begin_transaction()
            futures = send(producer, outgoing)
        self._ending = started(lambda: self._end(producer, outgoing, futures, offsets, member))

    def settle(self) -> None:
        """Wait for what was begun."""
        ending, self._ending = self._ending, None
        if ending is not None and self._producer is not None:
            with self._undoing(self._producer):
                within(self._limit_ms / 1000, ending)

    def close(self) -> None:
        if (producer := self._producer) is not None:
            with suppress(Exception):
                bounded(lambda: producer.close(timeout=CLOSE_S), CLOSE_S + 0.5)
            self._drop()

    def _end(self, producer: Producer, outgoing: Sequence[Outgoing], futures: list[Any], offsets: Mapping[Any, Any], member: Any) -> None:
        acknowledge(producer, outgoing, futures, self._limit_ms / 1000)
        if self._exactly_once:
            if offsets:
                producer.send_offsets_to_transaction(offsets, member)
            producer.commit_transaction()

    @contextmanager
    def _undoing(self, producer: Producer) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            answers = not isinstance(error, E.KafkaTimeoutError)
            if self._exactly_once and answers:  # an open transaction holds up whoever reads committed messages
                with suppress(Exception):
                    bounded(producer.abort_transaction, CLOSE_S)
            self._drop()
            raise

    def _drop(self) -> None:
        if self._producer is not None:
            self._producer.abandon()
            self._producer = None


def connect(kind: Callable[..., T], settings: WorkerSettings, **config: Any) -> T:
    """A client of kafka-python."""
    made: list[Any] = []

    def network(**configs: Any) -> Any:
        made.append(KafkaNetClient(**configs))
        return made[0]

    try:
        return kind(
            **settings.kafka_client(), bootstrap_timeout_ms=ANSWER_MS, reconnect_backoff_max_ms=1000, kafka_client=network, **config
        )
    except BaseException:
        for client in made:
            client.close()
        raise


def bounded(call: Callable[[], T], timeout_s: float) -> T:
    """`call()` in a thread of its own, which is left behind if it takes longer. Raises KafkaTimeoutError then."""
    return within(timeout_s, started(call))


def started(call: Callable[[], T]) -> Future[T]:
    """`call()` in a thread of its own."""
    outcome: Future[T] = Future()

    def run() -> None:
        try:
            outcome.set_result(call())
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="kafka-bounded", daemon=True).start()
    return outcome


def within(timeout_s: float, outcome: Future[T]) -> T:
    """What came of it. Raises KafkaTimeoutError if that is not known in time."""
    try:
        return outcome.result(timeout_s)
    except TimeoutError:
        raise E.KafkaTimeoutError(f"no answer in {timeout_s:.0f} s") from None


def send(producer: Any, outgoing: Sequence[Outgoing]) -> list[Any]:
    """A future of each message, in order."""
    send_one = producer.send
    futures: list[Any] = []
    for batch in outgoing:
        topic, number = batch.topic, batch.partition
        headers = [list(h) for h in batch.headers] if batch.headers else repeat(None)
        sent = len(futures)
        try:
            for key, value, about in zip(batch.keys, batch.values, headers, strict=False):
                # kafka-python sends no message without both
                futures.append(send_one(topic, b"" if value is None and key is None else value, key, about, number))
        except E.KafkaError as error:
            raise Undelivered(_named(batch, len(futures) - sent), error) from error
    return futures


def acknowledge(producer: Any, outgoing: Sequence[Outgoing], futures: list[Any], timeout_s: float) -> None:
    """Wait until every message is acknowledged."""
    if futures:
        with suppress(E.UnknownError):  # a batch was too large for its topic, and is being sent in parts
            producer.flush(timeout_s)
    if all(map(methodcaller("succeeded"), futures)):
        return
    messages = ((batch, i) for batch in outgoing for i in range(len(batch.values)))
    for future, (batch, i) in zip(futures, messages, strict=True):
        if not future.succeeded():
            try:
                future.get(timeout_s)
            except E.KafkaError as error:
                raise Undelivered(_named(batch, i), error) from error


def said(error: BaseException) -> str:
    """kafka-python's error without its decoration."""
    return str(error.args[0]) if error.args and error.args[0] else type(error).__name__


def _named(batch: Outgoing, i: int) -> str:
    return f"a message of {len(batch.keys[i] or b'') + len(batch.values[i] or b'')} bytes to topic {batch.topic}"
