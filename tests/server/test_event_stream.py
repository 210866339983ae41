"""Events of a stream: the pass of the event loop that brings them writes them, or its task where that has to wait."""

from __future__ import annotations

import asyncio
from typing import Any

import numpy as np

from rayk.dispatch.output import Handle
from rayk.sampling import SamplingParams
from rayk.server.answers import Answers, Mailbox
from rayk.server.completion import Completion
from rayk.server.generation import EventStream, Generation
from rayk.server.prompts import Asked
from rayk.server.requests import CompletionBody


def handle() -> Handle:
    return Handle(0, 1, "r", np.arange(3, dtype=np.int32), SamplingParams())


class Client:
    """Takes bodies; while it is `full`, whoever sends waits."""

    def __init__(self) -> None:
        self.room = asyncio.Event()
        self.room.set()
        self.bodies: list[bytes] = []
        self.senders: set[Any] = set()

    async def send(self, message: Any) -> None:
        if message["type"] == "http.response.body":
            self.bodies.append(message["body"])
            self.senders.add(asyncio.current_task())
            await self.room.wait()


def stream_of(client: Client, found: Handle, mailbox: Mailbox) -> tuple[Answers, asyncio.Task[None]]:
    body, asked = CompletionBody(prompt=[1], stream=True), Asked([[1, 2, 3]], [None], SamplingParams())
    form = Completion(body, asked, "cmpl-1", "100%", None)
    generation = Generation(None, body, asked, form, "cmpl-1")  # type: ignore[arg-type]  # no service is needed
    answers = Answers(mailbox)
    found.on_news = answers.tell
    answers.follow([found])

    async def run() -> None:
        await EventStream(generation, answers, form, client.send, client.send).run(heartbeat=60.0)

    return answers, asyncio.ensure_future(run())


def texts(client: Client) -> str:
    events = b"".join(client.bodies).split(b"\n\n")
    assert events.pop() == b"" and all(each.startswith(b"data: ") for each in events)
    return "".join(each.split(b'"text":"')[1].split(b'"')[0].decode() for each in events if b'"text"' in each)


def test_a_token_is_written_at_once_and_in_the_name_of_its_request() -> None:
    async def scene() -> None:
        client, found, mailbox = Client(), handle(), Mailbox()
        _, task = stream_of(client, found, mailbox)
        await asyncio.sleep(0)
        for number in range(3):
            found.add(found.ticket, 0.0, [number], [f"t{number}"])
            before = len(client.bodies)
            await asyncio.sleep(0)
            assert len(client.bodies) == before + 1, "within one pass"
        found.finish("length", text="t0t1t2")
        await asyncio.wait_for(task, 10)
        assert texts(client) == "t0t1t2" and client.bodies[-1].endswith(b'"length"}]}\n\ndata: [DONE]\n\n')
        assert client.senders == {task}

    asyncio.run(scene())


def test_a_client_that_does_not_read_makes_its_own_task_wait_and_loses_nothing() -> None:
    async def scene() -> None:
        clients, handles, mailbox = [Client(), Client()], [handle(), handle()], Mailbox()
        streams = [stream_of(*each, mailbox) for each in zip(clients, handles, strict=True)]
        await asyncio.sleep(0)
        clients[0].room.clear()
        for number in range(5):
            for found in handles:
                found.add(found.ticket, 0.0, [number], [f"t{number}"])
            for _ in range(3):
                await asyncio.sleep(0)
        assert len(clients[0].bodies) == 1 and texts(clients[1]) == "t0t1t2t3t4"
        handles[0].finish("stop", text="")
        clients[0].room.set()
        await asyncio.wait_for(streams[0][1], 10)
        assert texts(clients[0]) == "t0t1t2t3t4" and len(clients[0].bodies) == 2, "what waited was written at once"
        streams[1][1].cancel()

    asyncio.run(scene())
