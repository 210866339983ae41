"""The Ray side of rayk: replica actors, planning tasks, placement and page transport.

The folder stands at the top level of the repository; the link ``rayk/actors`` makes it the package
``rayk.actors``. It is imported under that name only: a second name would make a second copy of every
class, and ``isinstance`` and message decoding would then fail between the copies.
"""

if __name__ != "rayk.actors":
    raise ImportError(
        f"this package is rayk.actors and was imported as {__name__!r}: write 'import rayk.actors' or "
        "'from rayk.actors import ...' instead (under a second name every class would exist twice)",
        name=__name__,
        path=__file__,
    )
