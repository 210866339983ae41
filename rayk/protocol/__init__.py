"""Every message between a driver, the scheduler and the replicas: msgspec Structs, sent as msgpack.

    driver    --Envelope[SchedulerCommand]-->  scheduler  --Envelope[ReplicaCommand]-->  replica
    driver    --Envelope[ReplicaCommand]----------------------------------------------->  replica

An Envelope holds one command. `epoch` is the receiver's start, so that nobody talks to a replacement by
mistake; `seq` numbers a sender's mutations from 1 (0: the command changes nothing), so that a repeated one
is answered from memory and not done twice. Token arrays are raw little-endian int32 bytes, and page data
travels beside the message, never in it.

A file holds what one receiver takes. Users of messages import this package as `m`: m.Admit, m.AdmitDone.
"""

from rayk.protocol.base import *  # noqa: F403
from rayk.protocol.contexts import *  # noqa: F403
from rayk.protocol.envelope import *  # noqa: F403
from rayk.protocol.from_replica import *  # noqa: F403
from rayk.protocol.from_scheduler import *  # noqa: F403
from rayk.protocol.to_replica import *  # noqa: F403
from rayk.protocol.to_scheduler import *  # noqa: F403
