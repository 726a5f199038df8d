"""Heartbeats: an actor says every few seconds that it lives, and how much work it has done.

A thread of the actor's process writes a small JSON text into the key-value store of Ray's head, under the actor's id.
The run's supervisor reads it there. A process that was stopped, or whose node cannot be reached, falls silent.

Left out: calls to the actor, which are not answered while it loads its model; and a socket of our own, which would be
one more port to guard.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable
from typing import Any

import ray
from ray.experimental import internal_kv

BEAT_SECONDS = 2.0
_NAMESPACE = "opdlm-heartbeats"

Progress = Callable[[], int]  # a number that grows while the actor gets somewhere: passes, sequences, micro-batches


class Heartbeat:
    """The beats of this process's actor, from `start` until the process ends; `loaded` once in between."""

    def __init__(self) -> None:
        self.progress: Progress | None = None
        self._number = 0
        self._actor = ray.get_runtime_context().get_actor_id()

    def start(self) -> None:
        """The first beat is sent on return: from now on silence means that something is wrong."""
        self._beat()
        threading.Thread(target=self._keep_beating, name="heartbeat", daemon=True).start()

    def loaded(self, progress: Progress) -> None:
        """The actor has its model; `progress` tells from now on how far it is."""
        self.progress = progress
        self._beat()

    def _keep_beating(self) -> None:
        while True:
            time.sleep(BEAT_SECONDS)
            self._beat()

    def _beat(self) -> None:
        self._number += 1
        progress = self.progress() if self.progress else 0
        beat = {"beat": self._number, "loaded": self.progress is not None, "progress": progress, "pid": os.getpid()}
        internal_kv._internal_kv_put(self._actor, json.dumps(beat), True, namespace=_NAMESPACE)


def last_beats(actor_ids: list[str]) -> dict[str, dict[str, Any]]:
    """What each actor wrote last, by its id: the number of the beat, whether it is `loaded`, its progress and its pid.
    Those that wrote nothing yet are left out. All are read at once."""
    keys = [actor.encode() for actor in actor_ids]
    found = internal_kv.internal_kv_get_gcs_client().internal_kv_multi_get(keys, _NAMESPACE.encode())
    return {key.decode(): json.loads(text) for key, text in found.items()}


def forget(actor_id: str) -> None:
    """Remove the beats of an actor that is no more."""
    internal_kv._internal_kv_del(actor_id, namespace=_NAMESPACE)
