"""What drivers, scheduler, replicas and engines send each other: msgspec Structs, and contexts kept in step."""
