"""Newtypes for the identities that rayk passes around."""

from __future__ import annotations

from typing import NewType

RequestId = NewType("RequestId", str)
ReplicaIdx = NewType("ReplicaIdx", int)
PageId = NewType("PageId", int)
PageHash = NewType("PageHash", bytes)
