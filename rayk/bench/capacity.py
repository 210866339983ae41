"""Whether requests can be served at all: the pages that one needs against the pages that a replica has."""

from __future__ import annotations

from rayk.bench.request import BenchRequest, Workload
from rayk.errors import RaykError


class RequestTooLargeError(RaykError, ValueError):
    """A request that no replica can ever hold."""

    request_id: str
    prompt: int
    output: int
    page_size: int
    needed: int
    pages: int

    def __str__(self) -> str:
        return (
            f"request {self.request_id!r} ({self.prompt} prompt and {self.output} generated tokens) needs "
            f"{self.needed} pages of {self.page_size} tokens, a replica has {self.pages}; "
            f"use --pages {self.needed} or more"
        )


def too_large(request: BenchRequest, page_size: int, pages: int) -> RequestTooLargeError:
    """The error that says that `request` cannot fit into `pages` pages."""
    needed = request.pages(page_size)
    return RequestTooLargeError(
        request.request_id, request.prompt_length, request.output_length, page_size, needed, pages
    )


def check_fits(workload: Workload, page_size: int, pages: int) -> None:
    """RequestTooLargeError, with the pages that would do, when a request of `workload` cannot fit into one replica."""
    largest = max(workload.requests, key=lambda request: request.pages(page_size))
    if largest.pages(page_size) > pages:
        raise too_large(largest, page_size, pages)
