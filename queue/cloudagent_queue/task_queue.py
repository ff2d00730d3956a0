# pyright: basic
"""The doorbell: a message that says which task waits. The only file that imports huey.

Huey delivers at most once and knows nothing of a running task, and nothing here relies on more: the task's row is the
truth, and the sweeper rings again for rows that wait too long. A message carries a name and an id as JSON and is never
unpickled, so whoever can write to the queue can start a task early, and no more.
"""

from __future__ import annotations

import json
import logging
import sqlite3
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import redis
from huey import RedisHuey, SqliteHuey
from huey.consumer import Consumer
from huey.registry import Message
from huey.serializer import Serializer
from huey.storage import RedisStorage, SqliteStorage
from redis.backoff import NoBackoff
from redis.retry import Retry

from cloudagent_storage.errors import QueueUnavailable

log = logging.getLogger(__name__)

QUEUE_NAME = "cloudagent"
TASK_NAME = "run_task"
TICK_NAME = "tick"
CONNECT_TIMEOUT_S = 2.0
READ_TIMEOUT_S = 2.0
CONNECTIONS = 1100
"""The client's own limit is 100; each of a consumer's threads waits on one, and there may be a thousand of them."""
BLOCK_S = 1
"""How long an idle consumer's call waits in Redis; less than the time-out of its socket."""
QUIET_S = 5.0
"""After a ring that failed, no other is tried for so long: it would hold up a submit, whose row is safe anyway."""
AGAIN_S = 1.0
"""How soon a consumer whose queue failed looks at it again."""
RING_S = 0.5
"""How often, then, one of its threads looks for work without having been rung for."""
TELL_S = 60.0
"""How often a failing queue is written to the log; many threads see it, and a log can fill a disk."""
POLL_S = 0.02
"""How often an idle consumer looks whether the queue's file has changed; one thread of all looks."""


class _JsonMessages(Serializer):
    """Huey pickles by default, and unpickling runs code; a task id needs neither."""

    def _serialize(self, data: Message) -> bytes:
        return json.dumps({"id": data.id, "name": data.name, "args": list(data.args)}).encode()

    def _deserialize(self, data: bytes) -> Message:
        fields = json.loads(bytes(data))
        return Message(id=fields["id"], name=fields["name"], args=tuple(fields["args"]), kwargs={}, retries=0)


class _Waker:
    """Wakes waiting threads when the queue's file changes. One of them looks for all."""

    def __init__(self, filename: str) -> None:
        self._filename = filename
        self._condition = threading.Condition()
        self._looking = threading.Lock()
        self._connection: sqlite3.Connection | None = None
        self._generation = 0

    def generation(self) -> int:
        return self._generation

    def wait(self, seen: int, *, timeout_s: float) -> None:
        """Return when something changed after `seen` was taken, or after `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while self._generation == seen and (left := deadline - time.monotonic()) > 0:
            if self._looking.acquire(blocking=False):
                try:
                    self._look(seen, deadline)
                finally:
                    self._looking.release()
            else:
                with self._condition:
                    # Short, so that another thread takes over when the one that looked has gone to work.
                    self._condition.wait_for(lambda: self._generation != seen, timeout=min(left, 5 * POLL_S))

    def _look(self, seen: int, deadline: float) -> None:
        if self._connection is None:
            self._connection = sqlite3.connect(self._filename, check_same_thread=False)
            self._version = -1
        while self._generation == seen and time.monotonic() < deadline:
            (version,) = self._connection.execute("PRAGMA data_version").fetchone()
            if version != self._version:
                self._version = version
                with self._condition:
                    self._generation += 1
                    self._condition.notify_all()
                return
            time.sleep(POLL_S)

    def close(self) -> None:
        with self._looking:
            if self._connection is not None:
                self._connection.close()
                self._connection = None


class _Outage:
    """What a consumer does while its queue fails: huey's own way logs a traceback for each thread and try."""

    def __init__(self) -> None:
        self._told_at = -TELL_S
        self._rang_at = -RING_S

    def wait(self, error: Exception) -> bytes | None:
        """A ring of the consumer's own now and then, as nobody else's arrives: tasks start while the queue is away."""
        if time.monotonic() - self._told_at >= TELL_S:
            self._told_at = time.monotonic()
            log.warning("the queue does not answer (%s); trying again, for as long as it takes", type(error).__name__)
        time.sleep(AGAIN_S)
        if time.monotonic() - self._rang_at < RING_S:
            return None
        self._rang_at = time.monotonic()
        return json.dumps({"id": "", "name": TASK_NAME, "args": [""]}).encode()


class _PatientRedisStorage(RedisStorage):
    """A consumer of it outlives every outage of Redis."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._outage = _Outage()

    def dequeue(self) -> bytes | None:
        # Not huey's own: to it a connection that timed out is an empty queue, and it asks again in the same moment.
        try:
            found: Any = self.conn.brpop([self.queue_key], timeout=BLOCK_S)
        except redis.RedisError as error:
            return self._outage.wait(error)
        return None if found is None else found[1]


class _WakingSqliteStorage(SqliteStorage):
    """Huey's own polling of SQLite backs off to ten seconds; this one wakes within `POLL_S` of an enqueue."""

    blocking = True

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.waker = _Waker(self.filename)
        self._outage = _Outage()

    def dequeue(self) -> bytes | None:
        seen = self.waker.generation()
        try:
            data = super().dequeue()
        except sqlite3.OperationalError as error:  # on a full disk nothing can be taken out either
            return self._outage.wait(error)
        if data is None:
            self.waker.wait(seen, timeout_s=1.0)
        return data


class _Consumer(Consumer):
    """Huey's threads, all of which end when `stopping` is set."""

    def __init__(self, huey: Any, stopping: threading.Event, **options: Any) -> None:
        self._stopping = stopping
        super().__init__(huey, scheduler_interval=60, **options)

    def get_environment(self, worker_type: str) -> Any:
        environment: Any = super().get_environment(worker_type)
        environment.get_stop_flag = lambda: self._stopping
        return environment


class TaskQueue:
    """Carries task ids from whoever submits to the workers.

    `url` is `redis://…`, `rediss://…` or `sqlite:///FILE` (a file of its own, apart from the database).
    Raises `QueueUnavailable`.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._run: Callable[[str], None] | None = None
        self._tick: Callable[[], None] | None = None
        self._quiet_until = 0.0
        scheme = urlsplit(url).scheme
        if scheme in ("redis", "rediss"):
            pool = redis.ConnectionPool.from_url(
                url,
                socket_connect_timeout=CONNECT_TIMEOUT_S,
                socket_timeout=READ_TIMEOUT_S,
                max_connections=CONNECTIONS,
                # Each retry would wait for the time-out once more.
                retry=Retry(NoBackoff(), 0),
            )
            self._redis: redis.Redis | None = redis.Redis(connection_pool=pool)
            make = lambda: RedisHuey(  # noqa: E731
                QUEUE_NAME,
                results=False,
                serializer=_JsonMessages(),
                storage_class=_PatientRedisStorage,
                connection_pool=pool,
            )
        elif scheme == "sqlite":
            self._redis = None
            filename = url.removeprefix("sqlite:///")
            make = lambda: SqliteHuey(  # noqa: E731
                QUEUE_NAME,
                results=False,
                serializer=_JsonMessages(),
                storage_class=_WakingSqliteStorage,
                filename=filename,
            )
        else:
            raise QueueUnavailable(
                "The queue's address is of no known kind.", remedy="QUEUE_URL is redis:// or sqlite:///."
            )
        try:
            self._huey = make()
        except sqlite3.Error as error:
            raise QueueUnavailable("The queue's file cannot be opened.") from error

        def run_task(task_id: str) -> None:
            assert self._run is not None
            self._run(task_id)

        # An explicit name: huey would otherwise take the function's, and a message of an unknown name is lost.
        self._message = self._huey.task(name=TASK_NAME)(run_task)

        def tick() -> None:
            if self._tick is not None:
                self._tick()

        # The consumer asks each minute whether it is time, and it always is.
        self._huey.periodic_task(lambda _: True, name=TICK_NAME)(tick)

    def put(self, task_id: str) -> None:
        """Ring for a task. Raises `QueueUnavailable`, at once when it has just failed; the task is safe in its row."""
        if time.monotonic() < self._quiet_until:
            raise QueueUnavailable()
        try:
            self._message(task_id)
        except (redis.RedisError, sqlite3.Error, OSError) as error:
            self._quiet_until = time.monotonic() + QUIET_S
            raise QueueUnavailable() from error

    def waiting(self) -> int:
        """How many messages nobody has taken yet. Raises `QueueUnavailable`."""
        try:
            return self._huey.storage.queue_size()
        except (redis.RedisError, sqlite3.Error, OSError) as error:
            raise QueueUnavailable() from error

    def check(self) -> str:
        """One line that says what the queue is. Raises `QueueUnavailable`."""
        try:
            waiting = self._huey.storage.queue_size()
            if self._redis is None:
                return f"SQLite file, {waiting} waiting"
            policy = self._redis.config_get("maxmemory-policy").get("maxmemory-policy")
        except (redis.RedisError, sqlite3.Error, OSError) as error:
            raise QueueUnavailable() from error
        if policy not in (None, "noeviction"):
            raise QueueUnavailable(
                "Redis may evict the queue when its memory is full.",
                remedy="Run Redis with maxmemory-policy noeviction.",
            )
        return f"Redis, {waiting} waiting"

    def consume(
        self,
        run: Callable[[str], None],
        *,
        concurrency: int,
        stopping: threading.Event,
        grace_s: float,
        tick: Callable[[], None] | None = None,
    ) -> bool:
        """Run tasks on `concurrency` threads until `stopping` is set; then wait up to `grace_s` for them to let go.

        `tick` is called in one of them every minute, once for each consumer that there is, in whichever of them.
        True when every thread had ended. Signals are the caller's business: huey's own handlers cut a task dead.
        """
        self._run, self._tick = run, tick
        consumer = _Consumer(self._huey, stopping, workers=concurrency, periodic=tick is not None)
        threads = [thread for _, thread in consumer.worker_threads]
        if tick is not None:
            threads.append(consumer.scheduler)
        for thread in threads:
            thread.start()
        stopping.wait()
        deadline = time.monotonic() + grace_s
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        return not any(thread.is_alive() for thread in threads)

    def close(self) -> None:
        """Let go of connections."""
        if self._redis is not None:
            self._redis.connection_pool.disconnect()
        else:
            storage: Any = self._huey.storage
            storage.waker.close()
            storage.close()
