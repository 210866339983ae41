"""What is made of Ray's own texts, without a Ray."""

from rayk.actors.reasons import why_gone

DIED = """The actor died because of an error raised in its creation task, \x1b[36mray::ReplicaActor.__init__()\x1b[39m \
(pid=12395, ip=10.0.0.1, actor_id=3f92b3906204f6a11b0556af01000000, repr=<rayk.actors.replica.ReplicaActor object>)
           ^^^^^^^^^^^^^^^^^^^^^^^^^
  File "/somewhere/rayk/actors/replica.py", line 31, in __init__
    core = ReplicaCore(params, replica, num_pages, max_batch_size, devices, runtime_checks)
           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^
  File "/somewhere/rayk/buffers.py", line 60, in __init__
    self.values = torch.zeros(shape)
MemoryError: no room for 12 GiB"""
KILLED = """The actor is dead because its worker process has died. Worker exit type: SYSTEM_ERROR Worker exit detail: \
Worker exits unexpectedly. Worker exits with an exit code None. There are some potential root causes."""


def test_the_cause_of_a_failed_constructor_is_told() -> None:
    text = why_gone(Exception(DIED))
    assert "MemoryError: no room for 12 GiB" in text
    assert "\x1b" not in text and "\n" not in text and len(text) <= 300


def test_a_killed_process_is_told_in_one_sentence() -> None:
    assert why_gone(Exception(KILLED)) == "its process ended (SYSTEM_ERROR: Worker exits unexpectedly)"


def test_other_texts_are_kept_short_and_on_one_line() -> None:
    text = why_gone(Exception("The actor is temporarily unavailable.\nDetails: " + "x" * 1000))
    assert text.startswith("The actor is temporarily unavailable. Details: xxx") and len(text) <= 300
