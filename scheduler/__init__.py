"""Who serves what: membership, routing, prefix index and aggregation, and the scheduler actor.

The folder stands at the top level of the repository; the link ``rayk/scheduler`` makes it the package
``rayk.scheduler``. It is imported under that name only: a second name would make a second copy of every
class, and ``isinstance`` and message decoding would then fail between the copies.
"""

if __name__ != "rayk.scheduler":
    raise ImportError(
        f"this package is rayk.scheduler and was imported as {__name__!r}: write 'import rayk.scheduler' or "
        "'from rayk.scheduler import ...' instead (under a second name every class would exist twice)",
        name=__name__,
        path=__file__,
    )
